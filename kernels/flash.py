"""The Triton kernels as PyTorch operators: registered, differentiable, traceable, counted.

Operators `fastchargpt::attention_forward` and `..._backward` take q, k, v as (B, H, T, D) in any strides;
`fastchargpt::attention_packed_forward` and `..._backward` take the projection's (B, T, (Hq + 2 Hkv) * D) in place and
write one packed gradient. Outputs lie in memory as (B, T, H, D), so that the next projection reads them without a copy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..errors import AttentionError
from . import flash_backward, flash_decode, flash_flops, flash_forward, flash_short, tuning
from .launch import Problem, problem_of
from .operators import differentiable, operator
from .packed import by_head, unpack
from .window import hiding, keys_seen, seen_keys

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
    out, lse = attention_forward(q, k, v, seed, scale, causal, dropout_p, window, softcap)
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
    out: torch.Tensor = attention_packed_forward(
        _autocast(qkv), seed, n_head, n_kv_head, scale, dropout_p, window, softcap
    )[0]
    return out


def describe(problem: Problem) -> str:
    """The kernels that would run, and where their settings come from, in words."""
    tq, tk = problem.q_shape[2], problem.k_shape[2]
    window, softcap = problem.window, problem.softcap
    problem = problem._replace(window=hiding(window, tk))
    plan = tuning.plan(problem)
    read = (*problem.k_shape[:2], keys_seen(tq, tk, window), problem.k_shape[3])
    decoding = _pieces(problem._replace(k_shape=read), plan) > 1
    backward = " and ".join(f"{c.kernel} {c.block_m}x{c.block_n}" for c in plan.backward)
    forward = "decode, split over the keys" if decoding else f"tiled {plan.forward.block_m}x{plan.forward.block_n}"
    text = f"table {tuning.arch_of(problem.device)}; forward {forward}; backward {backward}, "
    text += f"{len(plan.backward)} launch(es)"
    if window is not None:
        hidden = "it hides none of the keys read" if problem.window is None else "blocks of keys outside it are skipped"
        text += f"; window {window}: {hidden}"
    if softcap is not None:
        text += f"; scores capped at {softcap:g}"
    return f"{text}; {tuning.origin(problem)}"


def _autocast(x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# -- what the operators do


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _pieces(problem: Problem, plan: tuning.Plan) -> int:
    if plan.decode is None or problem.dropout_p > 0.0:
        return 1
    return flash_decode.splits(problem.q_shape, problem.k_shape, _processors(problem.device), plan.decode.block_n)


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
    problem = problem_of(q, k, scale=scale, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap)
    plan = tuning.plan(problem)
    pieces = _pieces(problem, plan)
    with torch.cuda.device_of(q):
        if pieces > 1:
            assert plan.decode is not None
            flash_decode.forward(q, k, v, out, lse, problem, plan.decode, pieces)
        else:
            flash_forward.forward(q, k, v, out, lse, _seed(seed, q, dropout_p), problem, plan.forward)
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
    q, k = tensors[:2]
    window = hiding(window, k.shape[2])  # keys before every window stay: their gradients, 0, are to be written
    problem = problem_of(q, k, scale=scale, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap)
    configs = tuning.plan(problem).backward
    backward: Callable[..., None] = flash_short.backward if len(configs) == 1 else flash_backward.backward
    dlse = None if dlse is None else dlse.contiguous()
    with torch.cuda.device_of(q):
        backward(dout, dlse, *tensors, *gradients, _seed(seed, q, dropout_p), problem, *configs)


def _seed(seed: torch.Tensor | None, anything: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """What a kernel takes for a seed: without dropout it reads none, and any tensor will do."""
    assert seed is not None or dropout_p == 0.0, "dropout needs a seed"
    return anything if seed is None else seed


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the shape of x (B, H, T, D) that lies in memory as (B, T, H, D)."""
    batch, heads, time, head_dim = x.shape
    return x.new_empty((batch, time, heads, head_dim)).transpose(1, 2)


# -- operators


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


def _forward_fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


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


def _backward_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows_first(q), _rows_first(k), _rows_first(v)


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
    q, k, v = unpack(qkv, n_head, n_kv_head)
    out = _rows_first(q)
    lse = _launch_forward(q, k, v, out, seed, scale, True, dropout_p, window, softcap)
    return out.transpose(1, 2).flatten(2), lse


def _packed_forward_fake(
    qkv: torch.Tensor, seed: torch.Tensor | None, n_head: int, n_kv_head: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, time, width = qkv.shape
    out = qkv.new_empty((batch, time, width // (n_head + 2 * n_kv_head) * n_head))
    return out, qkv.new_empty((batch, n_head, time), dtype=torch.float32)


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
    q, k, v = unpack(qkv, n_head, n_kv_head)
    gradients = unpack(dqkv, n_head, n_kv_head)
    tensors = (q, k, v, by_head(out, n_head), lse)
    _launch_backward(by_head(dout, n_head), dlse, tensors, gradients, seed, scale, True, dropout_p, window, softcap)
    return dqkv


def _packed_backward_fake(dout: torch.Tensor, dlse: torch.Tensor | None, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


# -- their registration, and autograd

attention_forward = operator("attention_forward", _forward, _forward_fake)
attention_backward = operator("attention_backward", _backward, _backward_fake)
attention_packed_forward = operator("attention_packed_forward", _packed_forward, _packed_forward_fake)
attention_packed_backward = operator("attention_packed_backward", _packed_backward, _packed_backward_fake)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, seed, *ctx.options = inputs
        out, lse = run(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, seed)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, seed = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = attention_backward(dout, dlse, q, k, v, out, lse, seed, *ctx.options)
        return (None, *gradients, None, *[None] * len(ctx.options))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        qkv, seed, *ctx.options = inputs
        out, lse = run(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, out, lse, seed)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        qkv, out, lse, seed = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dqkv = attention_packed_backward(dout, dlse, qkv, out, lse, seed, *ctx.options)
        return (None, dqkv, None, *[None] * len(ctx.options))


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> Any:
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AttentionError(
            "the Triton kernels have no second derivative (create_graph=True): use backend 'naive' for double backward"
        )


differentiable(attention_forward, _Attention)
differentiable(attention_packed_forward, _PackedAttention)
differentiable(attention_backward, _Gradient)
differentiable(attention_packed_backward, _Gradient)

for _name, _formula in flash_flops.FORMULAS.items():
    register_flop_formula(getattr(torch.ops.fastchargpt, _name))(_formula)
