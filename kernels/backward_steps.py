"""What the backward kernels are made of: delta and the log-sum-exp of some rows, dq of a block, dk and dv of a block.

The tiled kernels (flash_backward.py) and the one-launch kernel (flash_short.py) differ only in how many of these a
program does. The probabilities are recomputed from the saved log-sum-exp. Source: Dao et al., "FlashAttention" (2022),
appendix B.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import triton
import triton.language as tl

from .loops import keys_at_edge, loops, mask_in, one_loop, row_blocks, rows_at_edge, spans, waited_for
from .philox_tile import keep_tile
from .tiles import exponent, exponential, load_rows, load_tile, seen, tanh_of_scores

__all__ = ["ROWS_AT_ONCE", "delta_of_rows", "dkdv_of_block", "dq_of_block", "keep_rows", "lse_of_rows", "padded_rows"]

# The first launch leaves lse and delta as the second wants them: exponents, and so many rows a head that no block of
# rows ends outside. The second's inner loop then neither masks nor mends them, and loads several at once.
ROWS_AT_ONCE = tl.constexpr(128)


@triton.jit
def delta_of_rows(out, dout, dlse_head, start_m, tq, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr):
    """sum(out * dout) - dlse of each row, [BLOCK_M]."""
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= load_rows(dlse_head, start_m, tq, 0.0, BLOCK_M)
    return delta


@triton.jit
def lse_of_rows(lse_head, start_m, tq, dtype, BLOCK_M: tl.constexpr):
    """The rows' log-sum-exp as exponents, [BLOCK_M], +inf (probability 0) for rows not there or that see nothing."""
    lse = load_rows(lse_head, start_m, tq, float("inf"), BLOCK_M)
    return tl.where(lse == float("-inf"), float("inf"), exponent(lse, dtype))


@triton.jit
def padded_rows(tq):
    """Rows of a head in the scratch of the two launches: tq rounded up to whole blocks of the largest kind."""
    return tl.cdiv(tq, ROWS_AT_ONCE) * ROWS_AT_ONCE


@triton.jit
def keep_rows(lse_ptr, delta_ptr, batch_head, lse, delta, start_m, tq, BLOCK_M: tl.constexpr):
    """Store a block's lse (exponents, +inf for rows not there) and delta (0), and after the last block the padding."""
    before = tl.cast(batch_head, tl.int64) * padded_rows(tq)
    lse_head, delta_head = lse_ptr + before, delta_ptr + before
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_head + rows, lse)
    tl.store(delta_head + rows, delta)
    if start_m + BLOCK_M >= tq:
        rest = start_m + BLOCK_M + tl.arange(0, ROWS_AT_ONCE)
        there = rest < padded_rows(tq)
        tl.store(lse_head + rest, tl.full((ROWS_AT_ONCE,), float("inf"), dtype=tl.float32), mask=there)
        tl.store(delta_head + rest, tl.zeros((ROWS_AT_ONCE,), dtype=tl.float32), mask=there)


@triton.jit
def _dq_step(
    dq,  # [BLOCK_M, BLOCK_D]
    q,
    dout,
    lse,  # [BLOCK_M]
    delta,
    k_head,
    v_head,
    softmax,
    dropout,
    start_m,
    n,
    keys,
    MASK: tl.constexpr,
    FORM: tl.constexpr,
):
    """One block of keys, n .. n + BLOCK_N."""
    MASK_ROWS: tl.constexpr = FORM.RAGGED and MASK != "none"
    k = load_tile(k_head, n, softmax.tk, FORM.BLOCK_N, FORM.HEAD_DIM, FORM.BLOCK_D, MASK_ROWS)
    v = load_tile(v_head, n, softmax.tk, FORM.BLOCK_N, FORM.HEAD_DIM, FORM.BLOCK_D, MASK_ROWS)
    scores = tl.dot(q, tl.trans(k), input_precision=FORM.PRECISION)  # [BLOCK_M, BLOCK_N]
    if softmax.softcap is None:
        p = exponential(scores * softmax.scale - lse[:, None], q.dtype)
    else:
        tanh = tanh_of_scores(scores, softmax.scale, softmax.softcap, q.dtype)
        p = exponential(tanh * exponent(softmax.softcap, q.dtype) - lse[:, None], q.dtype)
    if MASK == "all" or (MASK == "edges" and keys_at_edge(n, keys, softmax)):
        p = tl.where(seen(start_m, n, softmax, FORM), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=FORM.PRECISION)  # [BLOCK_M, BLOCK_N]
    if FORM.DROPOUT:
        keep = keep_tile(dropout, start_m, n, FORM.BLOCK_M, FORM.BLOCK_N)
        ds = p * tl.where(keep, dp * dropout.keep_scale - delta[:, None], -delta[:, None])
    else:
        ds = p * (dp - delta[:, None])
    if softmax.softcap is not None:
        ds *= 1.0 - tanh * tanh
    return waited_for(tl.dot(ds.to(k.dtype), k, dq, input_precision=FORM.PRECISION), FORM)


@triton.jit
def dq_of_block(q, dout, lse, delta, k_head, v_head, softmax, dropout, start_m, keys, FORM: tl.constexpr):
    """dq / scale of a block of queries, [BLOCK_M, BLOCK_D]; `keys` are its `key_blocks`."""
    dq = tl.zeros((FORM.BLOCK_M, FORM.BLOCK_D), dtype=tl.float32)
    ONE_LOOP: tl.constexpr = one_loop()
    ranges = spans(keys, ONE_LOOP)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for n in range(ranges[loop][0], ranges[loop][1], FORM.BLOCK_N):
            dq = _dq_step(
                dq, q, dout, lse, delta, k_head, v_head, softmax, dropout, start_m, n, keys,
                mask_in(loop, ONE_LOOP), FORM,
            )  # fmt: skip
    return dq


@triton.jit
def _dkdv_step(
    dk,  # [BLOCK_N, BLOCK_D]
    dv,
    k,
    v,
    q_head,
    dout_head,
    out_head,
    lse_head,
    delta_head,
    dlse_head,
    softmax,
    dropout,
    start_n,
    m,
    rows,
    MASK: tl.constexpr,
    FORM: tl.constexpr,
    INLINE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """One block of queries, m .. m + BLOCK_M; the scores are held transposed, keys first."""
    q = load_tile(q_head, m, softmax.tq, FORM.BLOCK_M, FORM.HEAD_DIM, FORM.BLOCK_D, FORM.RAGGED)
    if FORM.NEGATE:
        q = -q
    dout = load_tile(dout_head, m, softmax.tq, FORM.BLOCK_M, FORM.HEAD_DIM, FORM.BLOCK_D, FORM.RAGGED)
    if INLINE_DELTA:
        lse = lse_of_rows(lse_head, m, softmax.tq, q.dtype, FORM.BLOCK_M)
        out = load_tile(out_head, m, softmax.tq, FORM.BLOCK_M, FORM.HEAD_DIM, FORM.BLOCK_D, FORM.RAGGED)
        delta = delta_of_rows(out, dout, dlse_head, m, softmax.tq, FORM.BLOCK_M, HAS_DLSE)
    else:  # from keep_rows
        lse = tl.load(lse_head + m + tl.arange(0, FORM.BLOCK_M))
        delta = tl.load(delta_head + m + tl.arange(0, FORM.BLOCK_M))
    scores_t = tl.dot(k, tl.trans(q), input_precision=FORM.PRECISION)  # [BLOCK_N, BLOCK_M]
    if softmax.softcap is None:
        p_t = exponential(scores_t * softmax.scale - lse[None, :], q.dtype)
    else:
        tanh_t = tanh_of_scores(scores_t, softmax.scale, softmax.softcap, q.dtype)
        p_t = exponential(tanh_t * exponent(softmax.softcap, q.dtype) - lse[None, :], q.dtype)
    if FORM.CAUSAL and (MASK == "all" or (MASK == "edges" and rows_at_edge(m, rows, softmax))):
        p_t = tl.where(tl.trans(seen(m, start_n, softmax, FORM)), p_t, 0.0)
    dp_t = tl.dot(v, tl.trans(dout), input_precision=FORM.PRECISION)
    if FORM.DROPOUT:
        keep_t = tl.trans(keep_tile(dropout, m, start_n, FORM.BLOCK_M, FORM.BLOCK_N))
        dropped_t = tl.where(keep_t, p_t, 0.0)
        dv = tl.dot(dropped_t.to(dout.dtype), dout, dv, input_precision=FORM.PRECISION)
        ds_t = p_t * tl.where(keep_t, dp_t * dropout.keep_scale - delta[None, :], -delta[None, :])
    else:
        dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=FORM.PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
    if softmax.softcap is not None:
        ds_t *= 1.0 - tanh_t * tanh_t
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=FORM.PRECISION)
    return waited_for(dk, FORM), dv  # which is done by then


@triton.jit
def dkdv_of_block(
    dk,
    dv,
    k,
    v,
    q_head,
    dout_head,
    out_head,
    lse_head,
    delta_head,
    dlse_head,
    softmax,
    dropout,
    start_n,
    FORM: tl.constexpr,
    INLINE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Add one query head's part to dk / |scale| and dv / keep_scale of a block of keys, [BLOCK_N, BLOCK_D].

    INLINE_DELTA: lse_head holds what the forward wrote, and delta is computed from out; else both are from `keep_rows`.
    """
    rows = row_blocks(start_n, softmax, FORM)
    ONE_LOOP: tl.constexpr = one_loop(FORM.DROPOUT)
    ranges = spans(rows, ONE_LOOP)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for m in range(ranges[loop][0], ranges[loop][1], FORM.BLOCK_M):
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_head, dout_head, out_head, lse_head, delta_head, dlse_head, softmax, dropout, start_n,
                m, rows, mask_in(loop, ONE_LOOP), FORM, INLINE_DELTA, HAS_DLSE,
            )  # fmt: skip
    return dk, dv
