"""The lecture's gpt.py: its GPTLanguageModel's weights into our GPT and back, without loss.

The lecture has one Linear per head for keys, queries and values; ours has one for all of them. Everything else is a
matter of names, so the round trip gives the same numbers bit for bit.

The training loop of gpt.py runs on our model when its line `model = GPTLanguageModel()` becomes

    model = fastchargpt.GPT(fastchargpt.GPTConfig.family("lecture", vocab_size=vocab_size, block_size=block_size,
                            n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastchargpt.config import GPTConfig
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.integrations.untrusted import check_tensors, check_weights
from fastchargpt.model import GPT

__all__ = ["from_lecture", "is_lecture", "lecture_to_weights", "to_lecture", "weights_to_lecture"]

# ours -> the lecture's, outside the heads; `parts` may be weight and bias
TOP = {
    "transformer.wte": "token_embedding_table",
    "transformer.wpe": "position_embedding_table",
    "transformer.ln_f": "ln_f",
    "lm_head": "lm_head",
}
BLOCK = {"ln_1": "ln1", "attn.c_proj": "sa.proj", "ln_2": "ln2", "mlp.c_fc": "ffwd.net.0", "mlp.c_proj": "ffwd.net.2"}
# the order in which c_attn stacks them
QKV = ("query", "key", "value")


def from_lecture(model: torch.nn.Module, *, dropout: float = 0.0) -> GPT:
    """Our GPT with the weights of a live GPTLanguageModel, in its training or evaluation mode.

    Args:
        model: the lecture's.
        dropout: the lecture keeps its rate in a global variable, so it must be told.

    Raises:
        CheckpointError: it is not the lecture's model.
    """
    config, weights = lecture_to_weights(model.state_dict(), dropout=dropout)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    return GPT.from_state_dict(config, weights).train(model.training)


def to_lecture(model: GPT) -> dict[str, Tensor]:
    """The state dict that GPTLanguageModel.load_state_dict takes, its mask buffers included.

    Raises:
        ConfigError: the model computes something that the lecture's cannot.
    """
    return weights_to_lecture(model.config, model.state_dict())


def is_lecture(weights: Mapping[str, Tensor]) -> bool:
    """Whether these names are the lecture's."""
    return "token_embedding_table.weight" in weights and "blocks.0.sa.heads.0.key.weight" in weights


def lecture_to_weights(
    state: Mapping[str, Tensor], *, dropout: float = 0.0, source: object = "the lecture's model"
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of our GPT, of the family `lecture`, from the lecture's state dict.

    Raises:
        CheckpointError: a weight is missing, unexpected or of the wrong shape.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".tril")}
    state = check_tensors(state, source)
    if not is_lecture(state):
        raise CheckpointError(f"{source} does not hold the lecture's GPTLanguageModel: it has other names")
    table, positions = state["token_embedding_table.weight"], state.get("position_embedding_table.weight")
    layers = {found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    heads = {found[1] for name in state if (found := re.match(r"blocks\.0\.sa\.heads\.(\d+)\.", name))}
    if table.dim() != 2 or positions is None or positions.dim() != 2:
        raise CheckpointError(f"{source} lacks a table of token or position embeddings")
    try:
        config = GPTConfig.family(
            "lecture",
            vocab_size=table.shape[0],
            n_embd=table.shape[1],
            block_size=positions.shape[0],
            n_layer=len(layers),
            n_head=len(heads),
            dropout=dropout,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} does not fit the lecture's model: {error}") from None
    names = {f"{theirs}.{part}": f"{ours}.{part}" for ours, theirs in TOP.items() for part in ("weight", "bias")}
    weights = {names[name]: tensor for name, tensor in state.items() if name in names}
    used = set(names)
    for layer in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            for part in ("weight", "bias"):
                name = f"blocks.{layer}.{theirs}.{part}"
                used.add(name)
                if name in state:
                    weights[f"transformer.h.{layer}.{ours}.{part}"] = state[name]
        stacked = []
        for kind in QKV:
            for head in range(config.n_head):
                name = f"blocks.{layer}.sa.heads.{head}.{kind}.weight"
                used.add(name)
                if name not in state:
                    raise CheckpointError(f"{source} lacks the weight {name}")
                if state[name].shape != (config.head_dim, config.n_embd):
                    raise CheckpointError(
                        f"{source}: {name} has the shape {tuple(state[name].shape)}, "
                        f"not {(config.head_dim, config.n_embd)}"
                    )
                stacked.append(state[name])
        weights[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.cat(stacked)
    if unexpected := sorted(state.keys() - used):
        raise CheckpointError(f"{source} has a weight {unexpected[0]:.80} that the lecture's model does not")
    return config, check_weights(config, weights, source)


def weights_to_lecture(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The lecture's state dict from config and weights of our GPT; a bias that ours lacks becomes zero.

    Raises:
        ConfigError: the model computes something that the lecture's cannot.
    """
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    needed = {
        "position='learned'": config.position == "learned",
        "norm='layernorm'": config.norm == "layernorm",
        "activation='relu'": config.activation == "relu",
        "tie_weights=False": not config.tie_weights,
        "qkv_bias=False": not qkv_bias,
        "qk_norm=False": not config.qk_norm,
        "logit_softcap=None": config.logit_softcap is None,
        "as many key heads as query heads": config.kv_heads == config.n_head,
    }
    for rule, kept in needed.items():
        if not kept:
            raise ConfigError(f"the lecture's model has {rule}, and this model has not: it cannot be written as one")
    state: dict[str, Tensor] = {}
    pairs = list(TOP.items())
    for layer in range(config.n_layer):
        pairs += [(f"transformer.h.{layer}.{ours}", f"blocks.{layer}.{theirs}") for ours, theirs in BLOCK.items()]
        stacked = weights[f"transformer.h.{layer}.attn.c_attn.weight"].chunk(3 * config.n_head)
        mask = torch.ones(config.block_size, config.block_size).tril()
        for index, tensor in enumerate(stacked):
            kind, head = divmod(index, config.n_head)
            prefix = f"blocks.{layer}.sa.heads.{head}"
            state[f"{prefix}.{QKV[kind]}.weight"] = tensor.clone()
            state[f"{prefix}.tril"] = mask
    for ours, theirs in pairs:
        weight = weights[f"{ours}.weight"]
        state[f"{theirs}.weight"] = weight
        if not theirs.endswith("table"):
            zeros = weight.new_zeros(weight.shape[0])
            state[f"{theirs}.bias"] = weights.get(f"{ours}.bias", zeros)
    return state
