"""What several processes cannot share is refused in a sentence; an error on the first of them is everybody's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import MODEL
from ranks import run_ranks
from test_trainer import CONFIG, corpus

from fastchargpt.config import TrainConfig
from fastchargpt.errors import BackendUnavailableError, ConfigError, FastchargptError, OutDirError
from fastchargpt.parallel import Parallel, open_parallel
from fastchargpt.precision import Precision
from fastchargpt.trainer import Trainer


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what a launcher sets."""

    def launch(world_size: int, **more: str) -> None:
        count = str(world_size)
        for name, value in {"RANK": "0", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        for name, value in more.items():
            monkeypatch.setenv(name, value)

    return launch


def test_what_does_not_fit_is_refused(launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("ddp", "fsdp"):
        with pytest.raises(ConfigError, match=rf"parallel={mode} shares .* start it with torchrun --nproc-per-node=N"):
            open_parallel(mode)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be auto, ddp, fsdp or none"):
        open_parallel("pipeline")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4, and no launcher gave this one a RANK"):
        open_parallel()
    launched(4)
    with pytest.raises(ConfigError, match="would make 4 runs of the same kind in one out dir"):
        open_parallel("none")
    with pytest.raises(BackendUnavailableError, match="device cuda is not available here"):
        open_parallel("auto", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("auto", "cuda"):
        with pytest.raises(BackendUnavailableError, match=r"4 processes on this machine and 2 GPU\(s\): use --nproc"):
            open_parallel("auto", device)
    with pytest.raises(ConfigError, match="a GPU of its own: use device=cuda, not cuda:1"):
        open_parallel("auto", "cuda:1")
    launched(2, RANK="first")
    with pytest.raises(ConfigError, match="RANK must be a count, not 'first'"):
        open_parallel("auto", "cpu")
    launched(1)
    assert open_parallel("auto", "cpu").mode == "none"


def refused(fields: dict[str, Any]) -> str:
    try:
        Trainer(MODEL, dataclasses.replace(TrainConfig(device="cpu"), **fields), corpus(), log=print)
    except FastchargptError as error:
        return str(error)
    return "served"


def test_what_fsdp_has_not(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, refused, dict(parallel="fsdp", compile="on"))[0].startswith(
        "compile=on cannot be served"
    )
    assert "whole weights" in run_ranks(tmp_path, refused, dict(parallel="fsdp", engine="native"))[0]
    assert "cannot share a step of 1 x 13" in run_ranks(tmp_path, refused, dict(batch_size=13))[0]


def test_fp16_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = Precision(name="fp16", reason="test")
    monkeypatch.setattr("fastchargpt.trainer.choose_training_precision", lambda *arguments, **named: scaled)
    with pytest.raises(BackendUnavailableError, match="gradient scaler needs whole gradients"):
        Trainer(
            MODEL,
            CONFIG,
            corpus(),
            parallel=Parallel("fsdp", device=torch.device("cpu"), world_size=2, reason="test"),
        )


def test_an_error_on_the_first_process_is_everybodys(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, told_by_main) == ["OutDirError: the folder is taken"] * 2


def told_by_main() -> str:
    def act() -> None:
        raise OutDirError("the folder is taken")

    with open_parallel("ddp", "cpu") as parallel:
        try:
            parallel.on_main(act)
        except OutDirError as error:
            return f"OutDirError: {error}"
    return "nothing"
