"""What is tuned: places that an entry of a launch table is for, and the settings that are tried in each."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch

from fastchargpt.kernels.tables import Config

__all__ = ["BUCKETS", "Place", "candidates", "places"]

BUCKETS = (64, 128, 256, 512, 1024, None)  # the longest sequence that an entry serves; None is any
OPEN_LENGTH = 2048  # what the last bucket is measured at
MOST_KEYS_A_TILE = 128

# BLOCK_M, BLOCK_N, warps, stages. Forward and dq own BLOCK_M queries and walk BLOCK_N keys; dkdv and blocks own BLOCK_N
# and walk BLOCK_M; tile holds the whole sequence.
HALF = {
    "forward": (
        (16, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 2), (64, 128, 4, 2), (64, 128, 4, 3), (128, 32, 4, 2),
        (128, 32, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
        (128, 128, 8, 3),
    ),
    "decode": ((16, 32, 4, 1), (16, 32, 4, 2), (16, 64, 4, 1), (16, 64, 4, 2), (16, 64, 4, 3), (16, 128, 4, 2)),
    "tile": (
        (16, 16, 2, 1), (16, 16, 4, 1), (32, 32, 2, 1), (32, 32, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1),
        (128, 128, 8, 1),
    ),
    "blocks": (
        (16, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 2), (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2),
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 1), (32, 128, 8, 2),
        (64, 128, 8, 1), (64, 128, 8, 2),
    ),
    "dq": (
        (32, 32, 4, 1), (32, 32, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2), (128, 64, 4, 2),
        (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
    ),
    "dkdv": (
        (32, 32, 4, 1), (32, 32, 4, 2), (32, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (64, 64, 4, 1),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 4, 2), (32, 128, 8, 2), (32, 128, 8, 3),
        (64, 128, 4, 2), (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 2),
        (128, 128, 8, 2),
    ),
}  # fmt: skip
# With so few registers (the fifth number) one program more fits a processor; without a spill, each at some head_dim on
# sm_90.
CAPPED = {
    "forward": ((64, 64, 4, 2, 128), (64, 64, 4, 3, 128), (64, 32, 4, 2, 128), (64, 32, 4, 3, 80), (64, 32, 4, 3, 64)),
    "dq": ((64, 32, 4, 2, 96), (64, 32, 4, 3, 96), (64, 32, 4, 3, 72)),
    "dkdv": ((32, 64, 4, 2, 168),),
}
# Exact products are ordinary multiply-adds that hold both operands in registers: tiles must be small.
_EXACT = (
    (16, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 8, 1), (64, 32, 8, 1),
    (32, 64, 8, 1),
)  # fmt: skip
FP32 = {
    **dict.fromkeys(("forward", "dq", "dkdv", "blocks"), _EXACT),
    "decode": ((16, 16, 4, 1), (16, 16, 8, 1), (16, 32, 4, 1), (16, 32, 4, 2)),
    "tile": ((16, 16, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """What an entry of a table serves; the fields are the table's."""

    dtype: str
    head_dim: int
    max_length: int | None
    dropout: bool

    @property
    def length(self) -> int:
        """Of the sequences that it is measured on."""
        return OPEN_LENGTH if self.max_length is None else self.max_length

    def __str__(self) -> str:
        reach = "any T" if self.max_length is None else f"T up to {self.max_length}"
        return f"{self.dtype} D{self.head_dim}, {reach}{', dropout' if self.dropout else ''}"


def places(
    dtypes: Iterable[str],
    head_dims: Iterable[int],
    *,
    buckets: Iterable[int | None] = BUCKETS,
    dropout: Iterable[bool] = (False, True),
) -> Iterator[Place]:
    """Every place, what most people train with first."""
    for kind in itertools.product(dtypes, head_dims, dropout, buckets):
        yield Place(kind[0], kind[1], kind[3], kind[2])


def _least_registers(kernel: str, settings: tuple[int, ...], place: Place) -> int:
    """A thread's, without which nothing compiles: of what is added up, of the products beside it, and 24 more."""
    block_m, block_n, warps = settings[:3]
    head_dim = 1 << (place.head_dim - 1).bit_length()
    sums = {"forward": block_m, "dq": block_m, "dkdv": 2 * block_n}[kernel] * head_dim
    products = {"forward": 1, "dq": 2, "dkdv": 2}[kernel] * block_m * block_n
    return (sums + products) // (32 * warps) + 24


def candidates(kernel: str, place: Place) -> list[Config]:
    """The settings to try; those whose blocks reach far beyond the sequence are left out."""
    longest = 1 << (place.length - 1).bit_length()  # rounded up to a power of two
    settings: tuple[tuple[int, ...], ...] = (HALF if place.dtype == "half" else FP32)[kernel]
    if place.dtype == "half" and torch.version.hip is None:
        settings += tuple(each for each in CAPPED.get(kernel, ()) if _least_registers(kernel, each, place) <= each[4])
    found = [Config(kernel, m, n, warps, stages, cap[0] if cap else None) for m, n, warps, stages, *cap in settings]
    if kernel == "tile":
        return [config for config in found if longest <= MOST_KEYS_A_TILE and config.block_m == longest]
    return [config for config in found if max(config.block_m, config.block_n) <= max(64, longest)]
