"""What the operators of flash.py count as work: as torch counts SDPA, two products forward and five backward.

The causal half is not left out, as torch does not; a query with a window sees no more than window + 1 keys. The
arguments of a formula are those of its operator, tensors given as their shapes; the last two are window and softcap.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["FORMULAS"]


def _flops(batch: int, heads: int, tq: int, tk: int, head_dim: int, window: int | None) -> int:
    return 2 * 2 * batch * heads * tq * (tk if window is None else min(tk, window + 1)) * head_dim


def _forward(q: torch.Size, k: torch.Size, v: torch.Size, *options: Any, **_: Any) -> int:
    batch, heads, tq, head_dim = q
    return _flops(batch, heads, tq, k[2], head_dim, options[-2])


def _backward(
    dout: torch.Size, dlse: torch.Size | None, q: torch.Size, k: torch.Size, v: torch.Size, *options: Any, **_: Any
) -> int:
    return 5 * _forward(q, k, v, *options) // 2


def _packed_forward(qkv: torch.Size, seed: Any, n_head: int, n_kv_head: int, *options: Any, **_: Any) -> int:
    batch, time, width = qkv
    return _flops(batch, n_head, time, time, width // (n_head + 2 * n_kv_head), options[-2])


def _packed_backward(
    dout: torch.Size,
    dlse: torch.Size | None,
    qkv: torch.Size,
    out: torch.Size,
    lse: torch.Size,
    seed: torch.Size | None,
    n_head: int,
    n_kv_head: int,
    *options: Any,
    **_: Any,
) -> int:
    return 5 * _packed_forward(qkv, seed, n_head, n_kv_head, *options) // 2


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "attention_packed_forward": _packed_forward,
    "attention_packed_backward": _packed_backward,
}
