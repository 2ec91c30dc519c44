"""What every test shares: quiet threads, the real corpus where it can be had, a small one where not."""

import os
from pathlib import Path

import pytest
import torch

# One thread a process: the models here are tiny, and `make test` runs one process a core. Threads that wait for each
# other on a busy machine make such tests ten times slower. Child processes read the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1337)


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """The text of tiny shakespeare; a test that needs it is skipped where FASTCHARGPT_DATA_DIR does not hold it."""
    path = Path(os.environ.get("FASTCHARGPT_DATA_DIR", "")) / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("needs tinyshakespeare.txt in the folder that FASTCHARGPT_DATA_DIR names")
    return path.read_text(encoding="utf-8")
