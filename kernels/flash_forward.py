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

from .launch import LAUNCHES_KEPT, VARYING, Launch, Problem, Strides
from .loops import key_blocks, keys_at_edge, loops, mask_in, one_loop, spans, waited_for
from .philox_tile import Dropout, keep_tile
from .programs import located
from .tiles import (
    LN2,
    LOWEST,
    Form,
    Softmax,
    decayed,
    exponent,
    exponential,
    head_of,
    load_tile,
    natural,
    no_part_sums,
    part_sums,
    prefetch_tile,
    seen,
    store_tile,
    tanh_of_scores,
    whole_sums,
)
from .tuning import Config

__all__ = ["attention_forward_kernel", "forward"]


@triton.jit
def _forward_step(
    acc,  # [BLOCK_M, BLOCK_D]
    top,  # [BLOCK_M], the largest exponent so far
    total,  # [BLOCK_M], the sum of exponentials so far, or the `part_sums` of it
    q,  # [BLOCK_M, BLOCK_D]
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
    scores = tl.dot(q, tl.trans(k), input_precision=FORM.PRECISION)  # [BLOCK_M, BLOCK_N]
    scale = softmax.scale
    if softmax.softcap is not None:
        scores = tanh_of_scores(scores, scale, softmax.softcap, q.dtype)
        scale = exponent(softmax.softcap, q.dtype)
    if MASK == "all" or (MASK == "edges" and keys_at_edge(n, keys, softmax)):
        scores = tl.where(seen(start_m, n, softmax, FORM), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)  # LOWEST for a row that has seen nothing yet
    p = exponential(scores * scale - new_top[:, None], q.dtype)
    decay = exponential(top - new_top, q.dtype)
    total = decayed(total, decay) + part_sums(p)
    if FORM.DROPOUT:
        p = tl.where(keep_tile(dropout, start_m, n, FORM.BLOCK_M, FORM.BLOCK_N), p, 0.0)
    v = load_tile(v_head, n, softmax.tk, FORM.BLOCK_N, FORM.HEAD_DIM, FORM.BLOCK_D, MASK_ROWS)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=FORM.PRECISION)
    return waited_for(acc, FORM), new_top, total


@triton.jit(do_not_specialize=VARYING)
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
    together,
    together_inverse,
    heads,  # the queries'
    heads_inverse,
    group,
    tq,
    tk,
    scale,
    threshold,
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
    ALIGN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Grid: (cdiv(tq, BLOCK_M) * B * Hq,)."""
    block, batch, head, batch_head = located(together, together_inverse, heads, heads_inverse)
    start_m = (tl.cdiv(tq, BLOCK_M) - 1 - block) * BLOCK_M  # the longest rows first
    q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
    k_head = head_of(k_ptr, k_strides, batch, head // group, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, head // group, ALIGN)
    out_head = head_of(out_ptr, out_strides, batch, head, ALIGN)
    dropout = Dropout(seed_ptr, batch, head, threshold, keep_scale)
    FORM: tl.constexpr = Form(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, NEGATE, DROPOUT, PRECISION, RAGGED)
    ONE_LOOP: tl.constexpr = one_loop()

    softmax = Softmax(tq, tk, exponent(tl.abs(scale), q_ptr.dtype.element_ty), window, softcap)
    keys = key_blocks(start_m, softmax, FORM)
    if together == 1:  # then nobody has asked for these yet
        prefetch_tile(k_head, keys.begin, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
        prefetch_tile(v_head, keys.begin, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
    q = load_tile(q_head, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if NEGATE:
        q = -q
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = no_part_sums(BLOCK_M)
    ranges = spans(keys, ONE_LOOP)
    for loop in tl.static_range(loops(ONE_LOOP)):
        for n in range(ranges[loop][0], ranges[loop][1], BLOCK_N):
            acc, top, total = _forward_step(
                acc, top, total, q, k_head, v_head, softmax, dropout, start_m, n, keys, mask_in(loop, ONE_LOOP), FORM
            )

    total = whole_sums(total)
    blind = total == 0.0  # rows that see nothing: out 0, lse -inf
    safe_total = tl.where(blind, 1.0, total)
    out = acc * (keep_scale / safe_total)[:, None]
    store_tile(out_head, out, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = tl.where(blind, float("-inf"), natural(top, q.dtype) + tl.log2(safe_total) * LN2)
    rows = tl.arange(0, BLOCK_M)
    lse_head = lse_ptr + tl.cast(batch_head, tl.int64) * tq
    tl.store(lse_head + start_m + rows, lse, mask=rows < tq - start_m)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch(problem: Problem, strides: tuple[Strides, ...], config: Config) -> Launch:
    heads, tq = problem.q_shape[1:3]
    blocks = triton.cdiv(tq, config.block_m)
    named = dict(zip(("q", "k", "v", "out"), strides, strict=True))
    ragged = problem.k_shape[2] % config.block_n != 0
    return Launch(
        attention_forward_kernel, blocks, heads, problem, named, config.in_turn, **config.options, RAGGED=ragged
    )


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
