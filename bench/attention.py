"""The contestants of the attention contests, and the work and traffic that none of them can do without."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastchargpt.attention import causal_attention, causal_attention_packed
from fastchargpt.bench.contest import Absent, Contestant, allow_recompiles
from fastchargpt.parity import attention_inputs, check_attention

__all__ = ["CONTESTANTS", "PASSES", "Shape", "entrants", "floor_bytes", "flops", "shapes"]

Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """B sequences of H heads of T tokens, D channels a head."""

    batch: int
    heads: int
    time: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.time} D{self.head_dim}"


def shapes(device: torch.device, *, quick: bool) -> list[Shape]:
    """Shapes of one training step's work each: width 384, and as many tokens as fill the device.

    A CPU's contests are torch's alone, whose backends differ little with head_dim, and each takes it half a minute.
    """
    tokens = 16_384 if device.type == "cuda" else 1024 if quick else 4096
    if quick:
        sizes = [(64, 32), (256, 64), (1024, 64)]
    else:
        gpu = device.type == "cuda"
        times = (64, 128, 256, 512, 1024, *((2048, 4096, 8192) if gpu else ()))
        sizes = [(time, head_dim) for head_dim in ((32, 64, 128) if gpu else (64,)) for time in times]
    return [Shape(max(1, tokens // time), 384 // head_dim, time, head_dim) for time, head_dim in sizes]


def flops(shape: Shape, what: Pass) -> int:
    """Operations of the two (forward) or five (backward) products of causal attention, its half of the square."""
    product = shape.batch * shape.heads * shape.time**2 * shape.head_dim  # 2 per multiply-add, half of them masked
    return product * {"forward": 2, "backward": 5, "both": 7}[what]


def floor_bytes(shape: Shape, what: Pass, dtype: torch.dtype) -> int:
    """Bytes that must move: q, k, v in and out out; dout, q, k, v in and dq, dk, dv out."""
    tensor = shape.batch * shape.heads * shape.time * shape.head_dim * dtype.itemsize
    return tensor * {"forward": 4, "backward": 7, "both": 11}[what]


class Entry(NamedTuple):
    """How a contestant is called."""

    # on q, k, v (B, H, T, D), for the check, and for the race where `packed` is None
    attend: Attend
    # on qkv (B, T, 3 C), for the race
    packed: Callable[[Tensor], Tensor] | None = None
    # what must be in force around forward and backward
    scope: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def entrants(shape: Shape, what: Pass, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    """Every contestant for a shape, on the same inputs."""
    sizes = (shape.batch, shape.heads, shape.time, shape.head_dim)
    inputs = attention_inputs(*sizes, device=device, dtype=dtype)
    facts = {"flops": flops(shape, what), "bytes": floor_bytes(shape, what, dtype)}

    def build(name: str) -> Contestant:
        entry = CONTESTANTS[name](inputs[0])
        # from one packed qkv to (B, T, C) and back is more work than from heads apart: only those are rivals
        layout = {"match": "packed"} if entry.packed is not None else {}
        return Contestant(
            call=_timed(entry, inputs, what),
            check=lambda: _judge(entry, inputs),
            facts={**facts, "side": _side(name), **layout},
        )

    return {name: functools.partial(build, name) for name in CONTESTANTS}


def _side(name: str) -> str:
    return "ours" if name.startswith("triton") else "reference" if name == "naive" else "peer"


def _judge(entry: Entry, inputs: Inputs) -> str | None:
    with entry.scope():
        parity = check_attention(entry.attend, inputs)
    if parity.right:
        return None
    return (
        f"its errors against float64 are {parity.output:.2f} (output) and {parity.gradients:.2f} (gradients) times "
        "what plain PyTorch's own errors allow"
    )


def _timed(entry: Entry, inputs: Inputs, what: Pass) -> Callable[[], object]:
    *leaves, grad = inputs
    run: Callable[..., Tensor] = entry.attend
    if entry.packed is not None:
        run = entry.packed
        leaves = [torch.cat([x.detach().transpose(1, 2).flatten(2) for x in leaves], dim=2).requires_grad_()]
        grad = grad.transpose(1, 2).flatten(2)

    def forward() -> Tensor:
        with torch.no_grad(), entry.scope():
            return run(*leaves)

    def both() -> object:
        with entry.scope():
            return torch.autograd.grad(run(*leaves), leaves, grad)

    out: list[Tensor] = []

    def backward() -> object:
        with entry.scope():
            if not out:  # made by the first call, which is a warm-up
                out.append(run(*leaves))
            return torch.autograd.grad(out[0], leaves, grad, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both}[what]


def _ours(backend: str) -> Callable[[Tensor], Entry]:
    def prepare(q: Tensor) -> Entry:
        if backend == "triton" and q.device.type == "cpu":
            raise Absent("the Triton kernels need a GPU: what their interpreter takes on a CPU says nothing")
        return Entry(lambda q, k, v: causal_attention(q, k, v, backend=backend))

    return prepare


def _tiled(q: Tensor) -> Entry:
    """Our Triton kernels as for the longest sequences: the backward in two launches, never in one."""
    entry = _ours("triton")(q)
    from fastchargpt.kernels import tuning
    from fastchargpt.kernels.launch import problem_of

    longest = (*q.shape[:2], 2**30, q.shape[3])
    problem = problem_of(q, q, scale=1.0, causal=True)
    plan = tuning.plan(problem._replace(q_shape=longest, k_shape=longest))
    return entry._replace(scope=lambda: tuning.forced(plan))


def _packed(q: Tensor) -> Entry:
    """Our Triton kernels on the projection's own layout, which they read in place."""
    _ours("triton")(q)
    heads = q.shape[1]
    return _from_packed(lambda qkv: causal_attention_packed(qkv, heads, backend="triton"), heads)


def _sdpa_packed(q: Tensor) -> Entry:
    """torch's SDPA in a model, as nanoGPT has it: views of the projection, and a copy of the result."""
    heads = q.shape[1]

    def packed(qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return _from_packed(packed, heads)


def _from_packed(packed: Callable[[Tensor], Tensor], heads: int) -> Entry:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = packed(torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2))
        heads_apart: Tensor = out.unflatten(2, (heads, -1)).transpose(1, 2)
        return heads_apart

    return Entry(attend, packed=packed)


def _sdpa(kernel: str) -> Callable[[Tensor], Entry]:
    """torch's SDPA with only one of its kernels allowed."""

    def prepare(q: Tensor) -> Entry:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if q.device.type == "cpu" and kernel not in ("MATH", "FLASH_ATTENTION"):
            raise Absent("this kernel of SDPA runs on GPUs only")
        only = getattr(SDPBackend, kernel)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([only]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with contextlib.suppress(RuntimeError):
            attend(*(x[:1].detach() for x in (q, q, q)))
            return Entry(attend)
        raise Absent("torch has no such kernel for this device, dtype and shape")

    return prepare


def _flex(q: Tensor) -> Entry:
    if q.device.type == "cpu":
        raise Absent("FlexAttention has no backward pass on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    mask = create_block_mask(lambda b, h, row, column: row >= column, None, None, length, length, device=str(q.device))
    allow_recompiles()
    compiled = torch.compile(flex_attention, dynamic=False)
    return Entry(lambda q, k, v: compiled(q, k, v, block_mask=mask))


def _flash_attn(q: Tensor) -> Entry:
    if importlib.util.find_spec("flash_attn") is None:
        raise Absent("flash-attn is not installed")
    if q.device.type != "cuda" or q.dtype == torch.float32:
        raise Absent("flash-attn takes fp16 and bf16 on GPUs only")
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return out.transpose(1, 2)

    return Entry(attend)


# name -> what takes a sample of the queries and gives the entry, or raises Absent
CONTESTANTS: dict[str, Callable[[Tensor], Entry]] = {
    "naive": _ours("naive"),
    "sdpa": _ours("sdpa"),
    "sdpa-math": _sdpa("MATH"),
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "sdpa-efficient": _sdpa("EFFICIENT_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "sdpa-packed": _sdpa_packed,
    "triton": _ours("triton"),
    "triton-tiled": _tiled,
    "triton-packed": _packed,
    "flex": _flex,
    "flash-attn": _flash_attn,
}
