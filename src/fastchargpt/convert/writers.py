"""A `Checkpoint` into other people's formats. A model that a format cannot express is refused, never approximated."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastchargpt.checkpoint import TIED_COPY, Checkpoint, save_checkpoint
from fastchargpt.config import GPTConfig
from fastchargpt.convert.gguf import write_gguf
from fastchargpt.convert.gguf_gpt2 import weights_to_gguf
from fastchargpt.convert.readers import CONFIG_KEY, NANOGPT_FIELDS, TOKENIZER_KEY
from fastchargpt.convert.vocabulary import to_hugging_face
from fastchargpt.errors import ConfigError
from fastchargpt.integrations.gpt2 import weights_to_gpt2, with_biases
from fastchargpt.integrations.lecture import weights_to_lecture
from fastchargpt.model import GPT
from fastchargpt.optim import make_adamw
from fastchargpt.tokenizers import CharTokenizer, load_tokenizer

__all__ = ["IS_FOLDER", "write"]

IS_FOLDER = {"fastchargpt": True, "nanogpt": True, "hf": True, "lecture": False, "safetensors": False, "gguf": False}


def write(checkpoint: Checkpoint, target: Path, kind: str, notes: list[str], *, home: Path) -> None:
    """Write the model to a path that does not exist yet. What a user should know is added to `notes`.

    Args:
        home: where the result will lie in the end, where `target` is a temporary name.

    Raises:
        ConfigError: the format cannot express the model.
        OSError: the path cannot be written.
    """
    if kind == "fastchargpt":
        save_checkpoint(target, checkpoint)
    elif kind == "nanogpt":
        _write_nanogpt(checkpoint, target, notes, home)
    elif kind == "hf":
        _write_hf(checkpoint, target, notes)
    elif kind == "gguf":
        _write_gguf(checkpoint, target, notes)
    elif kind == "lecture":
        torch.save(weights_to_lecture(checkpoint.model_config, checkpoint.weights), target)
        if checkpoint.tokenizer_json is not None:
            notes.append("the vocabulary is left behind: the lecture's file has no place for it")
    else:
        _write_safetensors(checkpoint, target)


def _write_nanogpt(checkpoint: Checkpoint, target: Path, notes: list[str], home: Path) -> None:
    config, weights = _as_nanogpt(checkpoint.model_config, checkpoint.weights)
    # the state of an optimiser that has not stepped yet, so that train.py can resume
    optimizer = make_adamw(
        GPT.from_state_dict(config, weights), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.99)
    )
    content = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {name: getattr(config, name) for name in NANOGPT_FIELDS},
        "iter_num": checkpoint.info.get("iteration", 0),
        "best_val_loss": checkpoint.info.get("val_loss", 1e9),
        # sample.py looks for os.path.join("data", dataset, "meta.pkl"), which an absolute path leaves alone
        "config": {"dataset": str(home.resolve())},
    }
    target.mkdir()
    torch.save(content, target / "ckpt.pt")
    if checkpoint.tokenizer_json is None:
        return
    tokenizer = load_tokenizer(checkpoint.tokenizer_json)
    if not isinstance(tokenizer, CharTokenizer):
        notes.append(f"the {tokenizer.name} vocabulary is left behind: nanoGPT's meta.pkl holds characters alone")
        return
    stoi = {char: i for i, char in enumerate(tokenizer.chars)}
    meta = {"vocab_size": tokenizer.vocab_size, "itos": {i: char for char, i in stoi.items()}, "stoi": stoi}
    (target / "meta.pkl").write_bytes(pickle.dumps(meta))


def _as_nanogpt(config: GPTConfig, weights: Mapping[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The model with nanoGPT's seven fields alone; biases are all there or none.

    Raises:
        ConfigError: it computes something that nanoGPT's model cannot.
    """
    needed: dict[str, Any] = {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "tie_weights": True,
        "qk_norm": False,
        "logit_softcap": None,
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"nanoGPT's model has {name}={value}, and this model {name}={getattr(config, name)}: "
                "it cannot be written as nanoGPT's"
            )
    if config.kv_heads != config.n_head:
        raise ConfigError(f"nanoGPT's model has no grouped heads, and this model has n_kv_head={config.kv_heads}")
    bias = config.bias or bool(config.qkv_bias)
    plain = GPTConfig(**{name: getattr(config, name) for name in NANOGPT_FIELDS if name != "bias"}, bias=bias)
    return plain, _clones(with_biases(config, weights) if bias else weights)


def _clones(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor with its own storage, and a tied pair with one."""
    clones = {name: tensor.detach().clone() for name, tensor in weights.items()}
    clones[TIED_COPY] = clones["lm_head.weight"]
    return clones


def _write_hf(checkpoint: Checkpoint, target: Path, notes: list[str]) -> None:
    from safetensors.torch import save_file

    config = checkpoint.model_config
    fields, state = weights_to_gpt2(config, checkpoint.weights)
    target.mkdir()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", fields)
    if checkpoint.tokenizer_json is None:
        notes.append("no tokenizer.json: the model has no vocabulary; name one with --tokenizer")
        return
    (target / "tokenizer.json").write_text(to_hugging_face(load_tokenizer(checkpoint.tokenizer_json)), encoding="utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(target / "tokenizer_config.json", {**kind, "model_max_length": config.block_size})


def _write_gguf(checkpoint: Checkpoint, target: Path, notes: list[str]) -> None:
    config = checkpoint.model_config
    tokenizer = None if checkpoint.tokenizer_json is None else load_tokenizer(checkpoint.tokenizer_json)
    write_gguf(target, *weights_to_gguf(config, checkpoint.weights, tokenizer))
    if tokenizer is None:
        notes.append("no vocabulary in the file, so llama.cpp takes token ids alone; name one with --tokenizer")
    if config.dropout:
        notes.append(f"the dropout rate of {config.dropout} is left behind: GGUF has no place for it")


def _write_safetensors(checkpoint: Checkpoint, target: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous() for name, tensor in checkpoint.weights.items()}
    if checkpoint.model_config.tie_weights:
        weights.pop(TIED_COPY, None)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(asdict(checkpoint.model_config))}
    if checkpoint.tokenizer_json is not None:
        metadata[TOKENIZER_KEY] = checkpoint.tokenizer_json
    save_file(weights, target, metadata=metadata)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
