"""`torchrun -m fastchargpt train` as its user meets it: one voice, one save, one refusal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.cli import main
from fastchargpt.metrics import read_metrics

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 40
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fastchargpt", "train"]
TINY = "--preset=shakespeare-char-cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --device=cpu"


def command(folder: Path, *more: str) -> list[str]:
    text = folder / "hamlet.txt"
    text.write_text(TEXT, encoding="utf-8")
    return [*LAUNCH, *TINY.split(), "--compile=off", "--data", str(text), "--out-dir", str(folder / "out"), *more]


def ours(text: str) -> list[str]:
    """The lines that are this package's, among those of torchrun."""
    return [line for line in text.splitlines() if "fastchargpt: " in line]


def test_a_mistake_is_told_once() -> None:
    # torchrun has its own say about an exit status of 2, and nothing keeps it from that
    done = subprocess.run([*LAUNCH, "--bacth_size=4"], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = ours(done.stderr)
    assert "did you mean --batch-size?" in line


def test_ctrl_c_saves_once_and_the_folder_is_then_taken(tmp_path: Path) -> None:
    run = command(tmp_path, "--max-iters=1000000", "--eval_interval=50", "--log_interval=1")
    launcher = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, until = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 300
    while not any(row["step"] >= 3 for row in read_metrics(metrics)):
        assert launcher.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    said, _ = launcher.communicate(timeout=300)
    assert said.count("stopped by Ctrl-C after") == 1
    assert said.count(f"saved {tmp_path / 'out' / 'last'}: go on with --resume") == 1
    assert (
        said.count("step 0: train loss") == said.count("iter 2: loss") == said.count("parallel ddp: 2 processes") == 1
    )
    taken = load_checkpoint(tmp_path / "out" / "last", with_trainer=True).info["iteration"]
    # saved at the step where it stopped, in both processes alike
    assert f"stopped by Ctrl-C after {taken} steps" in said
    assert taken == 1 + max(row["step"] for row in read_metrics(metrics) if "loss" in row)

    done = subprocess.run(command(tmp_path, "--max-iters=5"), capture_output=True, text=True, timeout=300)
    (line,) = ours(done.stderr)
    assert f"out dir {tmp_path / 'out'} is not empty: go on with --resume" in line
    assert load_checkpoint(tmp_path / "out" / "last").info["iteration"] == taken


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_the_first_process_speaks(capsys: pytest.CaptureFixture[str], second: None) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr() == ("", "")
    # a mistake that the first process does not end them all for is its own
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("fastchargpt: process 1: there is no command 'trian'")


def test_one_process_needs_a_launcher_for_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RANK" not in os.environ
    assert main([*command(tmp_path, "--parallel=fsdp")[len(LAUNCH) - 1 :]]) == 2
    assert capsys.readouterr().err.startswith(
        "fastchargpt: parallel=fsdp shares a run among processes, and no launcher"
    )
    assert not (tmp_path / "out").exists()
