"""One way to run a case of the Triton kernels under the strict interpreter and to judge it against float64."""

import dataclasses
import random

import torch
from oracles import worst_error
from strict_interpreter import strict_interpreter

from fastchargpt.kernels import flash, naive
from fastchargpt.kernels.tuning import Config, Plan, forced

__all__ = ["DTYPES", "PLANS", "Case", "inputs", "judge", "lay_out", "plan_of", "random_case"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("contiguous", "rows_first", "packed", "columns_first", "gaps", "expanded")
GRADIENT_LAYOUTS = ("contiguous", "rows_first", "columns_first", "gaps", "scalar")
PLANS = ("tiled", "blocks", "tile")
TARGETS = ("sm_80", "sm_90")  # the kernels loop over blocks in one way on the first, in another on the second


def plan_of(kind: str, block_m: int = 16, block_n: int = 16, *, decode: bool = False, in_turn: bool = False) -> Plan:
    """A plan of the smallest tiles: "tiled" (two backward launches), or "blocks" or "tile" (one)."""
    kernels = ("dq", "dkdv") if kind == "tiled" else (kind,)
    backward = tuple(Config(kernel, block_m, block_n, 4, 1, in_turn=in_turn) for kernel in kernels)
    splitting = Config("decode", 16, 16, 4, 1) if decode else None
    return Plan(Config("forward", block_m, block_n, 4, 1, in_turn=in_turn), backward, splitting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that decides one comparison; its repr is the line that reproduces it."""

    plan: str = "tiled"
    dtype: str = "fp32"
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    tq: int = 17
    tk: int = 17
    head_dim: int = 16
    scale: float = 0.25
    causal: bool = True
    dropout_p: float = 0.0
    window: int | None = None
    softcap: float | None = None
    lse_gradient: bool = False
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    block_m: int = 16
    block_n: int = 16
    decode: bool = False
    in_turn: bool = False
    seed: int = 0
    targets: tuple[str, ...] = TARGETS


def random_case(seed: int) -> Case:
    """A case drawn from `seed`: small shapes, everything else in full."""
    draw = random.Random(seed)
    plan = draw.choice(PLANS)
    group, kv_heads = draw.choice(((1, 1), (1, 1), (1, 2), (2, 1)))
    tq = draw.choice((1, 2, 5, 15, 16, 17, 20, 33))
    tk = tq if draw.random() < 0.5 else draw.choice((1, 3, 16, 18, 32, 37))
    block_m, block_n = (64, 64) if plan == "tile" else draw.choice(((16, 16), (32, 16), (16, 32)))
    case = Case(
        plan=plan,
        dtype=draw.choice(tuple(DTYPES)),
        batch=draw.choice((1, 1, 1, 2)),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        tq=tq,
        tk=tk,
        head_dim=draw.choice((8, 16, 20, 24, 32, 59)),
        scale=draw.choice((0.25, 0.25, 1.0, 0.0, -0.3)),
        causal=draw.random() < 0.7,
        dropout_p=draw.choice((0.0, 0.0, 0.0, 0.2, 0.9)),
        lse_gradient=draw.random() < 0.3,
        layout=draw.choice(LAYOUTS),
        gradient_layout=draw.choice(GRADIENT_LAYOUTS),
        block_m=block_m,
        block_n=block_n,
        decode=draw.random() < 0.3,
        in_turn=seed // 2 % 2 == 1,
        seed=seed,
        targets=(TARGETS[seed % 2],),
    )
    if plan != "tiled":  # the one-launch backwards have neither a window nor a soft-cap
        return case
    window = draw.choice((None, None, 0, 1, 7, 16, 30)) if case.causal else None
    return dataclasses.replace(case, window=window, softcap=draw.choice((None, None, 0.7, 20.0)))


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x (B, H, T, D) in other strides; what lies between the rows is NaN."""
    batch, heads, time, head_dim = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "rows_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns_first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].expand(batch, -1, -1, -1)
    if layout == "scalar":
        return x.flatten()[0].expand(x.shape)
    assert layout == "gaps", layout
    buffer = x.new_full((batch, heads + 1, time + 3, head_dim + 5), float("nan"))
    view = buffer[:, 1:, 2 : 2 + time, 3 : 3 + head_dim]
    view.copy_(x)
    return view


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q_shape = (case.batch, case.heads, case.tq, case.head_dim)
    k_shape = (case.batch, case.kv_heads, case.tk, case.head_dim)
    q, k, v = normal(*q_shape), normal(*k_shape), normal(*k_shape)
    dout = lay_out(normal(*q_shape), case.gradient_layout)
    dlse = torch.randn(q_shape[:3], generator=generator)
    if case.layout == "packed" and case.tq == case.tk:
        # One (B, T, heads, D) buffer holds all three side by side, as the projection writes it.
        joined = torch.cat([x.transpose(1, 2) for x in (q, k, v)], dim=2)
        q, k, v = joined.transpose(1, 2).split((case.heads, case.kv_heads, case.kv_heads), dim=1)
    else:
        layout = "rows_first" if case.layout == "packed" else case.layout
        q, k, v = (lay_out(x, layout) for x in (q, k, v))
    return q, k, v, dout, dlse


def _run(function, case: Case, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    q, k, v, dout, dlse = tensors
    # A leaf of the same strides: what a cast to another dtype copies may be laid out as it likes.
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    seed = torch.tensor([case.seed * 7919 - 12345678901234], dtype=torch.int64) if case.dropout_p else None
    options = {"scale": case.scale, "causal": case.causal, "window": case.window, "softcap": case.softcap}
    out, lse = function(q, k, v, **options, dropout_p=case.dropout_p, seed=seed)
    outputs, gradients = [out], [dout.to(out.dtype)]
    if case.lse_gradient:
        outputs.append(lse)
        gradients.append(dlse.masked_fill(lse.isinf(), 0.0).to(lse.dtype))
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), gradients)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def judge(case: Case, tensors: tuple[torch.Tensor, ...] | None = None) -> None:
    """Raise unless out, lse and every gradient are as near to float64 as twice plain PyTorch in the same precision.

    Plain is `naive`. To twice its error comes one rounding of the largest number in play: where plain is exact (one
    key, say), the kernels still take delta from out as it was stored, and fp32 sums in another order.
    """
    tensors, dtype = tensors or inputs(case), DTYPES[case.dtype]
    plan = plan_of(case.plan, case.block_m, case.block_n, decode=case.decode, in_turn=case.in_turn)
    want = _run(naive.attention, case, tensors, torch.float64)
    plain = _run(naive.attention, case, tensors, dtype)
    largest = max(float(x.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max()) for x in want.values())
    rounding = (torch.finfo(dtype).eps + 1e-6) * largest
    for target in case.targets:
        with strict_interpreter(seed=case.seed, target=target), forced(plan):
            got = _run(flash.attention, case, tensors, dtype)
        for name in want:
            error, allowed = worst_error(got[name], want[name]), 2 * worst_error(plain[name], want[name]) + rounding
            assert error <= allowed, f"{name} on {target}: error {error:.3g}, allowed {allowed:.3g}, in {case}"
