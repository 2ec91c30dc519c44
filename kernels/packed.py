"""Views of what a projection leaves: (B, T, heads * D), all query heads, then all key heads, then all value heads."""

import torch

__all__ = ["by_head", "unpack"]


def by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, H, T, D) of x (B, T, H * D)."""
    batch, time, width = x.shape
    return x.view(batch, time, heads, width // heads).transpose(1, 2)


def unpack(qkv: torch.Tensor, n_head: int, n_kv_head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, Hq, T, D), k and v (B, Hkv, T, D) of qkv (B, T, (Hq + 2 Hkv) * D)."""
    heads = by_head(qkv, n_head + 2 * n_kv_head)
    q, k, v = torch.split_with_sizes(heads, (n_head, n_kv_head, n_kv_head), dim=1)
    return q, k, v
