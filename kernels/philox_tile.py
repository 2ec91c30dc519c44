"""Dropout bits inside a kernel: the Triton half of philox.py, bit for bit the same."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import philox

__all__ = ["Dropout", "keep_tile"]

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(philox.MULTIPLIER_A), tl.constexpr(philox.MULTIPLIER_B)
WEYL_A, WEYL_B = tl.constexpr(philox.WEYL_A), tl.constexpr(philox.WEYL_B)


class Dropout(NamedTuple):
    """What decides which weights of a head are kept, and what becomes of those."""

    seed_ptr: Any
    batch: Any
    head: Any
    threshold: Any
    keep_scale: Any


@triton.jit
def keep_tile(dropout, first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile of scores are kept, bool [BLOCK_M, BLOCK_N]; it begins at multiples of 16.

    Everything is elementwise between broadcasts, so the compiler computes it in whatever layout the scores have: no
    draw goes through shared memory, and where a layout splits the eight draws of a call, each holder makes the call.
    """
    seed = tl.load(dropout.seed_ptr).to(tl.uint64, bitcast=True)
    key_a = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_b = (seed >> 32).to(tl.uint32)
    # Dimensions: a row's block, its half and its place there; a column's block, half, pair, and place in the pair.
    rows = (tl.arange(0, BLOCK_M // 2) + first_row // 2).to(tl.uint32)
    columns = (tl.arange(0, BLOCK_N // 4) + first_column // 4).to(tl.uint32)
    nothing = tl.zeros((BLOCK_M // 16, 1, 8, BLOCK_N // 16, 1, 4, 1), dtype=tl.uint32)
    c0 = nothing + tl.reshape(columns, (1, 1, 1, BLOCK_N // 16, 1, 4, 1))
    c1 = nothing + tl.reshape(rows, (BLOCK_M // 16, 1, 8, 1, 1, 1, 1))
    c2 = nothing + tl.cast(dropout.head, tl.uint32)
    c3 = nothing + tl.cast(dropout.batch, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        product_a = c0.to(tl.uint64) * tl.full((), MULTIPLIER_A, tl.uint64)
        product_b = c2.to(tl.uint64) * tl.full((), MULTIPLIER_B, tl.uint64)
        c0 = (product_b >> 32).to(tl.uint32) ^ c1 ^ key_a
        c2 = (product_a >> 32).to(tl.uint32) ^ c3 ^ key_b
        c1 = product_b.to(tl.uint32)
        c3 = product_a.to(tl.uint32)
        key_a = (key_a + tl.full((), WEYL_A, tl.uint32)).to(tl.uint32)
        key_b = (key_b + tl.full((), WEYL_B, tl.uint32)).to(tl.uint32)
    two = tl.arange(0, 2)
    lower = tl.reshape(two, (1, 2, 1, 1, 1, 1, 1)) != 0
    right = tl.reshape(two, (1, 1, 1, 1, 2, 1, 1)) != 0
    words = tl.where(lower, tl.where(right, c3, c2), tl.where(right, c1, c0))
    draws = words << tl.reshape(16 - 16 * two, (1, 1, 1, 1, 1, 1, 2)).to(tl.uint32)  # in the upper half of a word
    return tl.reshape(draws, (BLOCK_M, BLOCK_N)) >= (tl.cast(dropout.threshold, tl.uint32) << 16)
