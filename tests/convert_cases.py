"""A model of every family that formats are converted between, and what each format can express."""

from pathlib import Path

import torch

from fastchargpt import GPT, CharTokenizer, GPTConfig
from fastchargpt.checkpoint import Checkpoint
from fastchargpt.convert.writers import write

__all__ = ["CHARS", "CONFIGS", "ENDINGS", "EXPRESSES", "SHAPE", "example", "put"]

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 13}
CHARS = "\n .,abcdefg€é"[:13]
# families that a format can express, and what each format's example is
CONFIGS = {
    "nanogpt": GPTConfig(**SHAPE, bias=False),
    "biased": GPTConfig(**SHAPE, dropout=0.1),
    "gpt2": GPTConfig(**SHAPE, activation="gelu_tanh"),
    "gpt2, bare and untied": GPTConfig(**SHAPE, activation="gelu_tanh", bias=False, tie_weights=False),
    "untied": GPTConfig(**SHAPE, tie_weights=False, bias=False, activation="relu2"),
    "odd biases": GPTConfig(**SHAPE, bias=False, qkv_bias=True),
    "lecture": GPTConfig.family("lecture", **SHAPE),
    "modern": GPTConfig.family("modern", **SHAPE, n_kv_head=1),
}
EXPRESSES = {
    "fastchargpt": set(CONFIGS),
    "safetensors": set(CONFIGS),
    "nanogpt": {"nanogpt", "biased", "odd biases"},
    "hf": {"nanogpt", "biased", "gpt2", "gpt2, bare and untied", "untied", "odd biases"},
    "gguf": {"gpt2", "gpt2, bare and untied"},
    "lecture": {"lecture"},
}
ENDINGS = {"lecture": ".pt", "safetensors": ".safetensors", "gguf": ".gguf"}


def example(name: str) -> Checkpoint:
    torch.manual_seed(sum(map(ord, name)))
    model = GPT(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Checkpoint(
        model_config=model.config,
        weights=model.state_dict(),
        tokenizer_json=CharTokenizer(CHARS).to_json(),
        info={"iteration": 7, "val_loss": 1.5},
    )


def put(name: str, kind: str, folder: Path) -> Path:
    """The example in a format."""
    path = folder / f"{name}-{kind}{ENDINGS.get(kind, '')}"
    write(example(name), path, kind, [], home=path)
    return path
