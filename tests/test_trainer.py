"""The training loop: exact resume, early stops, signals, faults, and what it leaves behind."""

import dataclasses
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.corpus import Corpus
from fastchargpt.errors import CheckpointError, OutDirError, TrainingError
from fastchargpt.evaluation import evaluate
from fastchargpt.loading import load
from fastchargpt.metrics import JsonlMetrics, read_metrics
from fastchargpt.model import GPT
from fastchargpt.plotting import plot_losses
from fastchargpt.precision import Precision
from fastchargpt.tokenizers import CharTokenizer
from fastchargpt.trainer import Trainer

FP32 = Precision(name="fp32", reason="test")
MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=5, dropout=0.1)
CONFIG = TrainConfig(
    batch_size=4,
    max_iters=20,
    eval_interval=5,
    log_interval=1,
    warmup_iters=3,
    learning_rate=1e-2,
    device="cpu",
    seed=7,
)


def corpus(tokens: int = 400) -> Corpus:
    """A text that a model can learn: each character mostly follows the one before it in the alphabet."""
    random = np.random.default_rng(0)
    ids = np.cumsum(1 + (random.random(tokens) < 0.1)) % 5
    cut = int(0.9 * tokens)
    return Corpus(
        name="toy",
        train=ids[:cut].astype(np.uint8),
        val=ids[cut:].astype(np.uint8),
        tokenizer=CharTokenizer("abcde"),
        vocab_size=5,
        source="made here",
    )


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Any, *, step: int) -> None:
        self.rows.append((step, {name: value for name, value in metrics.items() if name in ("loss", "val_loss", "lr")}))


def train(
    out_dir: Path | None = None, *, stop_at: int | None = None, resume: bool = False, **fields: Any
) -> tuple[Trainer, Recorder]:
    """Run, or begin and be interrupted before step `stop_at`, or go on."""
    recorder = Recorder()
    trainer = Trainer(
        MODEL,
        dataclasses.replace(CONFIG, **fields),
        corpus(),
        out_dir=out_dir,
        loggers=[recorder],
        log=lambda line: None,
    )
    if resume:
        trainer.resume()
    if stop_at is not None:
        plain = trainer.batches.next_batch

        def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
            if trainer.step.iteration == stop_at - 1:
                signal.raise_signal(signal.SIGTERM)  # noted by the loop, acted on after this step
            return plain()

        trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
    result = trainer.run()
    assert result.stopped == ("finished" if stop_at is None else "SIGTERM")
    return trainer, recorder


@pytest.mark.parametrize("order", ["random", "epochs"])
@pytest.mark.parametrize("stop_at", [1, 5, 7, 19])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_resume_is_bit_equal(tmp_path: Path, order: str, stop_at: int, schedule: str) -> None:
    average = 0.8 if order == "epochs" else 0.0
    fields = dict(order=order, schedule=schedule, gradient_accumulation_steps=2, ema_decay=average)
    whole, expected = train(**fields)  # type: ignore[arg-type]
    _, first = train(tmp_path, stop_at=stop_at, **fields)  # type: ignore[arg-type]
    torch.manual_seed(999)  # whatever happened in between
    torch.rand(3)
    second_run, second = train(tmp_path, resume=True, **fields)  # type: ignore[arg-type]
    assert first.rows + second.rows == expected.rows
    for ours, theirs in zip(second_run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second_run.best_val_loss == whole.best_val_loss
    assert second_run.best_iteration == whole.best_iteration


def test_it_learns_and_keeps_the_best(tmp_path: Path) -> None:
    trainer, recorder = train(tmp_path, max_iters=100, eval_interval=20)
    losses = [row["val_loss"] for _, row in recorder.rows if "val_loss" in row]
    assert losses[-1] < 0.6 < 1.5 < losses[0]
    assert min(losses) == trainer.best_val_loss
    model, tokenizer = load(tmp_path)
    assert tokenizer is not None
    # the saved model is the one that was measured, and the figure is that of the whole split
    assert evaluate(model, corpus().val, block_size=8, precision=FP32).loss == trainer.best_val_loss
    assert load_checkpoint(tmp_path / "best").info["iteration"] == trainer.best_iteration
    assert load_checkpoint(tmp_path / "best").trainer_state is None


def test_evaluation_is_the_mean_over_every_token() -> None:
    torch.manual_seed(0)
    model = GPT(MODEL).double()
    tokens = corpus().val
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, 8):  # windows that do not overlap, one by one
        window = torch.from_numpy(tokens[start : start + 9].astype(np.int64))[None]
        loss = model.eval()(window[:, :-1], window[:, 1:])[1]
        total += loss.item() * (window.shape[1] - 1)
        count += window.shape[1] - 1
    model.train()
    found = evaluate(model, tokens, block_size=8, precision=FP32)
    assert found.tokens == count == len(tokens) - 1
    assert found.loss == pytest.approx(total / count, rel=1e-12)
    assert found.bits_per_token == pytest.approx(found.loss / math.log(2))
    assert model.training


def test_target_and_patience_stop_early() -> None:
    recorder = Recorder()
    fields = dict(max_iters=1000, eval_interval=10)
    target = Trainer(
        MODEL,
        dataclasses.replace(CONFIG, target_val_loss=1.2, **fields),
        corpus(),
        loggers=[recorder],
        log=lambda _: None,
    ).run()
    assert target.stopped == "target"
    assert target.val_loss <= 1.2
    assert target.iterations < 1000
    idle = dict(fields, learning_rate=0.0, min_lr=0.0, patience=3)
    stuck = Trainer(MODEL, dataclasses.replace(CONFIG, **idle), corpus(), log=lambda _: None).run()  # type: ignore[arg-type]
    assert (stuck.stopped, stuck.iterations) == ("patience", 30)


def test_a_run_that_stopped_early_is_over_when_it_is_resumed(tmp_path: Path) -> None:
    # killed between its last save and its end, it must not take more steps than one that was left alone
    for name, fields in (
        ("patience", dict(learning_rate=0.0, min_lr=0.0, patience=3, max_iters=1000)),
        ("target", dict(target_val_loss=9.9, max_iters=1000)),
    ):
        ended = []
        for life in range(2):
            trainer = Trainer(
                MODEL,
                dataclasses.replace(CONFIG, **fields),  # type: ignore[arg-type]
                corpus(),
                out_dir=tmp_path / name,
                log=lambda _: None,
            )
            if life:
                trainer.resume()
            ended.append(dataclasses.replace(trainer.run(), seconds=0))
        assert ended[0].stopped == name
        assert ended[1] == ended[0]
        longer = dataclasses.replace(CONFIG, **{**fields, "patience": 5, "target_val_loss": None})  # type: ignore[arg-type]
        trainer = Trainer(
            MODEL, dataclasses.replace(longer, max_iters=40), corpus(), out_dir=tmp_path / name, log=print
        )
        trainer.resume()
        assert trainer.run().iterations > ended[0].iterations


def test_lines_that_people_parse() -> None:
    lines: list[str] = []
    Trainer(MODEL, dataclasses.replace(CONFIG, max_iters=2), corpus(), log=lines.append).run()
    import re

    assert [line for line in lines if re.fullmatch(r"step \d+: train loss \d+\.\d{4}, val loss \d+\.\d{4}", line)] == [
        lines[0],
        lines[-1],
    ]
    iterations = [
        line for line in lines if re.fullmatch(r"iter \d+: loss \d+\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%", line)
    ]
    assert [int(line.split()[1][:-1]) for line in iterations] == [0, 1]


def test_a_choice_and_its_reason_for_each_auto() -> None:
    described = "\n".join(Trainer(MODEL, CONFIG, corpus(), log=lambda _: None).describe())
    for word in (
        "precision fp32: ",
        "attention sdpa: ",
        "compile ",
        "cuda graph off: ",
        "device cpu",
        "vocabulary of 5",
    ):
        assert word in described


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path) -> None:
    trainer = Trainer(MODEL, CONFIG, corpus(), out_dir=tmp_path, log=lambda _: None)
    plain = trainer.batches.next_batch

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.step.iteration == 7:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = math.nan
        return plain()

    trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 7 \(learning rate .*last good checkpoint is .*last, of step 5"
    ):
        trainer.run()
    assert load_checkpoint(tmp_path / "last", with_trainer=True).info["iteration"] == 5
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(tmp_path / "last").weights.values())


def test_out_of_memory_is_one_sentence(tmp_path: Path) -> None:
    trainer = Trainer(MODEL, CONFIG, corpus(), log=lambda _: None)

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(1 << 60), torch.empty(0)

    trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="out of memory at step 0: lower --batch-size"):
        trainer.run()


def test_another_model_or_corpus_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path, stop_at=3)
    other = Trainer(dataclasses.replace(MODEL, n_layer=2), CONFIG, corpus(), out_dir=tmp_path, log=lambda _: None)
    with pytest.raises(CheckpointError, match="holds another model"):
        other.resume()
    longer = Trainer(MODEL, CONFIG, corpus(500), out_dir=tmp_path, log=lambda _: None)
    with pytest.raises(CheckpointError, match=r"was trained on \[360, 40\].*has \[450, 50\]"):
        longer.resume()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    program = """
import time
from fastchargpt.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if signals.received: print(signals.received.name, flush=True); signals_seen = True; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
        for step in range(3):
            metrics.log({"loss": 4.0, "lr": 0.001}, step=step)
        with pytest.raises(OutDirError, match=r"metrics\.jsonl cannot be written \(.*\): free some space"):
            metrics.log({"loss": 4.0, "lr": 0.001}, step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == 150  # the last line is cut in two
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    JsonlMetrics(path, resume_step=3).log({"loss": 3.0}, step=3)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3]
    assert path.read_text(encoding="utf-8").count("\n") == 4


def test_metrics_survive_a_cut_line_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = JsonlMetrics(path)
    for step in range(4):
        metrics.log({"loss": 4.0 - step}, step=step)
    metrics.log({"val_loss": 2.5}, step=2)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["loss"] for row in read_metrics(path) if "loss" in row] == [4.0, 3.0, 2.0, 1.0]
    # two steps are taken, 0 and 1, and evaluated: that stays, and step 2 is written again
    JsonlMetrics(path, resume_step=2).log({"loss": 0.5}, step=2)
    assert read_metrics(path) == [
        {"step": 0, "loss": 4.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "val_loss": 2.5},
        {"step": 2, "loss": 0.5},
    ]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 60_000,
        "\xff",
        '{"step": true}',
        '{"step": 1e999}',
        '{"step": 1, "loss": "x"}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        '{"step": 1' + " " * 70_000 + "}",
        "7",
        "null",
    ],
    ids=range(10),
)
def test_a_foreign_line_among_the_metrics_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.5}}\n{line}\n', encoding="latin-1")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "loss": 3 / (s + 1), "val_loss": 3.1 / (s + 1)} for s in range(5)]
    assert plot_losses(rows, tmp_path / "loss.png", title="toy")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_losses([], tmp_path / "none.png", title="toy")
    assert not (tmp_path / "none.png").exists()
