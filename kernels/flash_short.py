"""Backward in one launch, for short sequences, where launches and bytes cost more than products.

- `backward_tile_kernel`: all queries and keys of a head fit one tile. It recomputes the softmax outright, so it reads
  neither out nor lse nor delta, takes delta as the row sum of P * dP, and needs five products.
- `backward_blocks_kernel`: each program does dk and dv of one block of keys, then dq of one block of queries. By the
  causal symmetry the two together are the same work for every program. It needs seven products, delta inline.

No program writes what another one reads, so nothing is ordered and nothing is atomic.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import functools

import torch
import triton
import triton.language as tl

from .backward_steps import delta_of_rows, dkdv_of_block, dq_of_block, lse_of_rows
from .launch import LAUNCHES_KEPT, VARYING, Launch, Problem, Strides
from .loops import key_blocks
from .philox_tile import Dropout, keep_tile
from .programs import located
from .tiles import Form, Softmax, causal_mask, exponent, exponential, head_of, load_rows, load_tile, store_tile
from .tuning import Config

__all__ = ["backward", "backward_blocks_kernel", "backward_tile_kernel"]


@triton.jit(do_not_specialize=VARYING)
def backward_tile_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dlse_ptr,  # (B, Hq, Tq) contiguous
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Grid: (B * Hkv,), for tq <= BLOCK_M and tk <= BLOCK_N."""
    _, batch, kv_head, batch_head = located(together, together_inverse, heads, heads_inverse)
    k_head = head_of(k_ptr, k_strides, batch, kv_head, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, kv_head, ALIGN)
    k = load_tile(k_head, 0, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_head, 0, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
        q = load_tile(q_head, 0, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        if NEGATE:
            q = -q
        dout_head = head_of(dout_ptr, dout_strides, batch, head, ALIGN)
        dout = load_tile(dout_head, 0, tq, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = (tl.arange(0, BLOCK_N) < tk)[None, :] & (tl.arange(0, BLOCK_M) < tq)[:, None]
        if CAUSAL:
            seen &= causal_mask(0, 0, tk - tq, BLOCK_M, BLOCK_N)
        scores = tl.where(seen, scores * exponent(tl.abs(scale), k.dtype), float("-inf"))
        top = tl.max(scores, 1)
        p = exponential(scores - tl.where(top == float("-inf"), 0.0, top)[:, None], k.dtype)
        total = tl.sum(p, 1)
        p = p / tl.where(total == 0.0, 1.0, total)[:, None]

        if DROPOUT:
            keep = keep_tile(Dropout(seed_ptr, batch, head, threshold, keep_scale), 0, 0, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, p, 0.0).to(dout.dtype)
        else:
            dropped = p.to(dout.dtype)
        dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
        if member == group - 1:  # as soon as it is done, to have its registers
            dv_head = head_of(dv_ptr, dv_strides, batch, kv_head, ALIGN)
            store_tile(dv_head, dv * keep_scale, 0, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        delta = tl.sum(p * dp, 1)
        if HAS_DLSE:
            rows_before = (tl.cast(batch_head, tl.int64) * group + member) * tq
            delta -= load_rows(dlse_ptr + rows_before, 0, tq, 0.0, BLOCK_M)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        if member == group - 1:
            dk_head = head_of(dk_ptr, dk_strides, batch, kv_head, ALIGN)
            store_tile(dk_head, dk * tl.abs(scale), 0, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        dq_head = head_of(dq_ptr, dq_strides, batch, head, ALIGN)
        store_tile(dq_head, dq * scale, 0, tq, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward_blocks_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,  # (B, Hq, Tq) contiguous, as dlse
    dlse_ptr,
    seed_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dout_strides,
    dq_strides,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of the inner loops
    BLOCK_N: tl.constexpr,  # what a program owns: BLOCK_N keys, then BLOCK_N queries
    CAUSAL: tl.constexpr,
    NEGATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """Grid: (cdiv(max(tq, tk), BLOCK_N) * B * Hkv,). RAGGED: tq or tk is no multiple of BLOCK_M."""
    block, batch, kv_head, batch_head = located(together, together_inverse, heads, heads_inverse)
    start = block * BLOCK_N
    k_head = head_of(k_ptr, k_strides, batch, kv_head, ALIGN)
    v_head = head_of(v_ptr, v_strides, batch, kv_head, ALIGN)

    if start < tk:
        softmax = Softmax(tq, tk, exponent(tl.abs(scale), k_ptr.dtype.element_ty), None, None)
        DKDV_FORM: tl.constexpr = Form(HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, NEGATE, DROPOUT, PRECISION, RAGGED)
        k = load_tile(k_head, start, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(v_head, start, tk, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for member in range(group):
            head = kv_head * group + member
            rows_before = (tl.cast(batch_head, tl.int64) * group + member) * tq
            q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
            out_head = head_of(out_ptr, out_strides, batch, head, ALIGN)
            dout_head = head_of(dout_ptr, dout_strides, batch, head, ALIGN)
            dropout = Dropout(seed_ptr, batch, head, threshold, keep_scale)
            dk, dv = dkdv_of_block(
                dk, dv, k, v, q_head, dout_head, out_head, lse_ptr + rows_before, lse_ptr, dlse_ptr + rows_before,
                softmax, dropout, start, DKDV_FORM, True, HAS_DLSE,
            )  # fmt: skip
        dk_head = head_of(dk_ptr, dk_strides, batch, kv_head, ALIGN)
        dv_head = head_of(dv_ptr, dv_strides, batch, kv_head, ALIGN)
        store_tile(dk_head, dk * tl.abs(scale), start, tk, BLOCK_N, HEAD_DIM, BLOCK_D)
        store_tile(dv_head, dv * keep_scale, start, tk, BLOCK_N, HEAD_DIM, BLOCK_D)

    if start < tq:
        DQ_FORM: tl.constexpr = Form(HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_M, CAUSAL, NEGATE, DROPOUT, PRECISION, RAGGED)
        for member in range(group):
            head = kv_head * group + member
            rows_before = (tl.cast(batch_head, tl.int64) * group + member) * tq
            q_head = head_of(q_ptr, q_strides, batch, head, ALIGN)
            out_head = head_of(out_ptr, out_strides, batch, head, ALIGN)
            dout_head = head_of(dout_ptr, dout_strides, batch, head, ALIGN)
            q = load_tile(q_head, start, tq, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            if NEGATE:
                q = -q
            out = load_tile(out_head, start, tq, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            dout = load_tile(dout_head, start, tq, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            delta = delta_of_rows(out, dout, dlse_ptr + rows_before, start, tq, BLOCK_N, HAS_DLSE)
            lse = lse_of_rows(lse_ptr + rows_before, start, tq, q.dtype, BLOCK_N)
            softmax = Softmax(tq, tk, exponent(tl.abs(scale), q.dtype), None, None)
            dropout = Dropout(seed_ptr, batch, head, threshold, keep_scale)
            keys = key_blocks(start, softmax, DQ_FORM)
            dq = dq_of_block(q, dout, lse, delta, k_head, v_head, softmax, dropout, start, keys, DQ_FORM)
            dq_head = head_of(dq_ptr, dq_strides, batch, head, ALIGN)
            store_tile(dq_head, dq * scale, start, tq, BLOCK_N, HEAD_DIM, BLOCK_D)


@functools.lru_cache(maxsize=LAUNCHES_KEPT)
def _launch(problem: Problem, strides: tuple[Strides, ...], has_dlse: bool, config: Config) -> Launch:
    assert problem.window is problem.softcap is None, "the one-launch kernels have neither window nor soft-cap"
    kv_heads, tk = problem.k_shape[1:3]
    tq = problem.q_shape[2]
    names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    named = dict(zip(names, strides, strict=True))
    if config.kernel == "tile":
        assert max(tq - config.block_m, tk - config.block_n) <= 0, "one tile does not hold the sequence"
        del named["out"]
        return Launch(backward_tile_kernel, 1, kv_heads, problem, named, **config.options, HAS_DLSE=has_dlse)
    blocks = triton.cdiv(max(tq, tk), config.block_n)
    flags = {"RAGGED": tq % config.block_m != 0 or tk % config.block_m != 0, "HAS_DLSE": has_dlse}
    return Launch(backward_blocks_kernel, blocks, kv_heads, problem, named, config.in_turn, **config.options, **flags)


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
) -> None:
    """Fill dq, dk and dv (shapes of q, k, v; any strides) in one launch: `config.kernel` is "tile" or "blocks".

    There is neither a window nor a soft-cap here (`tuning.plan` takes two launches for them).
    """
    strides = tuple([x.stride() for x in (q, k, v, out, dout, dq, dk, dv)])
    launch = _launch(problem, strides, dlse is not None, config)
    given = lse if dlse is None else dlse
    if config.kernel == "tile":
        launch(q, k, v, dout, dq, dk, dv, given, seed)
    else:
        launch(q, k, v, out, dout, dq, dk, dv, lse, given, seed)
