"""The readable oracle: the notebook's masked softmax, made exact for every option. It judges the other backends.

The only place that builds a T x T mask. Source: the notebook's single head ("self-attention block", cell 28):
`wei = q @ k^T * scale; wei = wei.masked_fill(tril == 0, -inf); softmax(wei) @ v`.
"""

import torch

from .philox import keep_mask, keep_probability

__all__ = ["attention"]


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
    """Softmax attention of q (B, Hq, Tq, D) over k, v (B, Hkv, Tk, D), any float dtype and strides.

    Causal rows are aligned bottom-right: query i sees the keys up to i + Tk - Tq. A query that sees nothing gives 0.
    With a `window` (causal only) it sees those from i + Tk - Tq - window on. `softcap` bounds the scaled scores, as
    softcap * tanh(score / softcap), before anything is hidden.
    `seed`, (1,) int64, is needed when `dropout_p` > 0 and chooses the same mask as the Triton kernels.

    Returns:
        out (B, Hq, Tq, D) in q's dtype and the log-sum-exp of the scaled, capped scores before dropout, (B, Hq, Tq)
        float32 (float64 for float64 inputs), -inf for a query that sees nothing. Both are differentiable.
    """
    batch, heads, tq, head_dim = q.shape
    tk, group = k.shape[2], heads // k.shape[1]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The queries that see no key are known beforehand: they are the first ones, and are left out of the softmax.
    blind = (max(tq - tk, 0) if causal else 0) if tk else tq
    q = q[:, :, blind:]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    scores = (q @ k.transpose(-2, -1)).to(accumulate) * scale  # (B, Hq, Tq - blind, Tk)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if causal:
        visible = torch.ones(tq - blind, tk, dtype=torch.bool, device=q.device).tril(tk - (tq - blind))
        if window is not None:
            visible = visible.triu(tk - (tq - blind) - window)
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1)
    if dropout_p > 0.0:
        assert seed is not None, "dropout needs a seed"
        keep = keep_mask(seed, batch, heads, tq - blind, tk, dropout_p, first_row=blind)
        weights = weights.masked_fill(~keep, 0.0) / keep_probability(dropout_p)
    out, lse = weights.to(v.dtype) @ v, scores.logsumexp(dim=-1)
    if blind:
        out = torch.cat((out.new_zeros(batch, heads, blind, head_dim), out), dim=2)
        lse = torch.cat((lse.new_full((batch, heads, blind), float("-inf")), lse), dim=2)
    return out, lse
