"""Checkpoints of the first day go on loading: data/first-checkpoint is one, written by commit b7b2bb2.

It lacks what came later: the writer's name, Muon's settings, `deterministic`, the engine. That commit itself, resumed
from it, reached the validation losses below (the data was `abcde` a hundred times).
"""

import shutil
from pathlib import Path

import pytest
import torch

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.cli.main import main
from fastchargpt.loading import load
from fastchargpt.metrics import read_metrics

FIRST = Path(__file__).parent / "data" / "first-checkpoint"
LOSSES = {9: 1.0762, 12: 0.9254}


def test_it_loads_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    found = load_checkpoint(FIRST, with_trainer=True)
    assert found.info["iteration"] == 6
    assert found.train_config is not None
    assert (found.train_config.optimizer, found.train_config.engine) == ("adamw", "auto")
    model, tokenizer = load(FIRST)
    assert tokenizer is not None
    idx = torch.from_numpy(tokenizer.encode("abcdeabcd").astype("int64"))[None]
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(found.info["val_loss"], abs=0.1)
    assert main(["sample", str(FIRST), "--max-new-tokens", "9"]) == 0
    assert len(capsys.readouterr().out.strip()) == 9


def test_its_run_goes_on_where_it_would_have_gone(tmp_path: Path) -> None:
    (tmp_path / "abc.txt").write_text("abcde" * 100)
    shutil.copytree(FIRST, tmp_path / "run" / "last")
    words = ["train", "--resume", "--out-dir", str(tmp_path / "run"), "--data", str(tmp_path / "abc.txt")]
    assert main([*words, "--max-iters", "12"]) == 0
    found = {
        row["step"]: row["val_loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in row
    }
    assert found == pytest.approx(LOSSES, abs=2e-4)
