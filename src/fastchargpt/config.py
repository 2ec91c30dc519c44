"""What a model is made of (`GPTConfig`) and how it is trained (`TrainConfig`): frozen, checked, nanoGPT's names.

Both are plain dataclasses: the command line is generated from them, and checkpoints store them as JSON. The comment
above a field is its help text.
"""

import dataclasses
import math
import reprlib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastchargpt.errors import ConfigError, nearest

__all__ = ["IGNORE_INDEX", "Family", "GPTConfig", "TrainConfig", "config_from_dict"]

# the target of a position that does not count in the loss, as in nanoGPT
IGNORE_INDEX = -1

Family = Literal["lecture", "nanogpt", "modern"]
C = TypeVar("C", "GPTConfig", "TrainConfig")

# a value in an error message, however long or deep it is
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 60


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _check_types(config: Any) -> None:
    """Refuse a value whose type is not the field's, which a typo in a JSON file would otherwise carry along."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        allowed = get_args(hint) if get_origin(hint) not in (None, Literal) else (hint,)
        shown = SHOWN.repr(value)
        choices = [choice for kind in allowed if get_origin(kind) is Literal for choice in get_args(kind)]
        if value is None and type(None) in allowed:
            continue
        if choices and float not in allowed and int not in allowed:
            known = ", ".join(map(str, choices))
            close = nearest(value, choices) if isinstance(value, str) else ""
            _check(value in choices, f"{field.name} must be one of {known}, not {shown}{close}")
        elif bool in allowed:
            _check(isinstance(value, bool), f"{field.name} must be True or False, not {shown}")
        elif float in allowed:
            _check(
                (isinstance(value, float) and math.isfinite(value)) or _is_int64(value),
                f"{field.name} must be a finite number, not {shown}",
            )
        elif int in allowed:
            whole = isinstance(value, int) and not isinstance(value, bool)
            _check(whole, f"{field.name} must be a whole number, not {shown}")
            _check(_is_int64(value), f"{field.name} must fit in 64 bits, and {shown} does not")
        elif str in allowed:
            _check(isinstance(value, str), f"{field.name} must be text, not {shown}")


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A GPT's shape and its switches. The defaults are nanoGPT's: a GPT-2 of 124M parameters.

    Three families set the switches together (`GPTConfig.family`): `lecture` (gpt.py of the lecture), `nanogpt`
    (GPT-2 as nanoGPT writes it) and `modern` (RoPE, RMSNorm, QK-norm, squared ReLU, zero-initialised projections).

    Raises:
        ConfigError: a value breaks a rule; the message names the field, the rule and the value.
    """

    # longest context, in tokens
    block_size: int = 1024
    # number of distinct tokens; nanoGPT pads GPT-2's 50257 to a multiple of 64
    vocab_size: int = 50304
    # number of transformer blocks
    n_layer: int = 12
    # number of query heads
    n_head: int = 12
    # width of the residual stream, in channels
    n_embd: int = 768
    # probability of zeroing an activation in training, in [0, 1)
    dropout: float = 0.0
    # whether linear layers and LayerNorms carry a bias
    bias: bool = True
    # number of key/value heads, a divisor of n_head; None means n_head
    n_kv_head: int | None = None
    # how positions enter: a learned table, or rotary embeddings (RoPE, arXiv:2104.09864)
    position: Literal["learned", "rope"] = "learned"
    # the normalisation: LayerNorm, or RMSNorm (arXiv:1910.07467) without weights
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    # the MLP's non-linearity; gelu_tanh is GPT-2's own form of GELU, relu2 the squared ReLU (Primer, arXiv:2109.08668)
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2"] = "gelu"
    # whether the head shares its weights with the token embedding
    tie_weights: bool = True
    # whether the query, key and value projections carry a bias; None means `bias`
    qkv_bias: bool | None = None
    # whether the head carries a bias
    head_bias: bool = False
    # whether the sum of the embeddings is dropped out, as GPT-2 does
    embd_dropout: bool = True
    # whether queries and keys are RMS-normalised per head (arXiv:2010.04245)
    qk_norm: bool = False
    # bound on the logits by softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None means no bound
    logit_softcap: float | None = None
    # the start of the projections into the residual stream: std 0.02, GPT-2's 0.02 / sqrt(2 n_layer), or 0
    proj_init: Literal["normal", "gpt2", "zero"] = "gpt2"
    # base of RoPE's wavelengths, in tokens per radian
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        """Check every rule."""
        _check_types(self)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _check(
            self.n_embd % self.n_head == 0,
            f"n_embd must be a multiple of n_head, and {self.n_embd} is not a multiple of {self.n_head}",
        )
        kv = self.kv_heads
        _check(
            kv >= 1 and self.n_head % kv == 0,
            f"n_head must be a multiple of n_kv_head, and {self.n_head} is not a multiple of {kv}",
        )
        _check(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), not {self.dropout}")
        _check(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"position='rope' needs an even head_dim, and n_embd / n_head is {self.head_dim}",
        )
        _check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"logit_softcap must be above 0 or None, not {self.logit_softcap}",
        )
        _check(self.rope_base > 1, f"rope_base must be above 1, not {self.rope_base}")
        _check(
            not (self.tie_weights and self.head_bias), "head_bias=True needs tie_weights=False: a tied head has no bias"
        )

    @staticmethod
    def family(name: Family, **fields: Any) -> "GPTConfig":
        """The config of a family, with any field replaced.

        Raises:
            ConfigError: the family or a field is unknown, or a value breaks a rule.
        """
        if name not in FAMILIES:
            raise ConfigError(
                f"the model family must be one of {', '.join(FAMILIES)}, not {name!r}{nearest(name, FAMILIES)}"
            )
        return config_from_dict(GPTConfig, {**FAMILIES[name], **fields})

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head


FAMILIES: dict[str, dict[str, Any]] = {
    "lecture": dict(
        activation="relu", tie_weights=False, head_bias=True, qkv_bias=False, embd_dropout=False, proj_init="normal"
    ),
    "nanogpt": {},
    "modern": dict(
        bias=False,
        position="rope",
        norm="rmsnorm",
        activation="relu2",
        tie_weights=False,
        qk_norm=True,
        logit_softcap=15.0,
        proj_init="zero",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Where nanoGPT's train.py has a name for a thing, it is that name.

    Raises:
        ConfigError: a value breaks a rule; the message names the field, the rule and the value.
    """

    # sequences in a micro-batch
    batch_size: int = 12
    # micro-batches in a step; their gradients are averaged
    gradient_accumulation_steps: int = 1
    # the order of training windows: nanoGPT's random offsets, or shuffled epochs that visit every window once
    order: Literal["random", "epochs"] = "random"
    # optimiser steps in the run
    max_iters: int = 2000
    # highest learning rate
    learning_rate: float = 1e-3
    # lowest learning rate, at the end of the decay
    min_lr: float = 1e-4
    # steps of linear warm-up
    warmup_iters: int = 100
    # step at which the decay ends; None means max_iters
    lr_decay_iters: int | None = None
    # share of the decay phase spent cooling down, in (0, 1], for schedule=wsd
    cooldown_fraction: float = 0.2
    # learning-rate schedule after the warm-up; wsd is warm-up, stable, decay
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    # decoupled weight decay on matrices and embeddings
    weight_decay: float = 0.1
    # the optimiser: AdamW, or Muon for the matrices of the blocks and AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    # highest learning rate of Muon's matrices; it follows the same schedule
    matrix_learning_rate: float = 0.02
    # Muon's momentum
    momentum: float = 0.95
    # AdamW's decay of the first moment
    beta1: float = 0.9
    # AdamW's decay of the second moment
    beta2: float = 0.99
    # largest norm of the gradient; 0 means no clipping
    grad_clip: float = 1.0
    # average the weights over the steps, each counting this much of the one after it; the average is what is evaluated
    # and saved to best/; 0 means none
    ema_decay: float = 0.0
    # steps between evaluations
    eval_interval: int = 250
    # batches of the training split, evenly spaced, in its loss estimate (the validation split is always read whole)
    eval_iters: int = 20
    # whether the first evaluation comes before the first step, as in nanoGPT; without it, after eval_interval steps
    eval_at_start: bool = True
    # evaluate once and stop
    eval_only: bool = False
    # steps between log lines
    log_interval: int = 10
    # stop after this many evaluations without a better validation loss; None means never
    patience: int | None = None
    # stop once the validation loss is at or below this, in nats per token
    target_val_loss: float | None = None
    # where to train: auto takes cuda, then mps, then cpu
    device: str = "auto"
    # number format of the matrix products; auto takes the fastest that is safe on the device
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    # torch.compile the step; auto compiles where the run is long enough to earn the compile time back
    compile: Literal["auto", "on", "off"] = "auto"
    # the whole step as one CUDA graph; auto where the device is a GPU and the step short enough for launches to matter
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    # what computes a step: torch, or native C++ code for float32 on a CPU; auto takes the native where it serves
    engine: Literal["auto", "native", "torch"] = "auto"
    # keep each block's input alone and compute the rest again in the backward pass: less memory, a third more work
    checkpoint_activations: bool = False
    # attention backend; auto takes the fastest that serves and says why
    attention: Literal["auto", "triton", "sdpa", "naive"] = "auto"
    # how the processes that torchrun starts share a run: ddp has the whole model on each, fsdp a piece of it; auto is
    # ddp where there are several; batch_size stays that of all together
    parallel: Literal["auto", "ddp", "fsdp", "none"] = "auto"
    # seed of initialisation, batches and dropout
    seed: int = 1337
    # on a GPU, the same bits in every run with this seed, or a refusal; slower, and not compiled (a CPU's are anyway)
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check every rule."""
        _check_types(self)
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "max_iters",
            "warmup_iters",
            "learning_rate",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "seed",
            "matrix_learning_rate",
        ):
            _check(getattr(self, name) >= 0, f"{name} must not be negative, and it is {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum", "ema_decay"):
            _check(0.0 <= getattr(self, name) < 1.0, f"{name} must be in [0, 1), not {getattr(self, name)}")
        _check(
            0.0 < self.cooldown_fraction <= 1.0, f"cooldown_fraction must be in (0, 1], not {self.cooldown_fraction}"
        )
        _check(
            self.lr_decay_iters is None or self.lr_decay_iters >= 1,
            f"lr_decay_iters must be at least 1 or None, not {self.lr_decay_iters}",
        )
        _check(self.patience is None or self.patience >= 1, f"patience must be at least 1 or None, not {self.patience}")
        _check(
            self.schedule == "constant" or self.min_lr <= self.learning_rate,
            f"min_lr must not exceed learning_rate, and {self.min_lr} is above {self.learning_rate}",
        )
        _check(self.seed < 2**63, f"seed must be below 2**63, not {self.seed}")


def config_from_dict(cls: type[C], fields: dict[str, Any]) -> C:
    """A config from a dict of fields, as read from JSON.

    Raises:
        ConfigError: a field is unknown (the nearest known one is named) or a value breaks a rule.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ConfigError(f"{cls.__name__} has no field {SHOWN.repr(name)}{nearest(name, known)}")
    return cls(**fields)
