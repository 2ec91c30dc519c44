"""Training: one optimiser step by family, precision and compile mode, beside nanoGPT's and the lecture's."""

from typing import Any

import pytest

from fastchargpt.bench.settings import Settings, settings_from
from fastchargpt.bench.training import contestants, entrants, works


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = settings_from(device=config.getoption("--device"), quick=config.getoption("--quick"), peers=[])
    metafunc.parametrize("work", works(chosen.device, quick=chosen.quick), ids=lambda work: work.name)
    metafunc.parametrize("contestant", contestants(chosen.device, quick=chosen.quick))


def test_training(rank: Any, settings: Settings, contestant: str, work: Any) -> None:
    rank(
        f"training {work.name}",
        contestant,
        lambda: entrants(work, settings),
        lead=1,  # a step among steps
        subject="training",
        work=work.name,
    )
