"""Forward: tiled causal attention with an online softmax, one launch for any sequence length.

One program takes BLOCK_M queries of one head over all the keys they see: first the blocks of keys that all of them see,
without a mask, then those on the diagonal. A sliding window begins further to the right, with the blocks that only some
of them see. RAGGED: tk is no multiple of BLOCK_N.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import functools

import torch
import triton
import triton.language as tl

from .launch import LAUNCHES_KEPT, Launch, Problem, Strides
from .philox_tile import keep_tile
from .tiles import (
    LN2,
    LOWEST,
    causal_mask,
    exponent,
    exponential,
    head_of,
    key_blocks,
    load_tile,
    loops,
    mask_in,
    natural,
    one_loop,
    store_tile,
    tanh_of_scores,
    waited_for,
    window_mask,
)
from .tuning import Config

__all__ = ["attention_forward_kernel", "forward"]


@triton.jit
def _seen_scores(
    scores,  # [BLOCK_M, BLOCK_N]
    start_m,
    n,
    tq,
    tk,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The scores, -inf where a query does not see a key."""
    if CAUSAL:  # no valid row sees a key beyond tk
        seen = causal_mask(start_m, n, tk - tq, BLOCK_M, BLOCK_N)
    else:
        seen = (tl.arange(0, BLOCK_N) < tk - n)[None, :]
    if window is not None:
        seen &= window_mask(start_m, n, tk - tq, window, BLOCK_M, BLOCK_N)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _forward_step(
    acc,  # [BLOCK_M, BLOCK_D]
    top,  # [BLOCK_M], the largest exponent so far
    total,  # [BLOCK_M], the sum of exponentials so far
    q,  # [BLOCK_M, BLOCK_D]
    k_head,
    v_head,
    dropout,  # as keep_tile takes it
    start_m,
    n,
    inside,
    full,
    tq,
    tk,
    scale,  # by which scores become exponents, not 0: a mask's -inf is multiplied by it
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,  # "none", "all", or "edges": blocks before `inside` and from `full` on
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One block of keys, n .. n + BLOCK_N."""
    k = load_tile(k_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, RAGGED and MASK != "none")
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if softcap is not None:
        scores = tanh_of_scores(scores, scale, softcap, q)
        scale = exponent(softcap, q)
    if MASK == "all":
        scores = _seen_scores(scores, start_m, n, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    elif MASK == "edges":
        edge = n >= full
        if window is not None:
            edge |= n < inside
        if edge:
            scores = _seen_scores(scores, start_m, n, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # LOWEST for a row that has seen nothing yet
    p = exponential(scores * scale - new_top[:, None], q)
    decay = exponential(top - new_top, q)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_tile(dropout, start_m, n, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_tile(v_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, RAGGED and MASK != "none")
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return waited_for(acc), new_top, total


@triton.jit(do_not_specialize=["tq", "tk", "threshold", "window"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # (B, Hq, Tq) contiguous
    seed_ptr,
    q_strides,  # of (B, H, T, D), as the others
    k_strides,
    v_strides,
    out_strides,
    heads,
    group,
    tq,
    tk,
    scale,
    threshold,
    keep_scale,
    window,  # keys that a query sees behind it; None, which no machine code is left of, is all
    softcap,  # what bounds the scores, or None
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Grid: (cdiv(tq, BLOCK_M) * B * Hq,); NEGATE where scale is negative: q is negated, and |scale| used."""
    blocks = tl.cdiv(tq, BLOCK_M)
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # the longest rows first
    batch_head = tl.program_id(0) // blocks
    batch = batch_head // heads
    head = batch_head % heads
    q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
    k_head = head_of(k_ptr, k_strides, batch, head // group, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, head // group, ALIGN)
    out_head = head_of(out_ptr, out_strides, batch, head, ALIGN)
    dropout = (seed_ptr, batch, head, threshold)

    q = load_tile(q_head, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if NEGATE:
        q = -q
    to_exponent = exponent(tl.abs(scale), q)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)

    begin, inside, full, end = key_blocks(start_m, tq, tk, window, BLOCK_M, BLOCK_N, CAUSAL)
    ONE_LOOP: tl.constexpr = one_loop()
    starts = (begin, inside, full)
    stops = (end if ONE_LOOP else inside, full, end)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for n in range(starts[loop], stops[loop], BLOCK_N):
            acc, top, total = _forward_step(
                acc, top, total, q, k_head, v_head, dropout, start_m, n, inside, full, tq, tk, to_exponent, window,
                softcap, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, mask_in(loop, ONE_LOOP), DROPOUT, PRECISION,
                RAGGED,
            )  # fmt: skip

    blind = total == 0.0  # rows that see nothing: out 0, lse -inf
    safe_total = tl.where(blind, 1.0, total)
    out = acc * (keep_scale / safe_total)[:, None]
    store_tile(out_head, out, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = tl.where(blind, float("-inf"), natural(top, q) + tl.log2(safe_total) * LN2)
    rows = tl.arange(0, BLOCK_M)
    lse_head = lse_ptr + tl.cast(batch_head, tl.int64) * tq
    tl.store(lse_head + start_m + rows, lse, mask=rows < tq - start_m)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch(problem: Problem, strides: tuple[Strides, ...], config: Config) -> Launch:
    batch, heads, tq, _ = problem.q_shape
    programs = triton.cdiv(tq, config.block_m) * batch * heads
    named = dict(zip(("q", "k", "v", "out"), strides, strict=True))
    ragged = problem.k_shape[2] % config.block_n != 0
    return Launch(attention_forward_kernel, programs, problem, named, **config.options, RAGGED=ragged)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor,
    problem: Problem,
    config: Config,
) -> None:
    """Fill out (B, Hq, Tq, D) and lse (B, Hq, Tq) in one launch; `seed` is any tensor where there is no dropout."""
    launch = _launch(problem, (q.stride(), k.stride(), v.stride(), out.stride()), config)
    launch(q, k, v, out, lse, seed)
