"""What the tests of shared runs share: two small models, and a life of a run on this process with what it tells."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import torch
from test_trainer import CONFIG, corpus

from fastchargpt.config import GPTConfig
from fastchargpt.trainer import Trainer

__all__ = ["MODEL", "MODERN", "Rows", "Told", "live"]

# Widths that the native step can take; without dropout, which every process draws for itself, and without biases: that
# of the keys has no gradient but rounding, which AdamW makes as large as any other.
MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=5, dropout=0.0, bias=False)
# with weights from the first step on: Muon would blow the rounding in a gradient of zeros up to a step of full length
MODERN = GPTConfig.family("modern", n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=5, proj_init="normal")
FIGURES = ("loss", "val_loss", "train_loss", "lr", "grad_norm")

Rows = list[tuple[int, dict[str, float]]]


class Recorder:
    def __init__(self) -> None:
        self.rows: Rows = []

    def log(self, metrics: Any, *, step: int) -> None:
        self.rows.append((step, {name: value for name, value in metrics.items() if name in FIGURES}))


@dataclasses.dataclass
class Told:
    """What a process has to say of its run."""

    rows: Rows
    lines: list[str]
    stopped: str
    iteration: int
    val_loss: float


def live(
    model: GPTConfig, fields: dict[str, Any], out_dir: Path | None = None, stop_at: int | None = None, stopper: int = 0
) -> Told:
    """One life of a run on this process: begun, or gone on with if there is one; stopped by a signal to `stopper`."""
    recorder, lines = Recorder(), []  # type: tuple[Recorder, list[str]]
    config = dataclasses.replace(CONFIG, **{"batch_size": 6, **fields})
    trainer = Trainer(model, config, corpus(), out_dir=out_dir, loggers=[recorder], log=lines.append)
    with trainer.parallel as parallel:
        if out_dir is not None and (out_dir / "last").exists():
            trainer.resume()
        if stop_at is not None and parallel.rank == stopper:
            plain = trainer.batches.next_batch

            def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
                if trainer.step.iteration == stop_at - 1:
                    signal.raise_signal(signal.SIGTERM)
                return plain()

            trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
        result = trainer.run()
        return Told(recorder.rows, [*trainer.describe(), *lines], result.stopped, result.iterations, result.val_loss)
