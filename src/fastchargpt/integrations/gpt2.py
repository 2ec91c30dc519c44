"""GPT-2 as transformers keeps it: its config and weights into ours and back.

transformers stores the linear layers of a block transposed (its Conv1D) and has a bias everywhere; a bias that our
model lacks becomes zero there, which changes no logit.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastchargpt.checkpoint import TIED_COPY, TIED_KEPT
from fastchargpt.config import GPTConfig, config_from_dict
from fastchargpt.errors import BackendUnavailableError, CheckpointError, ConfigError
from fastchargpt.integrations.untrusted import check_tensors, check_weights, read_json, read_safetensors, read_torch

__all__ = ["GPT2_NAMES", "check_gpt2", "gpt2_to_weights", "read_gpt2", "weights_to_gpt2", "with_biases"]

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}
THEIR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what GPT2Config may say, and the only value that our model computes
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_gpt2(source: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of our GPT from a folder that transformers saved, or from one of GPT-2's names.

    A folder needs config.json and model.safetensors or pytorch_model.bin, and no transformers to be read. A name needs
    transformers, which downloads it.

    Raises:
        CheckpointError: there is none, or it is damaged, or not a GPT-2 that our model computes.
        BackendUnavailableError: a name was given, and transformers is not installed.
    """
    folder = Path(source)
    if folder.is_dir():
        return _read_folder(folder)
    if str(source) not in GPT2_NAMES:
        raise CheckpointError(f"{source} is neither a folder nor one of {', '.join(GPT2_NAMES)}")
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise BackendUnavailableError(
            f"{source} is downloaded by transformers, which is not installed: pip install 'fastchargpt[integrations]'"
        ) from None
    theirs = GPT2LMHeadModel.from_pretrained(str(source))
    return gpt2_to_weights(theirs.config.to_dict(), theirs.state_dict(), source)


def _read_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    fields = read_json(folder / "config.json")
    if (folder / "model.safetensors").is_file():
        weights: Mapping[Any, Any] = read_safetensors(folder / "model.safetensors")[0]
    elif (folder / "pytorch_model.bin").is_file():
        weights = read_torch(folder / "pytorch_model.bin")
    elif any(folder.glob("*.index.json")):
        raise CheckpointError(f"{folder} keeps its weights in several files: save the model again as one")
    else:
        raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    return gpt2_to_weights(fields, weights, folder)


def gpt2_to_weights(
    fields: Mapping[str, Any], state: Mapping[str, Tensor], source: object
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of our GPT from GPT2Config's fields and GPT2LMHeadModel's state dict.

    Three equal dropout rates, or none on the embeddings, are taken over; rates that differ otherwise become 0.

    Raises:
        CheckpointError: it is not a GPT-2, or one whose equations our model does not have.
    """
    for name, value in FIXED.items():
        if fields.get(name, value) != value:
            raise CheckpointError(f"{source} has {name}={fields[name]!r:.40}, and our model computes {value!r} alone")
    if "model_type" not in fields:
        raise CheckpointError(f"{source} has no model_type in its config: it is not a model of transformers")
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        raise CheckpointError(
            f"{source} has activation_function={activation!r:.40}, and our model has {', '.join(THEIR_ACTIVATIONS)}"
        )
    width = fields.get("n_embd", 768)
    if fields.get("n_inner") not in (None, 4 * width if isinstance(width, int) else None):
        raise CheckpointError(f"{source} has n_inner={fields['n_inner']!r:.40}, and our model's MLP is 4 * n_embd wide")
    rates = [fields.get(f"{place}_pdrop", 0.1) for place in ("resid", "attn", "embd")]
    alike = rates[0] == rates[1] and rates[2] in (rates[0], 0)
    try:
        config = config_from_dict(
            GPTConfig,
            {
                "block_size": fields.get("n_positions", 1024),
                "vocab_size": fields.get("vocab_size", 50257),
                "n_layer": fields.get("n_layer", 12),
                "n_head": fields.get("n_head", 12),
                "n_embd": width,
                "dropout": rates[0] if alike else 0.0,
                "embd_dropout": not alike or rates[2] == rates[0],
                "activation": THEIR_ACTIVATIONS[activation],
                "tie_weights": fields.get("tie_word_embeddings", True),
            },
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} describes a model that ours cannot be: {error}") from None
    # OpenAI's own files have no prefix, and both have the causal masks as buffers of old
    names = {
        name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        for name in map(str, state)
    }
    kept = {name: state[name] for name in state if not re.search(r"\.attn\.(masked_)?bias$", str(name))}
    weights = {names[name]: tensor for name, tensor in check_tensors(kept, source).items()}
    if len(weights) != len(kept):
        raise CheckpointError(f"{source} has a weight twice, with and without the prefix 'transformer.'")
    return config, check_weights(config, {name: _turned(name, tensor) for name, tensor in weights.items()}, source)


def weights_to_gpt2(config: GPTConfig, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the state dict of a GPT2LMHeadModel that gives our model's logits.

    Raises:
        ConfigError: the model computes something that GPT-2 cannot.
    """
    check_gpt2(config)
    fields: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": ACTIVATIONS[config.activation],
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout if config.embd_dropout else 0.0,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    state = {name: _turned(name, tensor).contiguous() for name, tensor in with_biases(config, weights).items()}
    if config.tie_weights:
        state[TIED_COPY] = state.pop(TIED_KEPT)
    return fields, state


def check_gpt2(config: GPTConfig) -> None:
    """Refuse what no GPT-2 computes, whichever activation it has.

    Raises:
        ConfigError: the model computes something else.
    """
    needed = {
        "position='learned'": config.position == "learned",
        "norm='layernorm'": config.norm == "layernorm",
        "qk_norm=False": not config.qk_norm,
        "logit_softcap=None": config.logit_softcap is None,
        "head_bias=False": not config.head_bias,
        "as many key heads as query heads": config.kv_heads == config.n_head,
    }
    for rule, kept in needed.items():
        if not kept:
            raise ConfigError(f"GPT-2 has {rule}, and this model has not: it cannot be written as a GPT-2")


def with_biases(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with a zero bias wherever a linear layer or a LayerNorm inside the transformer has none."""
    full = dict(weights)
    for name, tensor in weights.items():
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            full.setdefault(name.removesuffix("weight") + "bias", torch.zeros(tensor.shape[0], dtype=tensor.dtype))
    return full


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
