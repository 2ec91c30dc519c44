"""What every kernel does with a tile: find it, load it, store it, mask it, turn scores into probabilities.

A tile is BLOCK rows of one head, [BLOCK, BLOCK_D]; BLOCK_D is head_dim rounded up to a power of two of at least 16, and
the columns beyond HEAD_DIM hold zeros. Offsets are 64-bit, positions in a sequence and masks are 32-bit: a 64-bit mask
makes the inner loop a third longer.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda, is_hip
from triton.runtime.jit import constexpr_function

__all__ = [
    "LN2",
    "LOWEST",
    "aligned",
    "causal_mask",
    "exponent",
    "exponential",
    "head_of",
    "key_blocks",
    "load_rows",
    "load_tile",
    "loops",
    "mask_in",
    "natural",
    "one_loop",
    "store_tile",
    "tanh_of_scores",
    "waited_for",
    "window_mask",
]

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): the hardware's exponential is in base 2
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: from it -inf can be taken, and gives no NaN


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
    """One head of a (B, H, T, D) tensor, for load_tile and store_tile: (first element, stride_t, stride_d)."""
    stride_b, stride_h, stride_t, stride_d = aligned(strides, ALIGN)
    return ptr + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h, stride_t, stride_d


@triton.jit
def _tile_pointers(head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    ptr, stride_t, stride_d = head
    rows = tl.arange(0, BLOCK).to(tl.int64)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    return ptr + tl.cast(start, tl.int64) * stride_t + (rows[:, None] * stride_t + columns[None, :] * stride_d)


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
def store_tile(target, tile, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] as rows start .. start + BLOCK of a head, what lies beyond it left out."""
    ptrs = _tile_pointers(target, start, BLOCK, BLOCK_D)
    mask_rows = (tl.arange(0, BLOCK) < length - start)[:, None]
    mask_columns = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptrs, tile.to(target[0].dtype.element_ty), mask=mask_rows & mask_columns)


@triton.jit
def load_rows(ptr, start, length, other, BLOCK: tl.constexpr):
    """One number a row, rows start .. start + BLOCK of a contiguous (T,) vector, [BLOCK]; `other` beyond `length`."""
    rows = tl.arange(0, BLOCK)
    return tl.load(ptr + start + rows, mask=rows < length - start, other=other)


@constexpr_function
def one_loop(keys_first_with_dropout=False):
    """Whether blocks with a mask and blocks without one go through one loop, the mask behind a branch.

    A loop of their own begins with an empty pipeline. But where scores are made by Ampere's instruction (sm_80 to sm_89
    and sm_120), Triton only finds out that a product takes them if no branch is between, and else they go to it through
    shared memory. On AMD's, scores that lie keys first get a layout in which the draws of a Philox call are apart.
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
def waited_for(product):
    """A product in a loop's last line, as it is, [BLOCK_M, BLOCK_N], that the next round does not find under way.

    Triton lets it run on into the next round on Hopper. There ptxas sees the registers of the round's first product
    set while a product is under way, and makes every single matrix instruction of the loop wait for the one before
    (C7515). So it is made to look used here: LLVM, later on, finds that nothing is done to it.
    """
    if cuda_capability_geq(9) and not cuda_capability_geq(10):
        minus_zero = tl.full(product.shape, 1 << 31, tl.uint32).to(tl.float32, bitcast=True)  # tl.full takes it for 0
        return tl.fma(product, tl.full(product.shape, 1.0, tl.float32), minus_zero)
    else:
        return product


@triton.jit
def causal_mask(first_row, first_key, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where a query sees a key, [BLOCK_M, BLOCK_N]: key <= row + shift, with shift = Tk - Tq (bottom-right)."""
    last_seen = tl.arange(0, BLOCK_M) + (first_row + shift - first_key)
    return last_seen[:, None] >= tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def key_blocks(start_m, tq, tk, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, inside, full, end) of the blocks of keys that a block of queries sees some of, from begin to end.

    From inside to full are those of which every query sees every key. All but end are multiples of BLOCK_N.
    """
    if CAUSAL:
        end = tl.minimum(tk, start_m + BLOCK_M + tk - tq)  # keys that the last row sees
        full = tl.minimum(tk, tl.maximum(0, start_m + 1 + tk - tq)) // BLOCK_N * BLOCK_N  # that the first row sees
    else:
        end = tk
        full = tk // BLOCK_N * BLOCK_N
    if window is None:
        return 0, 0, full, end
    else:
        first = start_m + tk - tq - window  # key that the first row sees, and `inside` is that of the last one
        begin = tl.maximum(0, first) // BLOCK_N * BLOCK_N
        inside = tl.cdiv(tl.maximum(0, first + BLOCK_M - 1), BLOCK_N) * BLOCK_N
        inside = tl.minimum(inside, tl.cdiv(tl.maximum(0, end), BLOCK_N) * BLOCK_N)
        return begin, inside, tl.maximum(inside, full), end


@triton.jit
def window_mask(first_row, first_key, shift, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where a key is no more than `window` behind a query, [BLOCK_M, BLOCK_N]: key >= row + shift - window."""
    first_seen = tl.arange(0, BLOCK_M) + (first_row + shift - window - first_key)
    return first_seen[:, None] <= tl.arange(0, BLOCK_N)[None, :]


# Exponents of 16-bit inputs are held in base 2: exp2(scores * scale - lse) is one multiply-add and one exponential.
# Those of fp32 inputs are held in natural units and converted last: log2(e) rounded into every term would cost a bit.


@triton.jit
def exponent(x, like):
    """A number in natural units (a scale, a log-sum-exp) in the units that tiles in the dtype of `like` use."""
    if like.dtype == tl.float32:
        return x
    else:
        return x * LOG2E


@triton.jit
def natural(x, like):
    """The inverse of `exponent`."""
    if like.dtype == tl.float32:
        return x
    else:
        return x * LN2


@triton.jit
def exponential(x, like):
    """e to the power of what `exponent` gave."""
    if like.dtype == tl.float32:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def tanh_of_scores(scores, scale, softcap, like):
    """tanh(scores * scale / softcap), fp32, where `scale` makes exponents of scores and softcap is in natural units.

    Times `exponent(softcap)` these are exponents between plus and minus softcap. tanh is made of the exponential that
    every target has. What it loses near zero, where 1 is taken from 1, is less than the rounding of a 16-bit score;
    for fp32 a polynomial takes over there (Cephes' tanhf, relative error below 1e-7).
    """
    ratio = scale / exponent(softcap, like)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (ratio * (2.0 * LOG2E))))
    if like.dtype == tl.float32:
        x = scores * ratio
        z = x * x
        tail = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        tanh = tl.where(z < 0.390625, x + x * z * (tail - 3.33332819422e-1), tanh)
    return tanh
