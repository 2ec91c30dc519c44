"""Is a way to compute attention right? Judged against the reference in float64, before anybody times it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastchargpt.kernels import naive

__all__ = ["Parity", "attention_inputs", "check_attention", "forward_backward"]

# A kernel may err twice as much as plain PyTorch in its own number format (the measure of flash-attention's own tests),
# and, since it sums in another order, a few units in the last place of the largest true value: one in 16 bits, where
# the sums are fp32 and only the result is rounded. It may never err more than MOST_ULPS.
SLACK_ULPS = {2: 1, 4: 4, 8: 4}
MOST_ULPS = 64
# Scores that the float64 reference holds at a time: half a GB for each of its few T x T matrices.
REFERENCE_SCORES = 2**26

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest errors of an attention, as shares of what is allowed: up to 1 is right."""

    # of the output, and of the gradients of q, k and v, the worst of the three
    output: float
    gradients: float

    @property
    def right(self) -> bool:
        """Whether both keep within what is allowed (a NaN does not)."""
        return self.output <= 1.0 and self.gradients <= 1.0


def attention_inputs(
    batch: int, heads: int, time: int, head_dim: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal q, k, v, each (B, H, T, D) and asking for gradients, and a gradient of the output for them."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, heads, time, head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def forward_backward(attend: Attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v, for a gradient of the output."""
    out = attend(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), grad))


def check_attention(
    attend: Attend,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    eps: float | None = None,
) -> Parity:
    """Compare a causal attention, forward and gradients, with the definition.

    Heads do not depend on each other, so the reference recomputes only the first and last of the first and last
    sequence: where a wrong offset would show.

    Args:
        attend: called once as attend(q, k, v), each (B, H, T, D); scale D**-0.5.
        inputs: of `attention_inputs`.
        dropout_p: what `attend` drops, by the mask of `seed`; B must then be 1 and H at most 2, as a mask belongs to a
            head's number.
        seed: as `naive.attention` takes it.
        eps: the relative rounding of the products' operands where that is not the dtype's own: 2**-10 for tf32.
    """
    assert not dropout_p or (inputs[0].shape[0] == 1 and inputs[0].shape[1] <= 2), "heads would be renumbered"
    got = [_sampled(x) for x in forward_backward(attend, *inputs)]
    few = [_sampled(x) for x in inputs]
    scale = inputs[0].shape[-1] ** -0.5

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive.attention(q, k, v, scale=scale, causal=True, dropout_p=dropout_p, seed=seed)[0]

    true = forward_backward(plain, *(x.double().requires_grad_(i < 3) for i, x in enumerate(few)))
    same = forward_backward(plain, *(x.clone().requires_grad_(i < 3) for i, x in enumerate(few)))
    output, *gradients = (_share(*each, eps) for each in zip(got, true, same, strict=True))
    return Parity(output=output, gradients=max(gradients, key=lambda share: (math.isnan(share), share)))


def _sampled(x: Tensor) -> Tensor:
    """Some heads of (B, H, T, ...): (1, n, T, ...)."""
    pairs = [(b, h) for b in sorted({0, x.shape[0] - 1}) for h in sorted({0, x.shape[1] - 1})]
    pairs = pairs[-max(1, REFERENCE_SCORES // x.shape[2] ** 2) :]
    return torch.stack([x.detach()[b, h] for b, h in pairs])[None]


def _share(got: Tensor, true: Tensor, same: Tensor, eps: float | None) -> float:
    """The error of `got` as a share of what is allowed for its format."""
    true = true.detach()
    if got.shape != true.shape or got.dtype != same.dtype:
        return math.nan
    ulp = (eps or torch.finfo(got.dtype).eps) * float(true.abs().max())
    plain_error = float((same.detach().double() - true).abs().max())
    allowed = min(2 * plain_error + SLACK_ULPS[got.dtype.itemsize] * ulp, MOST_ULPS * ulp)
    return float((got.double() - true).abs().max()) / allowed if allowed else math.nan
