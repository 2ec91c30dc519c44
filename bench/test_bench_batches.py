"""Batches: one gather from narrow tokens, beside the usual loop that slices and stacks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastchargpt.batches import TokenBatches
from fastchargpt.bench.contest import Contestant
from fastchargpt.bench.settings import Settings

SIZES = [(12, 64), (64, 256)]
TOKENS = 1_000_000

Batch = tuple[Tensor, Tensor]


def slice_and_stack(tokens: Tensor, batch_size: int, block_size: int, device: torch.device) -> Batch:
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    x = torch.stack([tokens[start : start + block_size].long() for start in starts])
    y = torch.stack([tokens[start + 1 : start + 1 + block_size].long() for start in starts])
    return x.to(device), y.to(device)


def entrants(batch_size: int, block_size: int, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    tokens = torch.randint(65, (TOKENS,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    facts = {"tokens": batch_size * block_size, "side": "ours"}

    def judge(draw: Callable[[], Batch]) -> str | None:
        torch.manual_seed(5)
        got = draw()
        torch.manual_seed(5)
        want = slice_and_stack(tokens, batch_size, block_size, device)
        right = all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(got, want, strict=True))
        return None if right else "the same seed gives another batch than slicing by hand"

    def contestant(draw: Callable[[], Batch]) -> Contestant:
        return Contestant(call=draw, check=lambda: judge(draw), facts=facts)

    def random() -> Contestant:
        return contestant(TokenBatches(tokens, batch_size=batch_size, block_size=block_size, device=device).next_batch)

    def epochs() -> Contestant:
        batches = TokenBatches(
            tokens, batch_size=batch_size, block_size=block_size, device=device, order="epochs", seed=1
        )

        def judge_epoch() -> str | None:
            x, y = batches.next_batch()
            return None if torch.equal(x[:, 1:], y[:, :-1]) else "y is not x, one token on"

        return Contestant(call=batches.next_batch, check=judge_epoch, facts=facts)

    def stacked() -> Contestant:
        drawn = contestant(lambda: slice_and_stack(tokens, batch_size, block_size, device))
        return replace(drawn, facts={**facts, "side": "peer"})

    return {
        "random": random,
        "epochs": epochs,
        "slice-and-stack": stacked,
    }


@pytest.mark.parametrize(("batch_size", "block_size"), SIZES)
@pytest.mark.parametrize("contestant", ["random", "epochs", "slice-and-stack"])
def test_batches(rank: Any, settings: Settings, contestant: str, batch_size: int, block_size: int) -> None:
    rank(
        f"batches B{batch_size} T{block_size}",
        contestant,
        lambda: entrants(batch_size, block_size, settings.device),
        subject="batches",
    )
