"""Optimisers, their parameter groups and the learning-rate schedule."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastchargpt.config import TrainConfig
from fastchargpt.layers import Block
from fastchargpt.model import GPT
from fastchargpt.sharding import is_sharded, piece_like, whole

__all__ = [
    "AdamW",
    "Muon",
    "learning_rate_at",
    "make_adamw",
    "make_muon",
    "make_optimizer",
    "orthogonalise",
    "parameter_groups",
    "shape_factor",
]

# Newton-Schulz: the coefficients and the number of steps of Muon's author
# (https://kellerjordan.github.io/posts/muon); they take singular values into about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
ORTHOGONALISING_STEPS = 5


class _Light(torch.optim.Optimizer):
    """An optimiser that works without torch._dynamo, whose import takes a second or two.

    torch's own methods are wrapped to hide them from a compiler, and the wrapper imports it. No compiled code calls
    them.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(_Light, torch.optim.AdamW):
    """torch's AdamW, made without waiting."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, nanoGPT's rule: matrices and embeddings decay, vectors (biases, norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(model: nn.Module, *, weight_decay: float, learning_rate: float, betas: tuple[float, float]) -> AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`, in torch's fused form where the device has one."""
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cuda", "cpu", "mps", "xpu"}
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused or None)


@torch.no_grad()
def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with their singular values taken to about 1, by Newton-Schulz on all at once.

    On a GPU the products are in bfloat16, which the iteration tolerates; on a CPU in the matrices' own type.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ORTHOGONALISING_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).type_as(matrices)


def shape_factor(rows: int, columns: int) -> float:
    """Muon's factor of the learning rate for a matrix of this shape, so that its outputs change alike."""
    return math.sqrt(max(1.0, rows / columns))


class Muon(_Light):
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices, AdamW for everything else.

    A matrix's momentum is orthogonalised before it is applied. Matrices that lie stacked in one weight, as queries,
    keys and values do, are orthogonalised one by one. Where weights lie in pieces on several processes, each gathers
    the whole updates, orthogonalises all of them and applies its own pieces.

    Args:
        matrices: weights (R, C), each with the rows of the matrices stacked in it.
        others: AdamW's parameter groups.
        lr: AdamW's learning rate.
        matrix_lr: Muon's.
        momentum: Muon's, in Nesterov's form.
        betas, eps: AdamW's.
        weight_decay: Muon's; the groups of `others` name their own.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, tuple[int, ...]]],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        matrix_lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = [{"muon": False, "lr_scale": 1.0, **group} for group in others]
        if matrices:
            scale = matrix_lr / lr if lr > 0.0 else 0.0
            weights = [weight for weight, _ in matrices]
            groups.append({"params": weights, "muon": True, "lr_scale": scale, "lr": matrix_lr})
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            # as torch's AdamW has it: the rates are tensors and the counts lie on the device, for a CUDA graph
            "capturable": False,
        }
        super().__init__(groups, defaults)
        self._rows = {id(weight): rows for weight, rows in matrices}

    def blocks(self, weight: Tensor) -> tuple[int, ...]:
        """The rows of the matrices stacked in a weight."""
        return self._rows[id(weight)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["muon"]:
                self._muon(weights, group)
            elif weights:
                self._adamw(weights, group)
        return loss

    def prepare(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """A weight's state, begun if need be."""
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            if group["muon"]:
                state["momentum_buffer"] = torch.zeros_like(weight)
            else:
                device = weight.device if group.get("capturable") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def _adamw(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.prepare(weight, group) for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        capturable = bool(group.get("capturable"))
        adamw(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=not capturable,
            fused=capturable,
            capturable=capturable,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        momentum, rate, decay = group["momentum"], group["lr"], group["weight_decay"]
        updates = self._nesterov(weights, group, momentum)
        if decay:
            torch._foreach_mul_(weights, 1.0 - rate * decay)
        # (weight's part, its update), equal shapes together so that they are orthogonalised in one batch
        parts: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        changes: list[tuple[Tensor, Tensor]] = []  # (weight in pieces, its whole change)
        for weight, update in zip(weights, updates, strict=True):
            target = weight
            if is_sharded(weight):
                target = torch.zeros_like(update)
                changes.append((weight, target))
            rows = self.blocks(weight)
            for part, block in zip(target.split(rows), update.split(rows), strict=True):
                parts.setdefault(tuple(part.shape), []).append((part, block))
        for shape, pairs in parts.items():
            targets, blocks = zip(*pairs, strict=True)
            change = orthogonalise(torch.stack(blocks)).mul_(-rate * shape_factor(*shape))
            torch._foreach_add_(targets, change.unbind())
        for weight, change in changes:
            weight.add_(piece_like(change, weight))

    def _nesterov(self, weights: list[Tensor], group: dict[str, Any], momentum: float) -> list[Tensor]:
        """Each weight's whole update before it is orthogonalised; its momentum goes on."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        buffers = [self.prepare(weight, group)["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        return [whole(update) for update in torch._foreach_lerp(gradients, buffers, momentum)]


def make_muon(
    model: GPT,
    *,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float = 0.95,
) -> Muon:
    """Muon for the matrices of a GPT's blocks; AdamW for its embeddings and head, without decay, and its vectors."""
    matrices: list[tuple[Tensor, tuple[int, ...]]] = []
    for block in model.transformer.h:
        assert isinstance(block, Block)
        attention = block.attn
        kv = attention.n_kv_head * attention.head_dim
        matrices.append((attention.c_attn.weight, (model.config.n_embd, kv, kv)))
        for linear in (attention.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            matrices.append((linear.weight, (linear.out_features,)))
    taken = {id(weight) for weight, _ in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return Muon(
        matrices,
        [{"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        matrix_lr=matrix_learning_rate,
        momentum=momentum,
        betas=betas,
        weight_decay=weight_decay,
    )


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that a config names."""
    betas = (config.beta1, config.beta2)
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "muon":
        return make_muon(
            model,
            learning_rate=rate,
            matrix_learning_rate=config.matrix_learning_rate,
            weight_decay=decay,
            betas=betas,
            momentum=config.momentum,
        )
    return make_adamw(model, weight_decay=decay, learning_rate=rate, betas=betas)


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
