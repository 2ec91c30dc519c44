"""Optimisers, their parameter groups and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from fastchargpt.config import TrainConfig

__all__ = ["learning_rate_at", "make_adamw", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, nanoGPT's rule: matrices and embeddings decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, weight_decay: float, learning_rate: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`, in torch's fused form where the device has one."""
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cuda", "cpu", "mps", "xpu"}
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused or None)


def learning_rate_at(iteration: int, config: TrainConfig) -> float:
    """The learning rate of step `iteration`, counted from 0.

    A linear warm-up, then the schedule: `cosine` and `linear` fall from learning_rate to min_lr at lr_decay_iters and
    stay there; `wsd` stays high and falls linearly over the last cooldown_fraction of the steps after the warm-up
    (arXiv:2405.18392); `constant` stays. Warm-up and cosine equal nanoGPT's to the last bit.
    """
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.learning_rate
    decay_end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if iteration > decay_end:
        return config.min_lr
    start: float = config.warmup_iters
    if config.schedule == "wsd":
        start = decay_end - config.cooldown_fraction * (decay_end - config.warmup_iters)
        if iteration <= start:
            return config.learning_rate
    done = (iteration - start) / (decay_end - start) if decay_end > start else 1.0
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.min_lr + share * (config.learning_rate - config.min_lr)
