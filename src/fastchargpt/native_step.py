"""The native training step: loss and gradients of a GPT in one call, and its update in another, for CPUs in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels.cpu_decode import ACTIVATIONS
from fastchargpt.kernels.cpu_train import WIDTH, NativeTrainer, Rules, Update, library
from fastchargpt.kernels.philox import draw_seeds, dropout_threshold
from fastchargpt.layers import Block
from fastchargpt.model import GPT
from fastchargpt.optim import AdamW, Muon, shape_factor

__all__ = ["NativeStep", "native_step_problem", "native_update_problem"]


def native_step_problem(model: nn.Module) -> str | None:
    """Why this model cannot be trained natively here; None where it can. Builds the library if need be."""
    if type(model) is not GPT:
        return f"the native step is for fastchargpt's GPT, and the model is a {type(model).__name__}"
    config = model.config
    weights = list(model.parameters())
    devices = {weight.device.type for weight in weights}
    if devices != {"cpu"}:
        return f"the native step is for CPUs, and the model is on {', '.join(sorted(devices))}"
    dtypes = {weight.dtype for weight in weights}
    if dtypes != {torch.float32}:
        return f"the native step is for float32, and the model has {', '.join(sorted(str(d)[6:] for d in dtypes))}"
    if config.n_embd % WIDTH or config.head_dim % WIDTH:
        return (
            f"the native step needs widths that are multiples of {WIDTH}, and n_embd is {config.n_embd}, "
            f"head_dim {config.head_dim}"
        )
    if config.activation not in ACTIVATIONS:
        return f"the native step has no {config.activation}"
    if not all(weight.requires_grad and weight.is_contiguous() for weight in weights):
        return "the native step trains every weight, and some are frozen or not contiguous"
    if any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules()):
        return "the native step runs no hooks, and the model has some"
    if any(block.attn.backend != "auto" for block in model.transformer.h if isinstance(block, Block)):
        return "an attention backend was asked for by name"
    try:
        library()
    except BackendUnavailableError as error:
        return str(error)
    return None


def native_update_problem(optimizer: torch.optim.Optimizer) -> str | None:
    """Why this optimiser's step is left to torch; None where the native one can take it."""
    if type(optimizer) not in (torch.optim.AdamW, AdamW, Muon):
        return f"the native update is for AdamW and Muon, and the optimiser is {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        if group.get("amsgrad") or group.get("maximize") or group.get("differentiable"):
            return "the native update has no amsgrad, maximize or differentiable"
        if group.get("muon") and any(weight.shape[1] % WIDTH for weight in group["params"]):
            return f"the native Muon needs widths that are multiples of {WIDTH}"
    return None


class NativeStep:
    """Loss and gradients of a model by kernels/cpu_train.cpp, with as many threads as torch has.

    Args:
        model: one that `native_step_problem` has nothing against.

    Raises:
        BackendUnavailableError: there is something against it.
    """

    def __init__(self, model: GPT) -> None:
        if (problem := native_step_problem(model)) is not None:
            raise BackendUnavailableError(problem)
        self.model = model
        config = model.config
        parts = model.transformer
        ints = [
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_dim,
            config.vocab_size,
            config.norm == "rmsnorm",
            ACTIVATIONS[config.activation],
            config.qk_norm,
            config.position == "rope",
            torch.get_num_threads(),
            0 if parts.wpe is None else config.block_size,
            dropout_threshold(config.dropout),
            config.embd_dropout,
        ]
        self._native = NativeTrainer([int(value) for value in ints], config.logit_softcap or 0.0)
        self._weights: list[Tensor | None] = [parts.wte.weight, None if parts.wpe is None else parts.wpe.weight]
        for block in parts.h:
            assert isinstance(block, Block)
            for module in (
                block.ln_1,
                block.attn.c_attn,
                block.attn.c_proj,
                block.ln_2,
                block.mlp.c_fc,
                block.mlp.c_proj,
            ):
                self._weights += [getattr(module, "weight", None), getattr(module, "bias", None)]
        for module in (parts.ln_f, model.lm_head):
            self._weights += [getattr(module, "weight", None), getattr(module, "bias", None)]
        # one gradient for a weight that two layers share
        made = {id(weight): torch.empty_like(weight) for weight in self._weights if weight is not None}
        self._grads = [None if weight is None else made[id(weight)] for weight in self._weights]
        self._plan: _UpdatePlan | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, *, scale: float = 1.0, add: bool = False) -> Tensor:
        """The mean loss, a 0-d tensor, and `.grad` of every weight: scale times the gradient, added up if `add`.

        In training mode a model's dropout draws its masks from seeds of torch's generator, which advances once a call.

        Args:
            x: token ids, (B, T) int64, T at most block_size.
            y: the tokens that follow, (B, T) int64; -1 marks a position that does not count.
        """
        self._check(x)
        seeds = None
        if self.model.training and self.model.config.dropout > 0.0:
            seeds = draw_seeds(3 * self.model.config.n_layer + 1)
        loss = self._native.run(x, y, self._weights, self._grads, self.model.rope, seeds=seeds, scale=scale, add=add)
        for weight, grad in zip(self._weights, self._grads, strict=True):
            if weight is not None:
                weight.grad = grad
        return torch.tensor(loss)

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss alone, a 0-d tensor; arguments as for a call."""
        self._check(x)
        return torch.tensor(self._native.run(x, y, self._weights, None, self.model.rope))

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> Tensor:
        """Clip the gradients and take the optimiser's step, on its own state: it can go on in torch, and the other way.

        Args:
            optimizer: one that `native_update_problem` has nothing against.
            grad_clip: largest norm of all gradients; 0 for no clipping.

        Returns:
            The norm of each weight's gradient before clipping, (weights,) float32, in the order of the groups.
        """
        if self._plan is None or not self._plan.holds(optimizer):
            self._plan = _UpdatePlan(optimizer)
        return self._plan.run(self._native, grad_clip)

    @property
    def held_bytes(self) -> int:
        """Bytes held between calls, outside torch's allocator: activations of the shape last seen, packed weights."""
        return self._native.held_bytes

    def _check(self, x: Tensor) -> None:
        limit = self.model.config.block_size
        if x.shape[1] > limit:
            raise ConfigError(
                f"a sequence of {x.shape[1]} tokens does not fit in block_size {limit}: crop it to the last {limit}"
            )


class _UpdatePlan:
    """An optimiser's tensors as the native update takes them, laid out once: only the learning rates change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._rules = Rules(momentum=0.0, correction1=1.0, correction2=1.0)
        self._steps: list[Tensor] = []
        self._owners: list[int] = []  # of each entry, its weight's number
        self._groups: list[dict[str, Any]] = []  # and its group
        updates: list[Update] = []
        weights = [(weight, group) for group in optimizer.param_groups for weight in group["params"]]
        self._count = len(weights)
        for number, (weight, group) in enumerate(weights):
            rows, first, second = self._state(weight, group)
            columns = weight.numel() // sum(rows)
            tensors = [weight, weight.grad, first, second]
            at = 0
            for count in rows:
                addresses = [None if tensor is None else tensor.data_ptr() + 4 * at for tensor in tensors]
                updates.append(Update(*addresses, count, columns, 0.0, 0.0, shape_factor(count, columns)))
                self._owners.append(number)
                self._groups.append(group)
                at += count * columns
        self._updates = (Update * len(updates))(*updates)
        self._addresses = self._now()
        self._index = torch.tensor(self._owners)

    def _state(self, weight: Tensor, group: dict[str, Any]) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
        """The rows of the weight's parts and its moments, begun if need be."""
        if isinstance(self._optimizer, Muon):
            state = self._optimizer.prepare(weight, group)
            if group["muon"]:
                self._rules.momentum = group["momentum"]
                return self._optimizer.blocks(weight), state["momentum_buffer"], None
        else:
            state = self._optimizer.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        self._rules.beta1, self._rules.beta2 = group["betas"]
        self._rules.eps = group["eps"]
        self._steps.append(state["step"])
        return (1,), state["exp_avg"], state["exp_avg_sq"]

    def _now(self) -> list[int]:
        tensors = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        tensors += [tensor for state in self._optimizer.state.values() for tensor in state.values()]
        return [tensor.data_ptr() for tensor in tensors]

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimiser still has the tensors it had: loading a state replaces them."""
        return optimizer is self._optimizer and self._addresses == self._now()

    def run(self, native: NativeTrainer, grad_clip: float) -> Tensor:
        """Take the step; the norm of each weight's gradient."""
        rules = self._rules
        rules.clip = grad_clip
        if self._steps:
            torch._foreach_add_(self._steps, 1)
            count = float(self._steps[0])
            rules.correction1, rules.correction2 = 1.0 - rules.beta1**count, 1.0 - rules.beta2**count
        for update, group in zip(self._updates, self._groups, strict=True):
            update.rate, update.decay = group["lr"], group["weight_decay"]
            if group.get("muon"):
                rules.momentum = group["momentum"]
        squares = torch.from_numpy(native.update(self._updates, rules)).square_()
        return torch.zeros(self._count, dtype=torch.float64).index_add_(0, self._index, squares).sqrt_().float()
