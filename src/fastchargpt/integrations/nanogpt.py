"""nanoGPT's model.py, served by fastchargpt: its train.py, sample.py and bench.py run on this one line in its place.

    from fastchargpt.integrations.nanogpt import GPT, GPTConfig  # the whole of model.py

Constructor, config fields, methods, state-dict names, the layout of ckpt.pt and what is printed are nanoGPT's.

To keep nanoGPT's model and change its attention alone:

    from fastchargpt.integrations.nanogpt import accelerate, restore
    accelerate(model)  # any live model with nanoGPT's attention in it
    restore(model)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastchargpt import config as ours
from fastchargpt import model as our_model
from fastchargpt.attention import BACKENDS, causal_attention_packed
from fastchargpt.errors import ConfigError, nearest
from fastchargpt.layers import CausalSelfAttention

__all__ = ["GPT", "AcceleratedAttention", "GPTConfig", "accelerate", "restore"]

A100_FLOPS = 312e12
M = TypeVar("M", bound=nn.Module)


@dataclass
class GPTConfig:
    """nanoGPT's config: its seven fields and defaults, to be changed at will until the model is made."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(our_model.GPT):
    """nanoGPT's GPT.

    Args:
        config: nanoGPT's config (this module's, or any object with exactly its fields), or fastchargpt's own.

    Attributes:
        config: fastchargpt's config, which has nanoGPT's fields under their names and cannot be changed in place.

    Raises:
        ConfigError: a field breaks a rule, or nanoGPT's model has no such field.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(_our_config(config))
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> "GPT":
        """GPT-2's weights in nanoGPT's model, which computes the exact GELU where GPT-2 computes its tanh form.

        Args:
            model_type: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads; or a folder that
                transformers saved.
            override_args: `dropout` alone may be given; GPT-2's own rate is not taken over.

        Raises:
            CheckpointError: there are no such weights, or they are not GPT-2's.
            ConfigError: another field is overridden.
        """
        print(f"loading weights from pretrained gpt: {model_type}")
        model = our_model.GPT.from_pretrained(model_type, {"dropout": 0.0, **(override_args or {})})
        return cls.from_state_dict(dataclasses.replace(model.config, activation="gelu"), model.state_dict())

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW on nanoGPT's parameter groups; fused on a CPU too, where torch can."""
        optimizer = super().configure_optimizers(weight_decay, learning_rate, betas, device_type)
        for group, kind in zip(optimizer.param_groups, ("decayed", "non-decayed"), strict=True):
            count = sum(parameter.numel() for parameter in group["params"])
            print(f"num {kind} parameter tensors: {len(group['params'])}, with {count:,} parameters")
        print(f"using fused AdamW: {bool(optimizer.param_groups[0]['fused'])}")
        return optimizer

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, dtype: torch.dtype | None = None) -> float:
        """The share of an A100's bf16 peak that a step of `dt` seconds reaches, on any device: nanoGPT's figure.

        `fastchargpt.GPT.estimate_mfu` measures against the device's own peak.
        """
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / A100_FLOPS


def _our_config(config: Any) -> ours.GPTConfig:
    if isinstance(config, ours.GPTConfig):
        return config
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    fields = dict(vars(config))
    for name in fields:
        if name not in names:
            raise ConfigError(f"nanoGPT's model has no config field {name!r}{nearest(name, names)}")
    return ours.config_from_dict(ours.GPTConfig, fields)


class AcceleratedAttention(nn.Module):
    """Stands in for nanoGPT's CausalSelfAttention, (B, T, C) -> (B, T, C), holding the very parameters it held."""

    c_attn: nn.Linear
    c_proj: nn.Linear
    resid_dropout: nn.Dropout

    def __init__(self, original: nn.Module, backend: str) -> None:
        super().__init__()
        self.n_head, self.backend = int(original.n_head), backend  # type: ignore[arg-type]
        self.dropout = float(_dropout(original))
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, buffer in original.named_buffers(recurse=False):  # the mask of nanoGPT on an old torch
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        # kept out of the module tree: its parameters are in it already
        object.__setattr__(self, "original", original)
        self.train(original.training)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Attend to the positions up to each one's own."""
        dropout_p = self.dropout if self.training else 0.0
        y_BTC = causal_attention_packed(self.c_attn(x_BTC), self.n_head, dropout_p=dropout_p, backend=self.backend)
        out: Tensor = self.resid_dropout(self.c_proj(y_BTC))
        return out


def accelerate(model: M, *, backend: str = "auto") -> M:
    """Swap the attention of a live nanoGPT model for fastchargpt's, in place; parameters and state dict stay the same.

    A layer is known by its parts (`c_attn`, `c_proj`, `n_head`, `resid_dropout`), and swapped only once both have given
    the same on a random input: a fork whose attention computes something else is refused, and left as it was.

    Args:
        model: nanoGPT's GPT, or any module that holds its attention layers; on its device.
        backend: of `fastchargpt.causal_attention`.

    Returns:
        The model itself. Calling it again, or on fastchargpt's own GPT, changes the backend alone.

    Raises:
        ConfigError: there is no such attention in the model, or one computes something else.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}{nearest(backend, BACKENDS)}")
    again = [module for module in model.modules() if isinstance(module, AcceleratedAttention | CausalSelfAttention)]
    found = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not found and not again:
        raise ConfigError(
            f"accelerate found no attention like nanoGPT's in {type(model).__name__}: it needs modules with c_attn, "
            "c_proj, n_head and resid_dropout inside (for transformers there is fastchargpt.integrations.transformers)"
        )
    if found and found[0][0] == "":
        raise ConfigError("accelerate swaps the attention inside a model: pass the model that holds this layer")
    swaps = [(name, AcceleratedAttention(module, backend)) for name, module in found]
    for name, swap in swaps:
        _check_same(name, swap)
    for name, swap in swaps:
        model.set_submodule(name, swap)
    for module in again:
        module.backend = backend
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: every layer is again the object it was. A model without accelerated layers stays as it is."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AcceleratedAttention):
            original: nn.Module = module.__dict__["original"]
            original.train(module.training)
            model.set_submodule(name, original)
    return model


def _is_attention(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("c_attn", "c_proj", "resid_dropout", "n_head")]
    return (
        not isinstance(module, AcceleratedAttention | CausalSelfAttention)
        and all(isinstance(part, nn.Module) for part in parts[:3])
        and isinstance(parts[3], int)
        and isinstance(parts[0], nn.Linear)
        and parts[0].out_features == 3 * parts[0].in_features
    )


def _dropout(attention: nn.Module) -> Any:
    rate = getattr(attention, "dropout", None)
    if isinstance(rate, int | float):
        return rate
    return getattr(getattr(attention, "attn_dropout", None), "p", 0.0)


@torch.no_grad()
def _check_same(name: str, swap: AcceleratedAttention) -> None:
    original: nn.Module = swap.__dict__["original"]
    weight = swap.c_attn.weight
    if weight.is_meta:
        return
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, weight.shape[1], generator=numbers).to(weight)
    training = original.training
    try:
        original.eval()
        swap.eval()
        expected, found = original(x), swap(x)
    finally:
        original.train(training)
        swap.train(training)
    worst = (found - expected).abs().max() if isinstance(expected, Tensor) and expected.shape == x.shape else torch.inf
    tolerance = 64 * torch.finfo(weight.dtype).eps * max(1.0, float(found.abs().max()))
    if not worst <= tolerance:
        raise ConfigError(
            f"{name} computes something else than nanoGPT's attention (its output differs by {float(worst):.2g}), so "
            "it is left as it is: write it with fastchargpt.causal_attention instead"
        )
