"""The sampling knobs as pure functions: logits (B, V) in, logits out; at the end, logits and a uniform to a token.

B sequences, V tokens in the vocabulary. No function changes its argument, and each row is treated by itself, so a
sequence's draw does not depend on its neighbours in the batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "add_bias",
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "keep_typical",
    "penalise_counts",
    "penalise_repeats",
    "uniforms",
]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """(B, V) -> (B, V): -inf below the k-th largest logit of the row; ties with it stay; k over V keeps all."""
    if k >= logits.size(-1):
        return logits
    kth = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) -> (B, V): keep the fewest likeliest tokens whose probabilities sum to at least p, never none.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", equation 3.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    prob = ordered.softmax(dim=-1)
    before = prob.cumsum(dim=-1) - prob  # the mass of the likelier tokens: one stays while that is short of p
    drop = before >= p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """(B, V) -> (B, V): keep tokens whose probability is at least p times that of the likeliest.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling". In logits the rule is a distance from the
    largest, so no softmax is needed.
    """
    if p == 0:
        return logits
    floor = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < floor, -math.inf)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """(B, V) -> (B, V): keep the tokens whose surprise is nearest the mean surprise, until their mass is at least p.

    Source: Meister et al. 2023, "Locally Typical Sampling", equation 11.
    """
    logp = logits.log_softmax(dim=-1)
    prob = logp.exp()
    entropy = -torch.where(prob > 0, prob * logp, 0.0).sum(dim=-1, keepdim=True)
    distance, order = (-logp - entropy).abs().sort(dim=-1, stable=True)
    ordered = prob.gather(-1, order)
    drop = (ordered.cumsum(dim=-1) - ordered >= p) | distance.isinf()
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(B, V), seen (B, V) bool -> (B, V): seen tokens' logits are divided by the penalty, or times it below zero.

    Source: Keskar et al. 2019, "CTRL", section 4.1, with the sign cared for as everyone does since.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """(B, V), counts (B, V) -> (B, V): minus presence where a token was drawn, minus frequency for each time."""
    return logits - presence * (counts > 0).to(logits.dtype) - frequency * counts.to(logits.dtype)


def add_bias(logits: Tensor, bias: Tensor) -> Tensor:
    """(B, V), bias (V,) -> (B, V). A ban is a bias of -inf."""
    return logits + bias


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """(B, V), u (B,) float64 in [0, 1) -> tokens (B,) int64: the first token whose cumulative probability exceeds u.

    In float64 and one row at a time, so a row's token does not depend on the other rows. A token of probability 0 is
    never drawn: its cumulative probability is that of the token before it. u must stay on a grid of 2**-32, which
    keeps u * total below total when it is rounded.
    """
    weight = (logits - logits.amax(dim=-1, keepdim=True)).double().exp_()
    cumulative = weight.cumsum_(dim=-1)
    return torch.searchsorted(cumulative, cumulative[..., -1:] * u[..., None], right=True)[..., 0]


def uniforms(seeds: Sequence[int], start: int, count: int) -> Tensor:
    """Uniform numbers (len(seeds), count) float64 in [0, 1) on a grid of 2**-32: draws start .. start + count - 1.

    Row i depends on seeds[i] alone (a Philox counter keyed by the seed), and draw n of a seed is always the same
    number, on every machine and whatever was drawn before.
    """
    rows = np.empty((len(seeds), count), dtype=np.uint64)
    # one generator, set anew for each seed: to make one takes numpy ten times as long
    generator = np.random.Philox(key=0)
    state = generator.state
    for row, seed in zip(rows, seeds, strict=True):
        state["state"]["key"][:] = seed, 0
        # Philox makes four numbers for each value of its counter
        state["state"]["counter"][:] = start // 4, 0, 0, 0
        generator.state = state
        row[:] = generator.random_raw(start % 4 + count)[start % 4 :]
    return torch.from_numpy((rows >> np.uint64(32)).astype(np.float64) * 2.0**-32)
