"""Decoding: a few query rows against a long cache, split over the keys so that one sequence fills the chip.

Two launches. In the first, each program takes one stretch of the keys of one key head, for all the queries of all the
query heads that share it (packed into one tile), and writes its own softmax and log-sum-exp to scratch. The second
merges the stretches. Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import LAUNCHES_KEPT, VARYING, Launch, Problem, Strides
from .programs import located
from .tiles import LN2, aligned, exponent, exponential, head_of, load_tile, natural, tanh_of_scores
from .tuning import Config

__all__ = ["MAX_ROWS", "decode_merge_kernel", "decode_split_kernel", "forward", "splits"]

MAX_ROWS = 16  # queries times heads that share a key head: one tile of the least height a tensor core takes
PROGRAMS_PER_PROCESSOR = 2  # that the first launch aims at


@triton.jit(do_not_specialize=VARYING)
def decode_split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,  # (B, Hkv, group * Tq, splits, D) contiguous, fp32
    part_lse_ptr,  # (B, Hkv, group * Tq, splits)
    q_strides,
    k_strides,
    v_strides,
    stretch,  # keys a program, a multiple of BLOCK_N
    together,
    together_inverse,
    heads,  # the keys'
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
):
    """Grid: (splits * B * Hkv,); group * tq <= BLOCK_M; no dropout."""
    tl.static_assert(not DROPOUT, "decoding has no dropout")
    piece, batch, kv_head, batch_head = located(together, together_inverse, heads, heads_inverse)
    k_head = head_of(k_ptr, k_strides, batch, kv_head, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, kv_head, ALIGN)

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    member, query = rows // tq, rows % tq
    _, stride_qh, _, _ = aligned(q_strides, ALIGN)
    q_head = head_of(q_ptr, q_strides, batch, kv_head * group, ALIGN)
    q_rows = q_head.ptr + (member.to(tl.int64) * stride_qh + query.to(tl.int64) * q_head.stride_t)[:, None]
    mask_q = (rows < group * tq)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_rows + columns.to(tl.int64)[None, :] * q_head.stride_d, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    if NEGATE:
        q = -q
    to_exponent = exponent(tl.abs(scale), q.dtype)
    if CAUSAL:
        last_seen = query + (tk - tq)
    else:
        last_seen = query * 0 + (tk - 1)

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for n in range(piece * stretch, tl.minimum(tk, (piece + 1) * stretch), BLOCK_N):
        k = load_tile(k_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        if softcap is None:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_exponent  # [BLOCK_M, BLOCK_N]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = tanh_of_scores(scores, to_exponent, softcap, q.dtype) * exponent(softcap, q.dtype)
        scores = tl.where((last_seen - n)[:, None] >= tl.arange(0, BLOCK_N)[None, :], scores, float("-inf"))
        if window is not None:
            behind = (last_seen - window - n)[:, None] > tl.arange(0, BLOCK_N)[None, :]
            scores = tl.where(behind, float("-inf"), scores)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shown = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = exponential(scores - shown[:, None], q.dtype)
        decay = exponential(top - shown, q.dtype)
        total = total * decay + tl.sum(p, 1)
        v = load_tile(v_head, n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    blind = total == 0.0
    safe_total = tl.where(blind, 1.0, total)
    slot = (tl.cast(batch_head, tl.int64) * (group * tq) + rows) * tl.cdiv(tk, stretch) + piece  # [BLOCK_M]
    mask_part = (rows < group * tq)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(part_ptr + slot[:, None] * HEAD_DIM + columns[None, :], acc / safe_total[:, None], mask=mask_part)
    lse = tl.where(blind, float("-inf"), natural(top, q.dtype) + tl.log2(safe_total) * LN2)
    tl.store(part_lse_ptr + slot, lse, mask=rows < group * tq)


@triton.jit(do_not_specialize=VARYING)
def decode_merge_kernel(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,  # (B, Hq, Tq) contiguous
    out_strides,
    pieces,
    together,
    together_inverse,
    heads,  # the queries'
    heads_inverse,
    tq,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One row of out and lse from its pieces. Grid: (B * Hq * Tq,)."""
    query, batch, head, batch_head = located(together, together_inverse, heads, heads_inverse)
    row = batch_head * tq + query  # (batch, kv head, member, query) counts as (batch, head, query)
    columns = tl.arange(0, BLOCK_D)
    first = tl.cast(row, tl.int64) * pieces
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, pieces, BLOCK_S):
        slots = tl.arange(0, BLOCK_S)
        mask_slots = slots < pieces - start
        lse = tl.load(part_lse_ptr + first + start + slots, mask=mask_slots, other=float("-inf"))
        parts = tl.load(
            part_ptr + (first + start + slots)[:, None] * HEAD_DIM + columns[None, :],
            mask=mask_slots[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_D]
        new_top = tl.maximum(top, tl.max(lse, 0))
        shown = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(lse - shown)
        decay = tl.exp(top - shown)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * parts, 0)
        top = new_top
    safe_total = tl.where(total == 0.0, 1.0, total)
    out_head = head_of(out_ptr, out_strides, batch, head, 1)
    out_row = out_head.ptr + tl.cast(query, tl.int64) * out_head.stride_t
    out = (acc / safe_total).to(out_ptr.dtype.element_ty)
    tl.store(out_row + columns.to(tl.int64) * out_head.stride_d, out, mask=columns < HEAD_DIM)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total)))


def splits(q_shape: Sequence[int], k_shape: Sequence[int], processors: int, block_n: int) -> int:
    """Stretches that the keys are cut into: enough for every processor, at least a block each; 1 is not worth it."""
    rows = q_shape[1] // k_shape[1] * q_shape[2]
    if rows > MAX_ROWS:
        return 1
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, k_shape[0] * k_shape[1])
    stretch = _stretch(k_shape[2], wanted, block_n)
    return int(triton.cdiv(k_shape[2], stretch))


def _stretch(tk: int, wanted: int, block_n: int) -> int:
    return int(triton.cdiv(triton.cdiv(tk, wanted), block_n) * block_n)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch_split(problem: Problem, strides: tuple[Strides, ...], config: Config, pieces: int) -> Launch:
    kv_heads, tk = problem.k_shape[1:3]
    named = dict(zip(("q", "k", "v"), strides, strict=True))
    stretch = _stretch(tk, pieces, config.block_n)
    return Launch(decode_split_kernel, pieces, kv_heads, problem, named, stretch=stretch, **config.options)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch_merge(problem: Problem, out_strides: Strides, pieces: int) -> Launch:
    heads, tq = problem.q_shape[1:3]
    settings: dict[str, Any] = {"pieces": pieces, "BLOCK_S": 16, "num_warps": 1, "num_stages": 1}
    return Launch(decode_merge_kernel, tq, heads, problem, {"out": out_strides}, **settings)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    problem: Problem,
    config: Config,
    pieces: int,
) -> None:
    """Fill out (B, Hq, Tq, D) and lse (B, Hq, Tq) in two launches, the keys in (what `splits` gave) `pieces`."""
    batch, heads, tq, head_dim = problem.q_shape
    part = torch.empty((batch * heads * tq, pieces, head_dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((batch * heads * tq, pieces), dtype=torch.float32, device=q.device)
    launch = _launch_split(problem, (q.stride(), k.stride(), v.stride()), config, pieces)
    launch(q, k, v, part, part_lse)
    _launch_merge(problem, out.stride(), pieces)(part, part_lse, out, lse)
