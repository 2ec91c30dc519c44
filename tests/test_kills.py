"""SIGKILL at moments nobody chose: a run resumed each time ends, bit for bit, as one that was left alone.

`make soak` raises FASTCHARGPT_SOAK_KILLS (5 here) and prints where the kills hit.
"""

import os
import sys
from pathlib import Path
from typing import Any

import kills
import pytest
from native_library import require

from fastchargpt.model import GPT
from fastchargpt.native_step import native_step_problem

COUNT = int(os.environ.get("FASTCHARGPT_SOAK_KILLS", "0"))
SEED = int(os.environ.get("FASTCHARGPT_SOAK_SEED", "0"))
BASE: dict[str, Any] = dict(max_iters=20 * COUNT or 40, eval_interval=3, log_interval=1)
RUNS: dict[str, dict[str, Any]] = {
    "epochs, accumulation, wsd, averaged weights": dict(
        order="epochs", gradient_accumulation_steps=2, schedule="wsd", ema_decay=0.8
    ),
    "native, Muon, linear": dict(optimizer="muon", schedule="linear"),
    "random, cosine": dict(),
    "random, accumulation, linear, clipped": dict(gradient_accumulation_steps=3, schedule="linear", grad_clip=0.05),
    "epochs, constant, patience": dict(order="epochs", schedule="constant", patience=5 * COUNT or 30),
    "random, a save at every step": dict(eval_interval=1),
    "torch, Muon, accumulation": dict(optimizer="muon", gradient_accumulation_steps=2),
    "scaler": dict(log_interval=3),
}
SHORT = 2  # of them in the short form


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor fork")
@pytest.mark.parametrize("name", list(RUNS) if COUNT else list(RUNS)[:SHORT])
def test_killed_runs_resume_bit_equal(tmp_path: Path, name: str) -> None:
    run = kills.Run(fields={**BASE, **RUNS[name]}, native="native" in name, scaler=name == "scaler")
    if run.native:
        require(native_step_problem(GPT(kills.NATIVE_MODEL)))
    server = kills.server()
    kills.run_with_kills(server, tmp_path / "whole", run, 0, SEED)
    told = kills.run_with_kills(server, tmp_path / "killed", run, COUNT or 5, SEED)
    print(f"soak: {name}: {told}")
    whole, killed = kills.remains(tmp_path / "whole"), kills.remains(tmp_path / "killed")
    for one, other in ((whole.last, killed.last), (whole.best, killed.best)):
        assert one.info == other.info
        assert kills.same(one.weights, other.weights)
        assert kills.same(one.trainer_state, other.trainer_state)
    assert whole.rows == killed.rows
    assert len(whole.sample) == kills.SAMPLE_CHARACTERS
    assert whole.sample == killed.sample
    if run.scaler:  # it was at work: fewer updates than steps
        assert whole.last.trainer_state is not None
        state = whole.last.trainer_state["step"]
        assert max(float(kept["step"]) for kept in state["optimizer"]["state"].values()) < state["iteration"]


def test_the_comparison_notices_a_bit(tmp_path: Path) -> None:
    import torch

    a = {"x": [torch.tensor([1.0, 2.0]), 3], "y": {"z": (1.5, None)}}
    assert kills.same(a, {"x": [torch.tensor([1.0, 2.0]), 3], "y": {"z": (1.5, None)}})
    nudged = torch.nextafter(torch.tensor([1.0, 2.0]), torch.tensor(9.0))
    assert not kills.same(a, {"x": [nudged, 3], "y": {"z": (1.5, None)}})
    assert not kills.same(a, {"x": [torch.tensor([1.0, 2.0]), 3], "y": {"z": (1.5, 0)}})
