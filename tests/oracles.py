"""What the attention backends are judged by: the definition in float64, loop by loop, and the notebook's head."""

import math

import torch

__all__ = ["attention_by_definition", "notebook_head", "qkv_case", "worst_error"]


def attention_by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    keep: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float64, one score at a time. `keep` (B, Hq, Tq, Tk) multiplies the weights (dropout)."""
    q, k, v = (x.detach().double() for x in (q, k, v))
    batch, heads, tq, head_dim = q.shape
    tk, group = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, tq, head_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, tq), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(tq):
                place = i + tk - tq
                seen = [j for j in range(tk) if not causal or j <= place]
                seen = [j for j in seen if window is None or j >= place - window]
                scores = [scale * float((q[b, h, i] * k[b, h // group, j]).sum()) for j in seen]
                scores = [s if softcap is None else softcap * math.tanh(s / softcap) for s in scores]
                if not scores:
                    continue
                top = max(scores)
                total = math.fsum(math.exp(s - top) for s in scores)
                lse[b, h, i] = top + math.log(total)
                for j, s in zip(seen, scores, strict=True):
                    weight = math.exp(s - top) / total * (1.0 if keep is None else float(keep[b, h, i, j]))
                    out[b, h, i] += weight * v[b, h // group, j]
    return out, lse


def notebook_head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (4, 1, 8, 16) of the notebook's cell "self-attention block": seed 1337, C 32, head_size 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        x = torch.randn(4, 8, 32)
        key, query, value = (torch.nn.Linear(32, 16, bias=False) for _ in range(3))
        with torch.no_grad():
            k, q, v = key(x), query(x), value(x)
    return q[:, None], k[:, None], v[:, None]


def qkv_case(
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    tq: int = 5,
    tk: int | None = None,
    head_dim: int = 16,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal q, k, v of the shapes asked for, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, tk = heads if kv_heads is None else kv_heads, tq if tk is None else tk
    shapes = ((batch, heads, tq, head_dim), (batch, kv_heads, tk, head_dim), (batch, kv_heads, tk, head_dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes)
    return q, k, v


def worst_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest absolute difference, in float64; infinities must agree in place and sign."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), "infinities differ"
    return float((got - want)[~infinite].abs().max()) if (~infinite).any() else 0.0
