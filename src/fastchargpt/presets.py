"""Named recipes: a model and how to train it."""

from dataclasses import dataclass
from typing import Any

from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.errors import ConfigError, nearest

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, its training, and one line on where they come from."""

    about: str
    model: GPTConfig
    train: TrainConfig


def _gpt2(about: str, **shape: Any) -> Preset:
    # nanoGPT's train.py defaults, for one device: 480 sequences of 1024 tokens a step
    return Preset(
        about=about,
        model=GPTConfig(bias=False, **shape),
        train=TrainConfig(
            batch_size=12,
            gradient_accumulation_steps=40,
            max_iters=600_000,
            learning_rate=6e-4,
            min_lr=6e-5,
            warmup_iters=2000,
            beta2=0.95,
            eval_interval=2000,
            eval_iters=200,
        ),
    )


_CHAR: dict[str, Any] = dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2)
_CHAR_CPU: dict[str, Any] = dict(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
_CHAR_TRAIN: dict[str, Any] = dict(batch_size=64, max_iters=5000)
# shuffled epochs, and a learning rate that falls from the first step to the last
_SPEEDRUN_TRAIN: dict[str, Any] = dict(optimizer="muon", order="epochs", beta2=0.95, schedule="linear", min_lr=0.0)

# The vocabulary of a character model is that of its corpus: 65 here stands for tiny shakespeare's.
PRESETS: dict[str, Preset] = {
    "lecture": Preset(
        about="the lecture's gpt.py: 6 layers, 384 wide, constant learning rate",
        model=GPTConfig.family("lecture", **_CHAR),
        train=TrainConfig(
            **_CHAR_TRAIN,
            schedule="constant",
            learning_rate=3e-4,
            min_lr=3e-4,
            warmup_iters=0,
            weight_decay=0.01,
            beta2=0.999,
            grad_clip=0.0,
            eval_interval=500,
        ),
    ),
    "shakespeare-char": Preset(
        about="nanoGPT's train_shakespeare_char.py: 10.65M parameters, for one GPU",
        model=GPTConfig(bias=False, **_CHAR),
        train=TrainConfig(**_CHAR_TRAIN),
    ),
    "shakespeare-char-cpu": Preset(
        about="nanoGPT's published CPU demo: 0.8M parameters, about a minute on two cores",
        model=GPTConfig(bias=False, **_CHAR_CPU),
        train=TrainConfig(batch_size=12, max_iters=2000),
    ),
    "modern-char": Preset(
        about="the modern family at shakespeare-char's shape",
        model=GPTConfig.family("modern", **_CHAR),
        train=TrainConfig(**_CHAR_TRAIN, beta2=0.95, schedule="linear", min_lr=0.0, eval_interval=250),
    ),
    "modern-char-cpu": Preset(
        about="the modern family at the CPU demo's shape",
        model=GPTConfig.family("modern", **_CHAR_CPU),
        train=TrainConfig(batch_size=12, max_iters=2000, learning_rate=3e-3, schedule="linear", min_lr=0.0),
    ),
    "speedrun": Preset(
        about="the modern family under Muon at shakespeare-char's shape: past its best loss in 16 s of an H200",
        model=GPTConfig.family("modern", **_CHAR),
        # eight passes over tiny shakespeare: the training loss is then a fifth below the validation loss
        train=TrainConfig(
            batch_size=32,
            max_iters=1000,
            **_SPEEDRUN_TRAIN,
            learning_rate=5e-3,
            weight_decay=0.1,
            warmup_iters=20,
            eval_interval=250,
        ),
    ),
    "speedrun-cpu": Preset(
        about="the loss of nanoGPT's published CPU demo in a few seconds: a small modern GPT under Muon",
        # In so few steps width costs more than it gives. RoPE's base suits a context of 64: its slowest wave turns once
        # in about that. bench/README.md says what each ingredient is worth.
        model=GPTConfig.family(
            "modern", vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64, rope_base=200.0, logit_softcap=None
        ),
        train=TrainConfig(
            batch_size=24,
            max_iters=220,
            **_SPEEDRUN_TRAIN,
            learning_rate=2e-2,
            matrix_learning_rate=3e-2,
            momentum=0.85,
            beta1=0.6,
            weight_decay=0.0,
            grad_clip=0.0,
            warmup_iters=0,
            eval_interval=220,
            eval_at_start=False,
            log_interval=55,
        ),
    ),
    "gpt2": _gpt2("GPT-2, 124M parameters", n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": _gpt2("GPT-2, 350M parameters", n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": _gpt2("GPT-2, 774M parameters", n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": _gpt2("GPT-2, 1558M parameters", n_layer=48, n_head=25, n_embd=1600),
}


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none of that name; the nearest is named.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
