"""What each of several processes gets: the windows of an evaluation, and its sequences of a step."""

from typing import Any

import numpy as np
import pytest
import torch

from fastchargpt.batches import eval_batches
from fastchargpt.config import IGNORE_INDEX
from fastchargpt.errors import ConfigError
from fastchargpt.parallel import Parallel


@pytest.mark.parametrize("max_batches", [None, 2])
@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("n", [9, 41, 200])
def test_processes_share_out_the_windows(n: int, world_size: int, max_batches: int | None) -> None:
    tokens = np.arange(n, dtype=np.uint16)

    def seen(rank: int, world_size: int) -> tuple[list[tuple[int, int]], int, set[Any]]:
        pairs: list[tuple[int, int]] = []
        batches = list(eval_batches(tokens, 8, 5, "cpu", max_batches, rank, world_size))
        for x, y in batches:
            pairs += zip(x[y != IGNORE_INDEX].tolist(), y[y != IGNORE_INDEX].tolist(), strict=True)
        return pairs, len(batches), {x.shape for x, _ in batches} | {y.shape for _, y in batches}

    shares = [seen(rank, world_size) for rank in range(world_size)]
    assert sorted(pair for share in shares for pair in share[0]) == sorted(seen(0, 1)[0])
    # every process runs the model equally often, on equal shapes: under fsdp a run of the model takes all of them
    assert len({share[1] for share in shares}) == 1
    assert len(set.union(*(share[2] for share in shares))) == 1


def shared(world_size: int) -> Parallel:
    return Parallel("ddp", device=torch.device("cpu"), world_size=world_size, reason="test")


def test_how_a_step_is_shared() -> None:
    for batch_size in range(1, 13):
        for accumulation in range(1, 9):
            for world_size in (1, 2, 3, 4, 6, 8):
                try:
                    rows, parts = shared(world_size).share(batch_size, accumulation)
                except ConfigError:
                    assert batch_size * accumulation % world_size
                    continue
                assert rows * parts * world_size == batch_size * accumulation
                assert rows <= batch_size
                assert parts <= accumulation
    assert shared(8).share(12, 40) == (12, 5)  # GPT-2's recipe on eight GPUs, as nanoGPT shares it
    with pytest.raises(
        ConfigError, match="8 processes cannot share a step of 1 x 12 sequences equally: make batch_size"
    ):
        shared(8).share(12, 1)
