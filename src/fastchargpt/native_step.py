"""The native training step: loss and gradients of a GPT in one call, and its update in another, for CPUs in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels.cpu_decode import ACTIVATIONS
from fastchargpt.kernels.cpu_train import WIDTH, NativeTrainer, Rules, Update, library
from fastchargpt.layers import Block
from fastchargpt.model import GPT
from fastchargpt.optim import Muon, shape_factor

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
    if config.dropout > 0.0:
        return f"the native step has no dropout, and the model's is {config.dropout}"
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
    if type(optimizer) not in (torch.optim.AdamW, Muon):
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

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, *, scale: float = 1.0, add: bool = False) -> Tensor:
        """The mean loss, a 0-d tensor, and `.grad` of every weight: scale times the gradient, added up if `add`.

        Args:
            x: token ids, (B, T) int64, T at most block_size.
            y: the tokens that follow, (B, T) int64; -1 marks a position that does not count.
        """
        self._check(x)
        loss = self._native.run(x, y, self._weights, self._grads, self.model.rope, scale=scale, add=add)
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
        updates: list[Update] = []
        owners: list[int] = []
        rules = Rules(clip=grad_clip, momentum=0.0)
        number = 0
        for group in optimizer.param_groups:
            muon = group.get("muon", False)
            for weight in group["params"]:
                if muon:
                    assert isinstance(optimizer, Muon)
                    rules.momentum = group["momentum"]
                    first, second = optimizer.prepare(weight, group)["momentum_buffer"], None
                    rows = optimizer.blocks(weight)
                else:
                    first, second = self._moments(optimizer, weight, group, rules)
                    rows = (1,)
                columns = weight.numel() // sum(rows)
                at = 0
                for count in rows:
                    updates.append(
                        Update(
                            *(None if t is None else t.data_ptr() + 4 * at for t in (weight, weight.grad, first, second)),
                            count,
                            columns,
                            group["lr"],
                            group["weight_decay"],
                            shape_factor(count, columns),
                        )
                    )
                    owners.append(number)
                    at += count * columns
                number += 1
        norms = self._native.update(updates, rules)
        squares = torch.zeros(number, dtype=torch.float64)
        squares.index_add_(0, torch.tensor(owners), torch.from_numpy(norms).square())
        return squares.sqrt().float()

    def _moments(
        self, optimizer: torch.optim.Optimizer, weight: Tensor, group: dict[str, Any], rules: Rules
    ) -> tuple[Tensor, Tensor]:
        """AdamW's moments of a weight, begun if need be; counts the step."""
        state = optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        count = float(state["step"])
        rules.beta1, rules.beta2 = group["betas"]
        rules.eps = group["eps"]
        rules.correction1, rules.correction2 = 1.0 - rules.beta1**count, 1.0 - rules.beta2**count
        return state["exp_avg"], state["exp_avg_sq"]

    def _check(self, x: Tensor) -> None:
        limit = self.model.config.block_size
        if x.shape[1] > limit:
            raise ConfigError(
                f"a sequence of {x.shape[1]} tokens does not fit in block_size {limit}: crop it to the last {limit}"
            )
