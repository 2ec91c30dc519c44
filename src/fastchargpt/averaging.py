"""Averaged weights: an exponential moving average of what the steps went through, often better than where they end."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastchargpt.sharding import local, piece_like, whole_state

__all__ = ["WeightAverage"]


class WeightAverage:
    """The mean of a model's weights after each step, a step `n` steps ago counting decay**n.

    It begins at zero and is divided by the weight that it has seen, 1 - decay**updates, as Adam's moments are, so that
    the initial weights are not in it. One operation a step over all weights, on their device and in their format.

    Args:
        model: whose weights are averaged.
        decay: in (0, 1); the average reaches back about 1 / (1 - decay) steps.

    Attributes:
        updates: steps averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._sums = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def add(self) -> None:
        """Take in the present weights; `updates` is counted by the caller, as a captured step runs no Python."""
        sums, weights = ([local(tensor) for tensor in each.values()] for each in (self._sums, self._weights))
        torch._foreach_lerp_(sums, weights, 1.0 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; the others are back, bit for bit, afterwards."""
        if self.updates == 0:
            yield
            return
        own = {name: local(weight).clone() for name, weight in self._weights.items()}
        seen = 1.0 - self.decay**self.updates
        try:
            for name, weight in self._weights.items():
                torch.div(local(self._sums[name]), seen, out=local(weight))
            yield
        finally:
            for name, weight in self._weights.items():
                local(weight).copy_(own[name])

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """The average so far, with whole tensors; `keep` as in `whole_state`."""
        return {"updates": self.updates, "sums": whole_state(self._sums, keep=keep)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: it is another model's.
        """
        if state["sums"].keys() != self._sums.keys():
            raise ValueError("the averaged weights are another model's")
        for name, own in self._sums.items():
            if state["sums"][name].shape != own.shape:
                raise ValueError(f"the average of {name} is not of its shape")
            local(own).copy_(local(piece_like(state["sums"][name], own)))
        self.updates = int(state["updates"])
