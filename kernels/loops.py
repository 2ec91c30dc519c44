"""Which blocks a program goes through, which of them need a mask, and how many loops that makes.

Source: Dao et al., "FlashAttention" (2022), of the blocks; what the loops are for is said below.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda, is_hip
from triton.runtime.jit import constexpr_function

__all__ = [
    "Blocks",
    "key_blocks",
    "keys_at_edge",
    "loops",
    "mask_in",
    "one_loop",
    "row_blocks",
    "rows_at_edge",
    "spans",
    "waited_for",
]


class Blocks(NamedTuple):
    """Where the blocks are that a program sees some of, from begin to end; those it sees all of are bare of a mask.

    begin and bare_begin are multiples of a block's length.
    """

    begin: Any
    bare_begin: Any
    bare_end: Any
    end: Any


@triton.jit
def key_blocks(start_m, softmax, FORM: tl.constexpr):
    """The Blocks of keys that a block of queries sees some of."""
    shift = softmax.tk - softmax.tq
    if FORM.CAUSAL:
        end = tl.minimum(softmax.tk, start_m + FORM.BLOCK_M + shift)  # keys that the last row sees
        bare_end = tl.minimum(softmax.tk, tl.maximum(0, start_m + 1 + shift))  # that the first row sees
    else:
        end = softmax.tk
        bare_end = softmax.tk
    bare_end = bare_end // FORM.BLOCK_N * FORM.BLOCK_N
    if softmax.window is None:
        return Blocks(0, 0, bare_end, end)
    else:
        oldest = start_m + shift - softmax.window  # key that the first row sees
        begin = tl.maximum(0, oldest) // FORM.BLOCK_N * FORM.BLOCK_N
        bare_begin = tl.cdiv(tl.maximum(0, oldest + FORM.BLOCK_M - 1), FORM.BLOCK_N) * FORM.BLOCK_N
        bare_begin = tl.minimum(bare_begin, tl.cdiv(tl.maximum(0, end), FORM.BLOCK_N) * FORM.BLOCK_N)
        return Blocks(begin, bare_begin, tl.maximum(bare_begin, bare_end), end)


@triton.jit
def keys_at_edge(n, blocks, softmax):
    """Whether a block of keys needs a mask."""
    return n >= blocks.bare_end or (softmax.window is not None and n < blocks.bare_begin)


@triton.jit
def row_blocks(start_n, softmax, FORM: tl.constexpr):
    """The Blocks of rows that see some of a block of keys."""
    shift = softmax.tk - softmax.tq
    begin = 0
    bare_begin = 0
    bare_end = softmax.tq
    end = softmax.tq
    if FORM.CAUSAL:  # the first row that sees the first key, and the first that sees the last one
        begin = tl.maximum(0, start_n - shift) // FORM.BLOCK_M * FORM.BLOCK_M
        bare_begin = tl.cdiv(tl.maximum(0, start_n + FORM.BLOCK_N - 1 - shift), FORM.BLOCK_M) * FORM.BLOCK_M
        bare_begin = tl.minimum(bare_begin, tl.cdiv(softmax.tq, FORM.BLOCK_M) * FORM.BLOCK_M)
    if softmax.window is not None:
        behind = start_n + 1 - shift + softmax.window  # rows from which on the first key is no longer seen
        end = tl.minimum(softmax.tq, tl.maximum(0, behind + FORM.BLOCK_N - 1))
        bare_begin = tl.minimum(bare_begin, tl.cdiv(end, FORM.BLOCK_M) * FORM.BLOCK_M)
        bare_end = tl.minimum(end, tl.maximum(0, behind)) // FORM.BLOCK_M * FORM.BLOCK_M
        bare_end = tl.maximum(bare_begin, bare_end)
    return Blocks(begin, bare_begin, bare_end, end)


@triton.jit
def rows_at_edge(m, blocks, softmax):
    """Whether a block of rows needs a mask."""
    return m < blocks.bare_begin or (softmax.window is not None and m >= blocks.bare_end)


@constexpr_function
def one_loop(keys_first_with_dropout=False):
    """Whether blocks with a mask and blocks without one go through one loop, the mask behind a branch.

    A loop of their own begins with an empty pipeline. On Hopper the branch does more: a round's last product runs on
    into the next round, and in code without a branch ptxas, which sees the registers of the next product set meanwhile,
    makes every single matrix instruction of the loop wait for the one before (its note C7515). But where scores are
    made by Ampere's instruction (sm_80 to sm_89 and sm_120), Triton only finds out that a product takes them if no
    branch is between, and else they go to it through shared memory. On AMD's, scores that lie keys first get a layout
    in which the draws of a Philox call are apart.
    """
    if is_cuda():
        return cuda_capability_geq(9) and not cuda_capability_geq(12)
    return not (is_hip() and keys_first_with_dropout)


@constexpr_function
def loops(one):
    """How many loops there are: one, or one before the blocks without a mask, one for these and one after them."""
    return 1 if one else 3


@constexpr_function
def mask_in(loop, one):
    """MASK in one of the `loops`: "none", "all" (blocks have one), or "edges" (those at the edges have)."""
    return "edges" if one else ("none" if loop == 1 else "all")


@triton.jit
def spans(blocks, ONE: tl.constexpr):
    """(start, stop) of each of the `loops`."""
    if ONE:
        return ((blocks.begin, blocks.end),)
    else:
        return (
            (blocks.begin, blocks.bare_begin),
            (blocks.bare_begin, blocks.bare_end),
            (blocks.bare_end, blocks.end),
        )


@triton.jit
def waited_for(product, FORM: tl.constexpr):
    """A product in a loop's last line, as it is, [BLOCK_M or BLOCK_N, BLOCK_D].

    Where heads are narrower than their tiles, ptxas serializes Hopper's instructions in spite of a branch (`one_loop`),
    if the next round finds the product under way. There it is made to look used here, which Triton waits for; LLVM,
    later on, finds that nothing is done to it.
    """
    NARROW: tl.constexpr = FORM.HEAD_DIM != FORM.BLOCK_D
    if NARROW and cuda_capability_geq(9) and not cuda_capability_geq(10):
        minus_zero = tl.full(product.shape, 1 << 31, tl.uint32).to(tl.float32, bitcast=True)  # tl.full takes it for 0
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), minus_zero)
    else:
        return product
