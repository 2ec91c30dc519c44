"""Backward, tiled: two launches for any sequence length, no atomics, nothing of size T x T.

The first takes blocks of queries: it computes delta (what the softmax's gradient subtracts from each row), writes it
beside the log-sum-exp in the form that the second wants, and accumulates dq over the keys. The second takes blocks of
keys, reads both, and accumulates dk and dv over the queries of every head that shares them. The probabilities are
recomputed in both. What they do to a block stands in backward_steps.py.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import functools

import torch
import triton
import triton.language as tl

from .backward_steps import (
    ROWS_AT_ONCE,
    delta_of_rows,
    dkdv_of_block,
    dq_of_block,
    keep_rows,
    lse_of_rows,
    padded_rows,
)
from .launch import LAUNCHES_KEPT, VARYING, Launch, Problem, Strides, overlapping
from .loops import key_blocks
from .philox_tile import Dropout
from .programs import await_last, begin_next, compiled_for, located
from .tiles import Form, Softmax, exponent, head_of, load_tile, store_tile
from .tuning import Config

__all__ = ["backward", "backward_dkdv_kernel", "backward_dq_kernel"]


@triton.jit(do_not_specialize=VARYING)
def backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,  # (B, Hq, Tq) contiguous, as dlse
    kept_lse_ptr,  # (B, Hq, padded_rows(Tq)) contiguous, as kept_delta
    kept_delta_ptr,
    dlse_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
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
    HAS_DLSE: tl.constexpr,
):
    """What is kept for the second launch, and dq. Grid: (cdiv(tq, BLOCK_M) * B * Hq,)."""
    block, batch, head, batch_head = located(together, together_inverse, heads, heads_inverse)
    start_m = (tl.cdiv(tq, BLOCK_M) - 1 - block) * BLOCK_M  # the longest rows first
    rows_before = tl.cast(batch_head, tl.int64) * tq
    q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
    out_head = head_of(out_ptr, out_strides, batch, head, ALIGN)
    dout_head = head_of(dout_ptr, dout_strides, batch, head, ALIGN)
    k_head = head_of(k_ptr, k_strides, batch, head // group, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, head // group, ALIGN)

    softmax = Softmax(tq, tk, exponent(tl.abs(scale), q_ptr.dtype.element_ty), window, softcap)
    FORM: tl.constexpr = Form(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, NEGATE, DROPOUT, PRECISION, RAGGED)
    keys = key_blocks(start_m, softmax, FORM)
    begin_next()
    out = load_tile(out_head, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout = load_tile(dout_head, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = delta_of_rows(out, dout, dlse_ptr + rows_before, start_m, tq, BLOCK_M, HAS_DLSE)
    q = load_tile(q_head, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if NEGATE:
        q = -q
    lse = lse_of_rows(lse_ptr + rows_before, start_m, tq, q.dtype, BLOCK_M)
    KEEP_LAST: tl.constexpr = compiled_for(9, below=10)  # the loop's first loads come earlier, but registers are held
    if not KEEP_LAST:
        keep_rows(kept_lse_ptr, kept_delta_ptr, batch_head, lse, delta, start_m, tq, BLOCK_M)
    dropout = Dropout(seed_ptr, batch, head, threshold, keep_scale)
    dq = dq_of_block(q, dout, lse, delta, k_head, v_head, softmax, dropout, start_m, keys, FORM)
    if KEEP_LAST:
        keep_rows(kept_lse_ptr, kept_delta_ptr, batch_head, lse, delta, start_m, tq, BLOCK_M)
    dq_head = head_of(dq_ptr, dq_strides, batch, head, ALIGN)
    store_tile(dq_head, dq * scale, start_m, tq, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    kept_lse_ptr,  # (B, Hq, padded_rows(Tq)) contiguous, as kept_delta
    kept_delta_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
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
    RAGGED: tl.constexpr,
):
    """dk and dv. Grid: (cdiv(tk, BLOCK_N) * B * Hkv,)."""
    block, batch, kv_head, batch_head = located(together, together_inverse, heads, heads_inverse)
    start_n = block * BLOCK_N  # the keys that most rows see first
    k_head = head_of(k_ptr, k_strides, batch, kv_head, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, kv_head, ALIGN)
    softmax = Softmax(tq, tk, exponent(tl.abs(scale), k_ptr.dtype.element_ty), window, softcap)
    FORM: tl.constexpr = Form(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, NEGATE, DROPOUT, PRECISION, RAGGED)
    k = load_tile(k_head, start_n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_head, start_n, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    await_last()
    for member in range(group):
        head = kv_head * group + member
        q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
        dout_head = head_of(dout_ptr, dout_strides, batch, head, ALIGN)
        before = (tl.cast(batch_head, tl.int64) * group + member) * padded_rows(tq)
        dropout = Dropout(seed_ptr, batch, head, threshold, keep_scale)
        dk, dv = dkdv_of_block(
            dk, dv, k, v, q_head, dout_head, dout_head, kept_lse_ptr + before, kept_delta_ptr + before, kept_lse_ptr,
            softmax, dropout, start_n, FORM, False, False,
        )  # fmt: skip
    dk_head = head_of(dk_ptr, dk_strides, batch, kv_head, ALIGN)
    dv_head = head_of(dv_ptr, dv_strides, batch, kv_head, ALIGN)
    store_tile(dk_head, dk * tl.abs(scale), start_n, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv_head, dv * keep_scale, start_n, tk, BLOCK_N, HEAD_DIM, BLOCK_D)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch_dq(problem: Problem, strides: tuple[Strides, ...], has_dlse: bool, config: Config) -> Launch:
    heads, tq = problem.q_shape[1:3]
    blocks = triton.cdiv(tq, config.block_m)
    named = dict(zip(("q", "k", "v", "out", "dout", "dq"), strides, strict=True))
    flags = {"RAGGED": problem.k_shape[2] % config.block_n != 0, "HAS_DLSE": has_dlse}
    return Launch(backward_dq_kernel, blocks, heads, problem, named, config.in_turn, **config.options, **flags)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch_dkdv(problem: Problem, strides: tuple[Strides, ...], config: Config) -> Launch:
    assert config.block_m <= ROWS_AT_ONCE.value, "a block of rows would end outside of what is kept"
    kv_heads, tk = problem.k_shape[1:3]
    blocks = triton.cdiv(tk, config.block_n)
    named = dict(zip(("q", "k", "v", "dout", "dk", "dv"), strides, strict=True))
    options = {**config.options, **overlapping(problem.device), "RAGGED": problem.q_shape[2] % config.block_m != 0}
    return Launch(backward_dkdv_kernel, blocks, kv_heads, problem, named, config.in_turn, **options)


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    seed: torch.Tensor,
    problem: Problem,
    config: Config,
    config_dkdv: Config,
) -> None:
    """Fill dq, dk and dv (shapes of q, k, v; any strides) in two launches."""
    batch, heads, tq, _ = problem.q_shape
    padded = triton.cdiv(tq, ROWS_AT_ONCE.value) * ROWS_AT_ONCE.value
    kept_lse, kept_delta = lse.new_empty(2, batch, heads, padded).unbind()
    inputs = (q.stride(), k.stride(), v.stride())
    launch_dq = _launch_dq(problem, (*inputs, out.stride(), dout.stride(), dq.stride()), dlse is not None, config)
    launch_dkdv = _launch_dkdv(problem, (*inputs, dout.stride(), dk.stride(), dv.stride()), config_dkdv)
    launch_dq(q, k, v, out, dout, dq, lse, kept_lse, kept_delta, lse if dlse is None else dlse, seed)
    launch_dkdv(q, k, v, dout, dk, dv, kept_lse, kept_delta, seed)
