"""The Triton kernels as PyTorch operators: registered, differentiable, traceable, counted.

Operators `fastchargpt::attention_forward` and `..._backward` take q, k, v as (B, H, T, D) in any strides;
`fastchargpt::attention_packed_forward` and `..._backward` take the projection's (B, T, (Hq + 2 Hkv) * D) in place and
write one packed gradient. Outputs lie in memory as (B, T, H, D), so that the next projection reads them without a copy.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..errors import AttentionError
from . import flash_backward, flash_decode, flash_flops, flash_forward, flash_short, tuning
from .launch import is_plain, launch_arguments
from .window import hiding, seen_keys

__all__ = ["attention", "attention_packed", "describe"]

INTERPRETER_PROCESSORS = 8  # stands in for the chip's count where kernels are interpreted


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Hq, Tq, D) and lse (B, Hq, Tq) fp32, both differentiable; the arguments are those of `naive.attention`.

    Under autocast the inputs are cast as for SDPA. A second derivative raises AttentionError.
    """
    q, k, v = (_autocast(x) for x in (q, k, v))
    out, lse = torch.ops.fastchargpt.attention_forward(q, k, v, seed, scale, causal, dropout_p, window, softcap)
    return out, lse


def attention_packed(
    qkv: torch.Tensor,
    n_head: int,
    n_kv_head: int,
    *,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of qkv (B, T, (n_head + 2 * n_kv_head) * D): out (B, T, n_head * D). Nothing is copied."""
    out: torch.Tensor = torch.ops.fastchargpt.attention_packed_forward(
        _autocast(qkv), seed, n_head, n_kv_head, scale, dropout_p, window, softcap
    )[0]
    return out


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool,
    dropout_p: float,
    window: int | None = None,
    softcap: float | None = None,
) -> str:
    """The kernels that would run for these shapes, in words."""
    left = hiding(window, k.shape[2])
    plan = _plan(q, k, causal, dropout_p, left, softcap)
    decoding = _pieces(q, seen_keys(q, k, k, window)[0], plan, dropout_p) > 1
    backward = " and ".join(f"{c.kernel} {c.block_m}x{c.block_n}" for c in plan.backward)
    forward = "decode, split over the keys" if decoding else f"tiled {plan.forward.block_m}x{plan.forward.block_n}"
    text = f"table {tuning.arch_of(q.device)}; forward {forward}; backward {backward}, {len(plan.backward)} launch(es)"
    if window is not None:
        hidden = "blocks of keys outside it are skipped" if left is not None else "it hides none of the keys read"
        text += f"; window {window}: {hidden}"
    return text if softcap is None else f"{text}; scores capped at {softcap:g}"


def _autocast(x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# -- what the operators do


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _plan(
    q: torch.Tensor, k: torch.Tensor, causal: bool, dropout_p: float, window: int | None, softcap: float | None
) -> tuning.Plan:
    return tuning.plan(
        q.device,
        q.dtype,
        q.shape[-1],
        max(q.shape[2], k.shape[2]),
        dropout=dropout_p > 0.0,
        variant=window is not None or softcap is not None,
        plain=is_plain(q, k, causal),
    )


def _pieces(q: torch.Tensor, k: torch.Tensor, plan: tuning.Plan, dropout_p: float) -> int:
    if plan.decode is None or dropout_p > 0.0:
        return 1
    return flash_decode.splits(q, k, _processors(q.device), plan.decode.block_n)


def _launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if scale == 0.0:  # all scores are 0, and 0 times what masks a score would be NaN
        q, scale = torch.zeros_like(q), 1.0
    if dropout_p > 0.0:
        window = hiding(window, k.shape[2])  # its mask goes by the number of a key, so none can be cut off
    else:
        k, v, window = seen_keys(q, k, v, window)
    plan = _plan(q, k, causal, dropout_p, window, softcap)
    arguments = launch_arguments(
        q, k, seed, scale=scale, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap
    )
    pieces = _pieces(q, k, plan, dropout_p)
    with torch.cuda.device_of(q):
        if pieces > 1:
            assert plan.decode is not None
            flash_decode.forward(q, k, v, out, lse, arguments, plan.decode, pieces)
        else:
            flash_forward.forward(q, k, v, out, lse, arguments, plan.forward)
    return lse


def _launch_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    tensors: tuple[torch.Tensor, ...],  # q, k, v, out, lse
    gradients: Sequence[torch.Tensor],  # dq, dk, dv
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> None:
    q, k, v, out, lse = tensors
    dq, dk, dv = gradients
    window = hiding(window, k.shape[2])  # keys before every window stay: their gradients, 0, are to be written
    plan = _plan(q, k, causal, dropout_p, window, softcap)
    arguments = launch_arguments(
        q, k, seed, scale=scale, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap
    )
    dlse = None if dlse is None else dlse.contiguous()
    with torch.cuda.device_of(q):
        if len(plan.backward) == 1:
            flash_short.backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, arguments, plan.backward[0])
        else:
            flash_backward.backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, arguments, *plan.backward)


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the shape of x (B, H, T, D) that lies in memory as (B, T, H, D)."""
    batch, heads, time, head_dim = x.shape
    return x.new_empty((batch, time, heads, head_dim)).transpose(1, 2)


def _unpack(qkv: torch.Tensor, n_head: int, n_kv_head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k, v (B, H, T, D) of a packed (B, T, (Hq + 2 Hkv) * D)."""
    heads = qkv.unflatten(2, (n_head + 2 * n_kv_head, -1)).transpose(1, 2)
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=1)
    return q, k, v


# -- operators


@torch.library.custom_op("fastchargpt::attention_forward", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _rows_first(q)
    return out, _launch_forward(q, k, v, out, seed, scale, causal, dropout_p, window, softcap)


@_forward.register_fake
def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("fastchargpt::attention_backward", mutates_args=())
def _backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = (_rows_first(q), _rows_first(k), _rows_first(v))
    _launch_backward(dout, dlse, (q, k, v, out, lse), gradients, seed, scale, causal, dropout_p, window, softcap)
    return gradients


@_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows_first(q), _rows_first(k), _rows_first(v)


@torch.library.custom_op("fastchargpt::attention_packed_forward", mutates_args=())
def _packed_forward(
    qkv: torch.Tensor,
    seed: torch.Tensor | None,
    n_head: int,
    n_kv_head: int,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _unpack(qkv, n_head, n_kv_head)
    out = _rows_first(q)
    lse = _launch_forward(q, k, v, out, seed, scale, True, dropout_p, window, softcap)
    return out.transpose(1, 2).flatten(2), lse


@_packed_forward.register_fake
def _(
    qkv: torch.Tensor, seed: torch.Tensor | None, n_head: int, n_kv_head: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, time, width = qkv.shape
    out = qkv.new_empty((batch, time, width // (n_head + 2 * n_kv_head) * n_head))
    return out, qkv.new_empty((batch, n_head, time), dtype=torch.float32)


@torch.library.custom_op("fastchargpt::attention_packed_backward", mutates_args=())
def _packed_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor | None,
    n_head: int,
    n_kv_head: int,
    scale: float,
    dropout_p: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = _unpack(qkv, n_head, n_kv_head)
    by_head = [x.unflatten(2, (n_head, -1)).transpose(1, 2) for x in (out, dout)]
    gradients = _unpack(dqkv, n_head, n_kv_head)
    tensors = (q, k, v, by_head[0], lse)
    _launch_backward(by_head[1], dlse, tensors, gradients, seed, scale, True, dropout_p, window, softcap)
    return dqkv


@_packed_backward.register_fake
def _(dout: torch.Tensor, dlse: torch.Tensor | None, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


# -- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, seed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, seed)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = torch.ops.fastchargpt.attention_backward(dout, dlse, q, k, v, out, lse, seed, *ctx.options)
    return (*gradients, *[None] * 6)


def _packed_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    qkv, seed, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, seed)


def _packed_differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    qkv, out, lse, seed = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dqkv = torch.ops.fastchargpt.attention_packed_backward(dout, dlse, qkv, out, lse, seed, *ctx.options)
    return (dqkv, *[None] * 7)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise AttentionError(
        "the Triton kernels have no second derivative (create_graph=True): use backend 'naive' for double backward"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_packed_forward.register_autograd(_packed_differentiate, setup_context=_packed_save)
_backward.register_autograd(_no_second_derivative)
_packed_backward.register_autograd(_no_second_derivative)

for _name, _formula in flash_flops.FORMULAS.items():
    register_flop_formula(getattr(torch.ops.fastchargpt, _name))(_formula)
