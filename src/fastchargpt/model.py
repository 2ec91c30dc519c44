"""The GPT: one model whose config gives the lecture's, nanoGPT's and a modern one.

With the `nanogpt` family every equation, parameter name and shape, and every draw of the initialisation equals
nanoGPT's, so that its checkpoints and seeds carry over.

Shapes in names: B batch, T sequence, C channels (n_embd), V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastchargpt.cache import KVCache
from fastchargpt.config import IGNORE_INDEX, GPTConfig
from fastchargpt.errors import ConfigError
from fastchargpt.hardware import peak_flops
from fastchargpt.layers import Block, CausalSelfAttention, make_norm, rope_tables

__all__ = ["GPT", "shapes_alone"]

INIT_STD = 0.02


class _Undrawn(TorchFunctionMode):
    """Modules are made without drawing weights: on the meta device torch takes seconds to draw nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shapes_alone() -> ExitStack:
    """The context in which a model is shapes without numbers."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Undrawn())
        return stack.pop_all()


class Transformer(nn.Module):
    """Everything between the tokens and the head, under nanoGPT's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout if config.embd_dropout else 0.0)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = make_norm(config)


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: shape and switches.

    Attributes:
        config: the config; `crop_block_size` replaces it.
        checkpoint_activations: whether training keeps each block's input alone and computes the rest of it again in the
            backward pass (arXiv:1604.06174): about a third more work for the memory of one block instead of all.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self._tie()
        self.rope: Tensor | None
        self.register_buffer("rope", self._rope_tables(config.block_size), persistent=False)
        self._initialise()

    @classmethod
    def from_state_dict(cls, config: GPTConfig, weights: Mapping[str, Tensor]) -> Self:
        """A model with these weights, on their device, without drawing initial ones.

        Raises:
            RuntimeError: a weight is missing, unexpected or of another shape (torch's own message).
        """
        with shapes_alone():
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model._tie()
        model.rope = model._rope_tables(config.block_size, model.lm_head.weight.device)
        return model

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, Any] | None = None) -> Self:
        """GPT-2's weights (nanoGPT's signature), with GPT-2's own GELU.

        Args:
            model_type: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads; or a folder that
                transformers saved.
            override_args: `dropout` alone may be given.

        Raises:
            CheckpointError: there are no such weights, or they are not GPT-2's.
            BackendUnavailableError: a name was given, and transformers is not installed.
            ConfigError: another field is overridden.
        """
        from fastchargpt.integrations.gpt2 import read_gpt2

        override_args = override_args or {}
        for name in override_args:
            if name != "dropout":
                raise ConfigError(f"from_pretrained overrides dropout alone, and not {name}")
        config, weights = read_gpt2(model_type)
        return cls.from_state_dict(dataclasses.replace(config, **override_args), weights)

    def _tie(self) -> None:
        if self.config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight

    def _initialise(self) -> None:
        """Draw the weights, in the order of the modules and then of the residual projections, as nanoGPT does."""
        if self.lm_head.weight.is_meta:
            return  # shapes alone, and drawing those takes torch milliseconds a matrix
        for module in _children_first(self):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        if self.config.proj_init == "normal":
            return
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                if self.config.proj_init == "zero":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * self.config.n_layer))
        if self.config.proj_init == "zero" and not self.config.tie_weights:
            nn.init.zeros_(self.lm_head.weight)

    def _rope_tables(self, length: int, device: torch.device | str | None = None) -> Tensor | None:
        if self.config.position != "rope":
            return None
        if device is None and self.lm_head.weight.is_meta:
            return torch.empty(2, length, self.config.head_dim // 2)
        return rope_tables(length, self.config.head_dim, self.config.rope_base, device)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each position.

        Args:
            idx: token ids, (B, T) int64, T at most block_size.
            targets: the tokens that follow, (B, T) int64; -1 marks a position that does not count.
            cache: keys and values of the tokens before idx; those of idx are appended to it.

        Returns:
            With targets, logits (B, T, V) and their mean cross-entropy in nats per token; without, logits (B, 1, V) of
            the last position and None.

        Raises:
            ConfigError: the sequence, with what the cache holds, is longer than the model or the cache can take.
        """
        x_BTC = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x_BTC[:, -1:]), None
        logits_BTV = self.logits(x_BTC)
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream after the last block, (B, T, C); arguments as in `forward`."""
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        limit = self.config.block_size if cache is None else cache.capacity
        if end > limit:
            raise ConfigError(
                f"a sequence of {end} tokens does not fit in block_size {limit}: crop it to the last {limit}"
            )
        x_BTC = self.transformer.wte(idx)
        rope = None
        if self.rope is not None:
            rope = self.rope[:, start:end]
        if self.transformer.wpe is not None:
            x_BTC = x_BTC + self.transformer.wpe.weight[start:end]
        x_BTC = self.transformer.drop(x_BTC)
        for block in self.transformer.h:
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                # the generator's state is restored for the second pass, so that it drops the same activations
                dropping = self.training and self.config.dropout > 0.0
                x_BTC = checkpoint(block, x_BTC, rope, use_reentrant=False, preserve_rng_state=dropping)
            else:
                x_BTC = block(x_BTC, rope, cache)
        if cache is not None:
            cache.length = end
        out: Tensor = self.transformer.ln_f(x_BTC)
        return out

    def logits(self, x_BTC: Tensor) -> Tensor:
        """The head: logits (B, T, V) of the residual stream, bounded where the config says so."""
        logits_BTV: Tensor = self.lm_head(x_BTC)
        softcap = self.config.logit_softcap
        if softcap is not None:
            logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
        return logits_BTV

    def set_attention(self, backend: str) -> None:
        """Use an attention backend (auto, triton, sdpa or naive) in every block."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.backend = backend

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; without the position table unless `non_embedding` is False, as nanoGPT counts."""
        count = sum(parameter.numel() for parameter in self.parameters())
        if non_embedding and self.transformer.wpe is not None:
            count -= self.transformer.wpe.weight.numel()
        return count

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token (PaLM, arXiv:2204.02311, appendix B)."""
        config = self.config
        matrices = self.get_num_params()
        if not config.tie_weights:
            matrices -= self.transformer.wte.weight.numel()
        return 6 * matrices + 12 * config.n_layer * config.n_embd * config.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, dtype: torch.dtype | None = None) -> float:
        """Model FLOPs utilisation: the share of this device's matrix-product peak that a step reaches.

        Args:
            fwdbwd_per_iter: sequences of block_size tokens in a step.
            dt: seconds of the step.
            dtype: number format of the products; autocast's where it is on, else that of the weights.

        Returns:
            A share of 1, or nan where the device's peak is not known (`fastchargpt.hardware` lists those that are).
        """
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt
        weight = self.lm_head.weight
        if dtype is None:
            kind = weight.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        peak = peak_flops(weight.device, dtype)
        return flops / peak.flops if peak is not None else math.nan

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest context, dropping the positions beyond it.

        Raises:
            ConfigError: block_size is above the present one.
        """
        if block_size > self.config.block_size:
            raise ConfigError(
                f"block_size can only be cropped, and {block_size} is above the model's {self.config.block_size}"
            )
        self.config = dataclasses.replace(self.config, block_size=block_size)
        if self.rope is not None:
            self.rope = self.rope[:, :block_size]
        if self.transformer.wpe is not None:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight.detach()[:block_size].clone())
            self.transformer.wpe.num_embeddings = block_size

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW on nanoGPT's parameter groups, fused where torch can (nanoGPT's signature)."""
        from fastchargpt.optim import make_adamw

        return make_adamw(self, weight_decay=weight_decay, learning_rate=learning_rate, betas=betas)

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, **knobs: Any
    ) -> Tensor:
        """Continue idx (B, T) to (B, T + max_new_tokens); `knobs` are further fields of `SamplingConfig`."""
        from fastchargpt.generation import generate_tokens
        from fastchargpt.sampling import SamplingConfig

        config = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, **knobs)
        return generate_tokens(self, idx, config)


def _children_first(module: nn.Module) -> list[nn.Module]:
    """Every module of a tree, children before their parents: the order of `nn.Module.apply`."""
    return [found for child in module.children() for found in _children_first(child)] + [module]
