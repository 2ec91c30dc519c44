"""The textbook backward of causal attention in three launches (delta, dK and dV, dQ): a yardstick, not shipped.

Written after FlashAttention-2 (Dao 2023, algorithm 2) without atomics, as most projects have it: delta = rowsum(dO * O)
in a launch of its own; one program for each block of keys walks the queries and gives dK and dV; one for each block of
queries walks the keys and gives dQ. Seven matrix products where five are needed, and the scores computed twice.
bench/static/static_report.py puts its estimate beside that of the package's own backward. It has what helps ours
besides (`one_loop`): what is compared is the way of computing.
"""

import math

import torch
import triton
import triton.language as tl

from fastchargpt.kernels.loops import one_loop

__all__ = ["textbook_backward"]

LOG2E = tl.constexpr(math.log2(math.e))  # exp2 is one instruction on a GPU, exp is two


@triton.jit
def delta_kernel(out_ptr, dout_ptr, delta_ptr, n_ctx, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr):
    """delta_i = sum over d of out[i, d] * dout[i, d], for one block of rows of one head."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1).to(tl.int64) * n_ctx + offs_m
    offs = row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_M, HEAD_DIM]
    mask = (offs_m < n_ctx)[:, None]
    out = tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(out * dout, 1), mask=offs_m < n_ctx)


@triton.jit
def _tile(ptr, start, n_ctx, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows start..start+ROWS of a head whose first element is at ptr, zeros past its end: [ROWS, HEAD_DIM]."""
    rows = start + tl.arange(0, ROWS)
    offs = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offs, mask=(rows < n_ctx)[:, None], other=0.0)


@triton.jit
def _store_tile(ptr, value, start, n_ctx, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    offs = rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=(rows < n_ctx)[:, None])


@triton.jit
def _key_block_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start_m, start_n, n_ctx, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to dK and dV of one block of keys; all tiles transposed, [BLOCK_N, BLOCK_M]."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr, start_m, n_ctx, BLOCK_M, HEAD_DIM)
    dout = _tile(dout_ptr, start_m, n_ctx, BLOCK_M, HEAD_DIM)
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < n_ctx, other=float("inf"))
    delta = tl.load(delta_ptr + offs_m, mask=offs_m < n_ctx, other=0.0)
    p_t = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :] * LOG2E)
    if MASK == "all":
        p_t = tl.where((start_n + tl.arange(0, BLOCK_N))[:, None] <= offs_m[None, :], p_t, 0.0)
    elif MASK == "diagonal":
        on_diagonal = start_m < start_n + BLOCK_N
        if on_diagonal:
            p_t = tl.where((start_n + tl.arange(0, BLOCK_N))[:, None] <= offs_m[None, :], p_t, 0.0)
    dv = tl.dot(p_t.to(dout.dtype), dout, dv)
    dp_t = tl.dot(v, tl.trans(dout))
    dk = tl.dot((p_t * (dp_t - delta[None, :])).to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n_ctx, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys; BLOCK_N must be a multiple of BLOCK_M."""
    start_n = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1).to(tl.int64) * n_ctx
    q_ptr += head * HEAD_DIM
    dout_ptr += head * HEAD_DIM
    lse_ptr += head
    delta_ptr += head
    k = _tile(k_ptr + head * HEAD_DIM, start_n, n_ctx, BLOCK_N, HEAD_DIM)
    v = _tile(v_ptr + head * HEAD_DIM, start_n, n_ctx, BLOCK_N, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    diagonal = min(start_n + BLOCK_N, n_ctx)
    starts = (start_n, start_n + BLOCK_N)
    stops = (n_ctx if one_loop() else diagonal, n_ctx)
    for loop in tl.static_range(1 if one_loop() else 2):
        for start_m in range(starts[loop], stops[loop], BLOCK_M):
            dk, dv = _key_block_step(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, start_m, start_n, n_ctx, scale * LOG2E,
                BLOCK_M, BLOCK_N, HEAD_DIM, "diagonal" if one_loop() else ("all" if loop == 0 else "none"),
            )  # fmt: skip
    _store_tile(dk_ptr + head * HEAD_DIM, dk * scale, start_n, n_ctx, BLOCK_N, HEAD_DIM)
    _store_tile(dv_ptr + head * HEAD_DIM, dv, start_n, n_ctx, BLOCK_N, HEAD_DIM)


@triton.jit
def _query_block_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, start_m, start_n, n_ctx, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to dQ of one block of queries; tiles are [BLOCK_M, BLOCK_N]."""
    k = _tile(k_ptr, start_n, n_ctx, BLOCK_N, HEAD_DIM)
    v = _tile(v_ptr, start_n, n_ctx, BLOCK_N, HEAD_DIM)
    p = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None] * LOG2E)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    if MASK == "all":
        p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
    elif MASK == "diagonal":
        on_diagonal = start_n >= start_m
        if on_diagonal:
            p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
    dp = tl.dot(dout, tl.trans(v))
    return tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, n_ctx, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries; BLOCK_M must be a multiple of BLOCK_N."""
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64) * n_ctx
    k_ptr += head * HEAD_DIM
    v_ptr += head * HEAD_DIM
    q = _tile(q_ptr + head * HEAD_DIM, start_m, n_ctx, BLOCK_M, HEAD_DIM)
    dout = _tile(dout_ptr + head * HEAD_DIM, start_m, n_ctx, BLOCK_M, HEAD_DIM)
    lse = tl.load(lse_ptr + head + offs_m, mask=offs_m < n_ctx, other=float("inf"))
    delta = tl.load(delta_ptr + head + offs_m, mask=offs_m < n_ctx, other=0.0)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    end = min(start_m + BLOCK_M, n_ctx)
    starts = (0, start_m)
    stops = (end if one_loop() else start_m, end)
    for loop in tl.static_range(1 if one_loop() else 2):
        for start_n in range(starts[loop], stops[loop], BLOCK_N):
            dq = _query_block_step(
                dq, q, dout, lse, delta, k_ptr, v_ptr, start_m, start_n, n_ctx, scale * LOG2E,
                BLOCK_M, BLOCK_N, HEAD_DIM, "diagonal" if one_loop() else ("none" if loop == 0 else "all"),
            )  # fmt: skip
    _store_tile(dq_ptr + head * HEAD_DIM, dq * scale, start_m, n_ctx, BLOCK_M, HEAD_DIM)


def textbook_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    *,
    blocks: tuple[int, int] = (64, 32),
    num_warps: int = 4,
    num_stages: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of causal attention over contiguous (B, H, T, D) tensors with a power-of-two D; lse is (B, H, T) fp32.

    `blocks` is the size of the block that a program owns and of those that it walks over, the first a multiple of the
    second.
    """
    batch, heads, n_ctx, head_dim = q.shape
    own, walk = blocks
    grid = (triton.cdiv(n_ctx, own), batch * heads)
    scale = head_dim**-0.5
    delta = torch.empty_like(lse)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta_kernel[grid](out, dout, delta, n_ctx, BLOCK_M=own, HEAD_DIM=head_dim, num_warps=num_warps)
    options = {"HEAD_DIM": head_dim, "num_warps": num_warps, "num_stages": num_stages}
    dkdv_kernel[grid](q, k, v, dout, lse, delta, dk, dv, n_ctx, scale, BLOCK_M=walk, BLOCK_N=own, **options)
    dq_kernel[grid](q, k, v, dout, lse, delta, dq, n_ctx, scale, BLOCK_M=own, BLOCK_N=walk, **options)
    return dq, dk, dv
