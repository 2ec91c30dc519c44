"""What the tests of the step as a CUDA graph share: a small step with a graph or without, and batches to run it on."""

from collections.abc import Callable
from typing import Any

import torch
from graph_stand_in import RecordedGraphs

from fastchargpt.captured import CudaGraphs
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.model import GPT
from fastchargpt.optim import make_optimizer
from fastchargpt.precision import Precision
from fastchargpt.step import TrainStep

__all__ = ["FP32", "assert_same_weights", "batches", "make_step", "rate", "run"]

FP32 = Precision(name="fp32", reason="test")
# without biases: that of the keys has a gradient of rounding errors alone, which AdamW scales up
SHAPE: dict[str, Any] = dict(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=False)


def rate(iteration: int) -> float:
    """A schedule that a rate taken at the capture would miss by far."""
    return 2e-2 / (iteration + 1)


def make_step(
    graphs: RecordedGraphs | CudaGraphs | None,
    *,
    optimizer: str = "adamw",
    parts: int = 1,
    clip: float = 0.5,
    schedule: Callable[[int], float] | None = rate,
    precision: Precision = FP32,
    compile: bool = False,
    attention: str = "naive",
    device: str = "cpu",
    **model: Any,
) -> TrainStep:
    torch.manual_seed(2)
    family = "modern" if optimizer == "muon" else "nanogpt"
    gpt = GPT(GPTConfig.family(family, **{**SHAPE, "proj_init": "normal", **model})).to(device)
    gpt.set_attention(attention)
    torch.manual_seed(3)
    return TrainStep(
        gpt,
        make_optimizer(gpt, TrainConfig(optimizer=optimizer, learning_rate=1e-2)),  # type: ignore[arg-type]
        precision=precision,
        grad_clip=clip,
        gradient_accumulation_steps=parts,
        compile=compile,
        learning_rate=schedule,
        graphs=graphs,
    )


def batches(count: int, size: int = 4, length: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(11, (count, 2, size, length), generator=generator)
    return [(x, y) for x, y in rows]


def run(step: TrainStep, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Losses, read at the end: a result that a later step overwrote would show."""
    losses = [step(x, y) for x, y in data]
    return [loss.item() for loss in losses]


def assert_same_weights(one: TrainStep, other: TrainStep, tolerance: float = 1e-6) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
