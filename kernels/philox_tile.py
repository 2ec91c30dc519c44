"""Dropout bits inside a kernel: the Triton half of philox.py, bit for bit the same."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import triton
import triton.language as tl

from . import philox

__all__ = ["keep_tile"]

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(philox.MULTIPLIER_A), tl.constexpr(philox.MULTIPLIER_B)
WEYL_A, WEYL_B = tl.constexpr(philox.WEYL_A), tl.constexpr(philox.WEYL_B)


@triton.jit
def keep_tile(seed_ptr, batch, head, first_row, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile of scores are kept, bool [BLOCK_M, BLOCK_N]. `first_column` is a multiple of 4."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    key_a = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_b = (seed >> 32).to(tl.uint32)
    groups = tl.arange(0, BLOCK_N // 4) + first_column // 4
    rows = tl.arange(0, BLOCK_M) + first_row
    nothing = tl.zeros((BLOCK_M, BLOCK_N // 4), dtype=tl.uint32)
    c0 = nothing + groups.to(tl.uint32)[None, :]
    c1 = nothing + rows.to(tl.uint32)[:, None]
    c2 = nothing + tl.cast(head, tl.uint32)
    c3 = nothing + tl.cast(batch, tl.uint32)
    multiplier_a = tl.full((), MULTIPLIER_A, tl.uint32)
    multiplier_b = tl.full((), MULTIPLIER_B, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        next_0 = tl.umulhi(c2, nothing + multiplier_b) ^ c1 ^ key_a
        next_2 = tl.umulhi(c0, nothing + multiplier_a) ^ c3 ^ key_b
        c1 = c2 * multiplier_b
        c3 = c0 * multiplier_a
        c0 = next_0
        c2 = next_2
        key_a = (key_a + tl.full((), WEYL_A, tl.uint32)).to(tl.uint32)
        key_b = (key_b + tl.full((), WEYL_B, tl.uint32)).to(tl.uint32)
    # The four words are those of four neighbouring columns: [BLOCK_M, BLOCK_N // 4, 2, 2] read in order.
    limit = tl.cast(threshold, tl.uint32)
    even = tl.join((c0 >> 1) >= limit, (c2 >> 1) >= limit)
    odd = tl.join((c1 >> 1) >= limit, (c3 >> 1) >= limit)
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))
