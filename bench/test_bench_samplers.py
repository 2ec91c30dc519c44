"""Samplers: one draw for each of B sequences, by knob, beside the plain draw that nanoGPT and the lecture make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastchargpt.bench.contest import Contestant
from fastchargpt.bench.settings import Settings

# knobs of SamplingConfig; `plain` is softmax and multinomial, written here
KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.8},
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


def allowed(logits: Tensor, knobs: dict[str, Any]) -> Tensor:
    """Which tokens a draw may give, (B, V), straight from the knobs' definitions, in float64."""
    probabilities = logits.double().softmax(dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    rank = order.argsort(dim=-1)
    mask = torch.ones_like(rank, dtype=torch.bool)
    if knobs.get("temperature") == 0:
        mask = rank == 0
    elif "top_k" in knobs:
        mask = rank < knobs["top_k"]
    elif "top_p" in knobs:
        mask = (ordered.cumsum(dim=-1) - ordered).gather(1, rank) < knobs["top_p"]
    elif "min_p" in knobs:
        mask = probabilities >= knobs["min_p"] * ordered[:, :1]
    return mask


def entrants(batch: int, vocab_size: int, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    logits = 3 * torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(2)).to(device)

    def build(name: str) -> Contestant:
        if name == "plain":

            def draw() -> Tensor:
                return torch.multinomial(logits.softmax(dim=-1), 1).flatten()

        else:
            from fastchargpt.sampling import Sampler, SamplingConfig

            sampler = Sampler(SamplingConfig(**KNOBS[name]), vocab_size, range(batch), device=device)

            def draw() -> Tensor:
                return sampler(logits)

        def judge() -> str | None:
            mask = allowed(logits, KNOBS[name])
            for _ in range(20):
                if not bool(mask.gather(1, torch.as_tensor(draw(), device=device).view(-1, 1)).all()):
                    return "it drew a token that its knob rules out"
            return None

        return Contestant(call=draw, check=judge, facts={"tokens": batch})

    return {name: (lambda name=name: build(name)) for name in KNOBS}  # type: ignore[misc]


@pytest.mark.parametrize(("batch", "vocab_size"), [(1, 65), (16, 50304)])
@pytest.mark.parametrize("contestant", list(KNOBS))
def test_samplers(rank: Any, settings: Settings, contestant: str, batch: int, vocab_size: int) -> None:
    rank(
        f"samplers B{batch} V{vocab_size}",
        contestant,
        lambda: entrants(batch, vocab_size, settings.device),
        subject="samplers",
    )
