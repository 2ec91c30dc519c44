"""Attention under a mask that someone else made: torch's SDPA, or the scores written out where they are capped."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["masked_attention"]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Attention of q (B, Hq, Tq, D) over k and v (B, Hkv, Tk, D), Hq a multiple of Hkv: out (B, Hq, Tq, D).

    Args:
        q, k, v: one dtype and device, any strides.
        mask: broadcastable to (B, Hq, Tq, Tk); boolean (True is seen) or added to the scores.
        scale: what the scores are multiplied by; None is D**-0.5.
        dropout_p: probability of dropping a weight, by torch's generator.
        softcap: what bounds the scaled scores, as softcap * tanh(score / softcap), before the mask; SDPA has none, so
            the (B, Hq, Tq, Tk) scores are in memory then.

    Returns:
        out; a query that a boolean mask shows no key gives 0.
    """
    if q.shape[1] != k.shape[1]:  # SDPA's own grouping leaves its fast kernels where there is a mask
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    added = mask if mask.dtype != torch.bool else None
    blind = None if added is not None else ~mask.any(-1, keepdim=True)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask if added is None else added.to(q.dtype), dropout_p=dropout_p, scale=scale
        )
    else:
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = (q @ k.transpose(-2, -1)).to(accumulate) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = (scores / softcap).tanh() * softcap
        if blind is None:
            scores = scores + mask
        else:  # the rows without a key see all of them, so that no softmax is over nothing
            scores = scores.masked_fill(~(mask | blind), float("-inf"))
        out = F.dropout(scores.softmax(-1), dropout_p).to(v.dtype) @ v
    # what a kernel makes of an empty softmax is its own affair
    return out if blind is None else out.masked_fill(blind, 0.0)
