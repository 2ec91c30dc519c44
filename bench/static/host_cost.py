"""What a call of attention takes on the host, measured without a GPU: this machine's Python, Triton's own launcher.

    python bench/static/host_cost.py

The driver underneath is the tests' (fake_cuda.c): it launches nothing, so no time of a GPU is in these figures. Calls
are timed as the package launches (kernels/launch.py keeps the machine code that Triton has found) and, in turns with
that, as Triton itself does.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests")]  # run as a script: the driver lives with the tests

from fake_cuda import build, environment, fake_driver  # noqa: E402

from fastchargpt.kernels import flash  # noqa: E402
from fastchargpt.kernels.launch import Launch  # noqa: E402
from fastchargpt.timing import race  # noqa: E402

FOLDER = "FASTCHARGPT_FAKE_DRIVER"  # names the driver's folder to the process that measures
CALLS = 20  # a timing
HEADS, HEAD_DIM = 2, 64


def _training(time: int) -> Callable[[], object]:
    width = HEADS * HEAD_DIM
    qkv = torch.zeros(1, time, 3 * width, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.zeros(1, time, width, dtype=torch.bfloat16)

    def call() -> object:
        out = flash.attention_packed(qkv, HEADS, HEADS, scale=0.125)
        return torch.autograd.grad(out, qkv, gradient)

    return call


def _forward(queries: int, keys: int) -> Callable[[], object]:
    q, k = (torch.zeros(1, HEADS, time, HEAD_DIM, dtype=torch.bfloat16) for time in (queries, keys))
    return lambda: flash.attention(q, k, k, scale=0.125, causal=True)


def measure() -> None:
    """Print the table."""
    calls = {
        "forward": _forward(256, 256),
        "decode, 2 launches": _forward(1, 1000),
        "forward and backward, 2 launches": _training(64),
        "forward and backward, 3 launches": _training(512),
    }
    print("| call | us, code kept | us, as Triton launches | ratio |\n|---|---|---|---|")
    with fake_driver():
        kept = Launch.__call__
        for name, call in calls.items():

            def timed(way: Callable[..., None], call: Callable[[], object] = call) -> Callable[[], None]:
                def many() -> None:
                    Launch.__call__ = way  # type: ignore[method-assign]
                    for _ in range(CALLS):
                        call()

                return many

            ways = {"kept": timed(kept), "triton": timed(Launch.by_triton)}
            timings = race(ways, torch.device("cpu"), seconds=2.0, max_rounds=100_000)
            ours, tritons = (1e6 * timings[way].median / CALLS for way in ways)
            print(f"| {name} | {ours:.0f} | {tritons:.0f} | {tritons / ours:.1f} |")


def main() -> None:
    """Build the driver, and measure in a process that links against it."""
    if FOLDER in os.environ:
        measure()
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        variables = environment(Path(folder)) | {FOLDER: folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
        sys.exit(subprocess.run([sys.executable, __file__], env=variables).returncode)


if __name__ == "__main__":
    main()
