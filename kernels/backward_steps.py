"""What the backward kernels are made of: delta and the log-sum-exp of some rows, dq of a block, dk and dv of a block.

The tiled kernels (flash_backward.py) and the one-launch kernel (flash_short.py) differ only in how many of these a
program does. The probabilities are recomputed from the saved log-sum-exp. Source: Dao et al., "FlashAttention" (2022),
appendix B.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import triton
import triton.language as tl

from .philox_tile import keep_tile
from .tiles import (
    causal_mask,
    exponent,
    exponential,
    key_blocks,
    load_rows,
    load_tile,
    loops,
    mask_in,
    one_loop,
    tanh_of_scores,
    waited_for,
    window_mask,
)

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
def lse_of_rows(lse_head, start_m, tq, like, BLOCK_M: tl.constexpr):
    """The rows' log-sum-exp as exponents, [BLOCK_M], +inf (probability 0) for rows not there or that see nothing."""
    lse = load_rows(lse_head, start_m, tq, float("inf"), BLOCK_M)
    return tl.where(lse == float("-inf"), float("inf"), exponent(lse, like))


@triton.jit
def padded_rows(tq):
    """Rows of a head in the scratch of the two launches: tq rounded up to whole blocks of the largest kind."""
    return tl.cdiv(tq, ROWS_AT_ONCE) * ROWS_AT_ONCE


@triton.jit
def keep_rows(lse_head, delta_head, lse, delta, start_m, tq, BLOCK_M: tl.constexpr):
    """Store a block's lse (exponents, +inf for rows not there) and delta (0), and after the last block the padding."""
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_head + rows, lse)
    tl.store(delta_head + rows, delta)
    if start_m + BLOCK_M >= tq:
        rest = start_m + BLOCK_M + tl.arange(0, ROWS_AT_ONCE)
        there = rest < padded_rows(tq)
        tl.store(lse_head + rest, tl.full((ROWS_AT_ONCE,), float("inf"), dtype=tl.float32), mask=there)
        tl.store(delta_head + rest, tl.zeros((ROWS_AT_ONCE,), dtype=tl.float32), mask=there)


@triton.jit
def _seen_weights(
    p,  # [BLOCK_M, BLOCK_N]
    start_m,
    n,
    tq,
    tk,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The probabilities, 0 where a query does not see a key."""
    if window is not None:
        p = tl.where(window_mask(start_m, n, tk - tq, window, BLOCK_M, BLOCK_N), p, 0.0)
    if CAUSAL:
        return tl.where(causal_mask(start_m, n, tk - tq, BLOCK_M, BLOCK_N), p, 0.0)
    else:
        return tl.where((tl.arange(0, BLOCK_N) < tk - n)[None, :], p, 0.0)


@triton.jit
def _dq_step(
    dq,  # [BLOCK_M, BLOCK_D]
    q,
    dout,
    lse,  # [BLOCK_M]
    delta,
    k_head,
    v_head,
    dropout,
    start_m,
    n,
    inside,
    full,
    tq,
    tk,
    scale,  # by which scores become exponents
    keep_scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # as in the forward
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One block of keys, n .. n + BLOCK_N."""
    k = load_tile(k_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, RAGGED and MASK != "none")
    v = load_tile(v_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, RAGGED and MASK != "none")
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if softcap is None:
        p = exponential(scores * scale - lse[:, None], q)
    else:
        tanh = tanh_of_scores(scores, scale, softcap, q)
        p = exponential(tanh * exponent(softcap, q) - lse[:, None], q)
    if MASK == "all":
        p = _seen_weights(p, start_m, n, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    elif MASK == "edges":
        edge = n >= full
        if window is not None:
            edge |= n < inside
        if edge:
            p = _seen_weights(p, start_m, n, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        keep = keep_tile(dropout, start_m, n, BLOCK_M, BLOCK_N)
        ds = p * tl.where(keep, dp * keep_scale - delta[:, None], -delta[:, None])
    else:
        ds = p * (dp - delta[:, None])
    if softcap is not None:
        ds *= 1.0 - tanh * tanh
    return waited_for(tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION))


@triton.jit
def dq_of_block(
    q,
    dout,
    lse,
    delta,
    k_head,
    v_head,
    dropout,
    start_m,
    tq,
    tk,
    scale,  # by which scores become exponents
    keep_scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """dq / scale of a block of queries, [BLOCK_M, BLOCK_D]; RAGGED: tk is no multiple of BLOCK_N."""
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    begin, inside, full, end = key_blocks(start_m, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    ONE_LOOP: tl.constexpr = one_loop()
    starts = (begin, inside, full)
    stops = (end if ONE_LOOP else inside, full, end)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for n in range(starts[loop], stops[loop], BLOCK_N):
            dq = _dq_step(
                dq, q, dout, lse, delta, k_head, v_head, dropout, start_m, n, inside, full, tq, tk, scale, keep_scale,
                window, softcap, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, mask_in(loop, ONE_LOOP), DROPOUT,
                PRECISION, RAGGED,
            )  # fmt: skip
    return dq


@triton.jit
def _seen_weights_t(p_t, start_n, m, tq, tk, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The probabilities of a causal block, keys first, [BLOCK_N, BLOCK_M], 0 where a query does not see a key."""
    last_seen = tl.arange(0, BLOCK_M) + (m + tk - tq - start_n)  # key <= row + tk - tq
    p_t = tl.where(last_seen[None, :] >= tl.arange(0, BLOCK_N)[:, None], p_t, 0.0)
    if window is not None:
        p_t = tl.where((last_seen - window)[None, :] <= tl.arange(0, BLOCK_N)[:, None], p_t, 0.0)
    return p_t


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
    dropout,
    start_n,
    m,
    full,
    last,
    tq,
    tk,
    scale,  # by which scores become exponents
    keep_scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # "none", "all", or "edges": blocks before `full` and from `last` on
    NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
    INLINE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """One block of queries, m .. m + BLOCK_M; the scores are held transposed, keys first."""
    q = load_tile(q_head, m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, RAGGED)
    if NEGATE:
        q = -q
    dout = load_tile(dout_head, m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, RAGGED)
    if INLINE_DELTA:
        lse = lse_of_rows(lse_head, m, tq, q, BLOCK_M)
        out = load_tile(out_head, m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, RAGGED)
        delta = delta_of_rows(out, dout, dlse_head, m, tq, BLOCK_M, HAS_DLSE)
    else:  # from keep_rows
        lse = tl.load(lse_head + m + tl.arange(0, BLOCK_M))
        delta = tl.load(delta_head + m + tl.arange(0, BLOCK_M))
    scores_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if softcap is None:
        p_t = exponential(scores_t * scale - lse[None, :], q)
    else:
        tanh_t = tanh_of_scores(scores_t, scale, softcap, q)
        p_t = exponential(tanh_t * exponent(softcap, q) - lse[None, :], q)
    if CAUSAL and MASK == "all":
        p_t = _seen_weights_t(p_t, start_n, m, tq, tk, window, BLOCK_M, BLOCK_N)
    elif CAUSAL and MASK == "edges":
        edge = m < full
        if window is not None:
            edge |= m >= last
        if edge:
            p_t = _seen_weights_t(p_t, start_n, m, tq, tk, window, BLOCK_M, BLOCK_N)
    dp_t = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if DROPOUT:
        keep_t = tl.trans(keep_tile(dropout, m, start_n, BLOCK_M, BLOCK_N))
        dropped_t = tl.where(keep_t, p_t, 0.0)
        dv = tl.dot(dropped_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds_t = p_t * tl.where(keep_t, dp_t * keep_scale - delta[None, :], -delta[None, :])
    else:
        dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds_t = p_t * (dp_t - delta[None, :])
    if softcap is not None:
        ds_t *= 1.0 - tanh_t * tanh_t
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return waited_for(dk), dv  # which is done by then


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
    dropout,
    start_n,
    tq,
    tk,
    scale,  # by which scores become exponents
    keep_scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
    INLINE_DELTA: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Add one query head's part to dk / |scale| and dv / keep_scale of a block of keys, [BLOCK_N, BLOCK_D].

    RAGGED: tq is no multiple of BLOCK_M. INLINE_DELTA: lse_head holds what the forward wrote, and delta is computed
    from out; else both are from `keep_rows`.
    """
    # Of the rows that see some of the keys, from begin to end, those from full to last see all of them.
    begin = 0
    full = 0
    last = tq
    end = tq
    if CAUSAL:
        begin = tl.maximum(0, start_n - (tk - tq)) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(0, start_n + BLOCK_N - 1 - (tk - tq)), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, tl.cdiv(tq, BLOCK_M) * BLOCK_M)
    if window is not None:
        end = tl.minimum(tq, tl.maximum(0, start_n + BLOCK_N - (tk - tq) + window))
        full = tl.minimum(full, tl.cdiv(end, BLOCK_M) * BLOCK_M)
        last = tl.minimum(end, tl.maximum(0, start_n + 1 - (tk - tq) + window)) // BLOCK_M * BLOCK_M
        last = tl.maximum(full, last)
    ONE_LOOP: tl.constexpr = one_loop(DROPOUT)
    starts = (begin, full, last)
    stops = (end if ONE_LOOP else full, last, end)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for m in range(starts[loop], stops[loop], BLOCK_M):
            dk, dv = _dkdv_step(
                dk, dv, k, v, q_head, dout_head, out_head, lse_head, delta_head, dlse_head, dropout, start_n, m, full,
                last, tq, tk, scale, keep_scale, window, softcap, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL,
                mask_in(loop, ONE_LOOP), NEGATE, DROPOUT, PRECISION, RAGGED, INLINE_DELTA, HAS_DLSE,
            )  # fmt: skip
    return dk, dv
