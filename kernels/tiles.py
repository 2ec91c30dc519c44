"""What every kernel does with a tile: find it, load it, store it, mask it, turn scores into probabilities.

A tile is BLOCK rows of one head, [BLOCK, BLOCK_D]; BLOCK_D is head_dim rounded up to a power of two of at least 16, and
the columns beyond HEAD_DIM hold zeros. Offsets are 64-bit, positions in a sequence and masks are 32-bit: a 64-bit mask
makes the inner loop a third longer.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

from .programs import compiled_for

__all__ = [
    "LN2",
    "LOWEST",
    "Form",
    "Head",
    "Softmax",
    "aligned",
    "causal_mask",
    "decayed",
    "exponent",
    "exponential",
    "head_of",
    "load_rows",
    "load_tile",
    "natural",
    "no_part_sums",
    "part_sums",
    "prefetch_tile",
    "seen",
    "store_tile",
    "tanh_of_scores",
    "whole_sums",
]

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): the hardware's exponential is in base 2
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: from it -inf can be taken, and gives no NaN


class Form(NamedTuple):
    """What a kernel is compiled for, passed on whole: a constant of constants."""

    HEAD_DIM: Any
    BLOCK_D: Any
    BLOCK_M: Any  # queries a tile of scores
    BLOCK_N: Any  # keys
    CAUSAL: Any
    NEGATE: Any  # scale is negative: q is negated, and |scale| used
    DROPOUT: Any
    PRECISION: Any
    RAGGED: Any  # the length that the loop goes along is no multiple of its blocks


class Softmax(NamedTuple):
    """What makes weights of products, and which of them count."""

    tq: Any
    tk: Any
    scale: Any  # by which scores become exponents, not 0: a mask's -inf is multiplied by it
    window: Any  # keys that a query sees behind it; None, which no machine code is left of, is all
    softcap: Any  # what bounds the scores, or None


class Head(NamedTuple):
    """One head of a (B, H, T, D) tensor, for load_tile and store_tile."""

    ptr: Any  # to its first element
    stride_t: Any
    stride_d: Any


# Assembly (PTX) that asks the L2 cache for the 32 bytes (SECTOR_BITS) around an address, where the flag is not 0. It
# has to give something, and gives 0.
PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }")
SECTOR_BITS = tl.constexpr(8 * 32)


@triton.jit
def aligned(strides, ALIGN: tl.constexpr):
    """The strides of a (B, H, T, D) tensor as they are; the compiler now sees that ALIGN (launch.py) divides them."""
    stride_b, stride_h, stride_t, stride_d = strides
    if ALIGN == 1 or ALIGN == 16:
        return stride_b, stride_h, stride_t, stride_d
    else:
        return (
            tl.cast(stride_b, tl.int64) // ALIGN * ALIGN,
            tl.cast(stride_h, tl.int64) // ALIGN * ALIGN,
            tl.cast(stride_t, tl.int64) // ALIGN * ALIGN,
            stride_d,
        )


@triton.jit
def head_of(ptr, strides, batch, head, ALIGN: tl.constexpr):
    """The Head of a (B, H, T, D) tensor."""
    stride_b, stride_h, stride_t, stride_d = aligned(strides, ALIGN)
    return Head(ptr + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h, stride_t, stride_d)


@triton.jit
def _tile_pointers(head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    first = head.ptr + tl.cast(start, tl.int64) * head.stride_t
    return first + (rows[:, None] * head.stride_t + columns[None, :] * head.stride_d)


@triton.jit
def load_tile(
    source, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Rows start .. start + BLOCK of a head, [BLOCK, BLOCK_D]; zeros beyond `length` rows and HEAD_DIM columns.

    MASK_ROWS may be False only where start + BLOCK <= length.
    """
    ptrs = _tile_pointers(source, start, BLOCK, BLOCK_D)
    mask_rows = (tl.arange(0, BLOCK) < length - start)[:, None]
    mask_columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASK_ROWS:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs, mask=mask_rows, other=0.0)
        else:
            return tl.load(ptrs, mask=mask_rows & mask_columns, other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=mask_columns, other=0.0)


@triton.jit
def prefetch_tile(source, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Ask for rows start .. start + BLOCK of a head, so that the L2 cache has them, or soon will, when they are loaded.

    For what a loop loads first: what stands before the loop is waited for before its own first loads are made, and only
    then would these begin to wait for memory. On Hopper, where it was timed.
    """
    if compiled_for(9, below=10):
        APART: tl.constexpr = SECTOR_BITS // source.ptr.dtype.element_ty.primitive_bitwidth
        rows = tl.arange(0, BLOCK)
        columns = tl.arange(0, BLOCK_D // APART) * APART
        first = source.ptr + tl.cast(start, tl.int64) * source.stride_t
        offsets = rows.to(tl.int64)[:, None] * source.stride_t + columns.to(tl.int64)[None, :] * source.stride_d
        there = (rows < length - start)[:, None] & (columns < HEAD_DIM)[None, :]
        flags = there.to(tl.int32)
        tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [first + offsets, flags], tl.int32, is_pure=False, pack=1)


@triton.jit
def store_tile(target, tile, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] as rows start .. start + BLOCK of a head, what lies beyond it left out."""
    ptrs = _tile_pointers(target, start, BLOCK, BLOCK_D)
    mask_rows = (tl.arange(0, BLOCK) < length - start)[:, None]
    mask_columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(target.ptr.dtype.element_ty), mask=mask_rows & mask_columns)


@triton.jit
def load_rows(ptr, start, length, other, BLOCK: tl.constexpr):
    """One number a row, rows start .. start + BLOCK of a contiguous (T,) vector, [BLOCK]; `other` beyond `length`."""
    rows = tl.arange(0, BLOCK)
    return tl.load(ptr + start + rows, mask=rows < length - start, other=other)


@triton.jit
def causal_mask(first_row, first_key, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where a query sees a key, [BLOCK_M, BLOCK_N]: key <= row + shift, with shift = Tk - Tq (bottom-right)."""
    last_seen = tl.arange(0, BLOCK_M) + (first_row + shift - first_key)
    return last_seen[:, None] >= tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def seen(start_m, n, softmax, FORM: tl.constexpr):
    """True where a query sees a key, [BLOCK_M, BLOCK_N]; of rows beyond tq it may be True for keys beyond tk."""
    shift = softmax.tk - softmax.tq
    if FORM.CAUSAL:
        mask = causal_mask(start_m, n, shift, FORM.BLOCK_M, FORM.BLOCK_N)
    else:
        mask = (tl.arange(0, FORM.BLOCK_N) < softmax.tk - n)[None, :]
    if softmax.window is not None:  # a key no more than `window` behind: key >= row + shift - window
        first_seen = tl.arange(0, FORM.BLOCK_M) + (start_m + shift - softmax.window - n)
        mask &= first_seen[:, None] <= tl.arange(0, FORM.BLOCK_N)[None, :]
    return mask


# On Hopper four lanes hold a row of a tile of scores, two of every eight keys each, and a sum that is only needed once
# the loop is over need not leave them before: it is kept in eight parts. Elsewhere a lane has a whole row (sm_100), or
# more is lost by the further registers than is gained.


@constexpr_function
def parts_of_sums():
    """How many there are; None stands for whole sums."""
    return 8 if compiled_for(9, below=10) else None


@triton.jit
def no_part_sums(BLOCK_M: tl.constexpr):
    """Where `part_sums` are added up: zeros."""
    PARTS: tl.constexpr = parts_of_sums()
    if PARTS is None:
        return tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        return tl.zeros((BLOCK_M, PARTS), dtype=tl.float32)


@triton.jit
def part_sums(tile):
    """The sums of the rows, [BLOCK_M], or of their parts, [BLOCK_M, `parts_of_sums`]."""
    PARTS: tl.constexpr = parts_of_sums()
    if PARTS is None:
        return tl.sum(tile, 1)
    else:
        return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // PARTS, PARTS)), 1)


@triton.jit
def decayed(sums, decay):
    """`part_sums` times a factor for each row."""
    if parts_of_sums() is None:
        return sums * decay
    else:
        return sums * decay[:, None]


@triton.jit
def whole_sums(sums):
    """The sums of the rows, [BLOCK_M], of their `part_sums`."""
    if parts_of_sums() is None:
        return sums
    else:
        return tl.sum(sums, 1)


# Exponents of 16-bit inputs are held in base 2: exp2(scores * scale - lse) is one multiply-add and one exponential.
# Those of fp32 inputs are held in natural units and converted last: log2(e) rounded into every term would cost a bit.


@triton.jit
def exponent(x, dtype):
    """A number in natural units (a scale, a log-sum-exp) in the units that tiles of this dtype use."""
    if dtype == tl.float32:
        return x
    else:
        return x * LOG2E


@triton.jit
def natural(x, dtype):
    """The inverse of `exponent`."""
    if dtype == tl.float32:
        return x
    else:
        return x * LN2


@triton.jit
def exponential(x, dtype):
    """e to the power of what `exponent` gave."""
    if dtype == tl.float32:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def tanh_of_scores(scores, scale, softcap, dtype):
    """tanh(scores * scale / softcap), fp32, where `scale` makes exponents of scores and softcap is in natural units.

    Times `exponent(softcap)` these are exponents between plus and minus softcap. tanh is made of the exponential that
    every target has. What it loses near zero, where 1 is taken from 1, is less than the rounding of a 16-bit score;
    for fp32 a polynomial takes over there (Cephes' tanhf, relative error below 1e-7).
    """
    ratio = scale / exponent(softcap, dtype)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (ratio * (2.0 * LOG2E))))
    if dtype == tl.float32:
        x = scores * ratio
        z = x * x
        tail = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        tanh = tl.where(z < 0.390625, x + x * z * (tail - 3.33332819422e-1), tanh)
    return tanh
