"""Our GPT as the `gpt2` architecture of GGUF, which llama.cpp runs: names, config and vocabulary, both ways.

llama.cpp's gpt2 computes the tanh form of GELU and has a bias everywhere; a bias that our model lacks becomes zero.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastchargpt.checkpoint import TIED_COPY, TIED_KEPT
from fastchargpt.config import GPTConfig, config_from_dict
from fastchargpt.convert.gguf import Field, read_gguf
from fastchargpt.convert.vocabulary import to_hugging_face
from fastchargpt.errors import CheckpointError, ConfigError, TokenizerError
from fastchargpt.integrations.gpt2 import check_gpt2, with_biases
from fastchargpt.integrations.untrusted import check_tensors, check_weights
from fastchargpt.tokenizers import CharTokenizer, Tokenizer, load_tokenizer

__all__ = ["gguf_to_weights", "weights_to_gguf"]

# our JSON, which llama.cpp passes over
TOKENIZER_KEY = "fastchargpt.tokenizer"
NORM_EPSILON = 1e-5
NORMAL, UNUSED = 1, 5  # llama.cpp's kinds of tokens
# GGUF's name of a part and ours; a block's begin with blk.N. and transformer.h.N.
PARTS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
BLOCK_PARTS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
OUR_PARTS = {ours: theirs for theirs, ours in (PARTS | BLOCK_PARTS).items()}


def weights_to_gguf(
    config: GPTConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> tuple[dict[str, Field], dict[str, Tensor]]:
    """The fields and tensors of a GGUF file that computes our model's logits.

    Raises:
        ConfigError: the model computes something that llama.cpp's gpt2 does not.
    """
    check_gpt2(config)
    if config.activation != "gelu_tanh":
        raise ConfigError(
            f"llama.cpp's gpt2 has activation='gelu_tanh', and this model activation={config.activation!r}: it cannot "
            "be written as GGUF; train it with --activation gelu_tanh for that"
        )
    fields: dict[str, Field] = {
        "general.architecture": "gpt2",
        "general.name": "fastchargpt",
        "general.file_type": 0,  # all in fp32
        "gpt2.context_length": config.block_size,
        "gpt2.embedding_length": config.n_embd,
        "gpt2.feed_forward_length": 4 * config.n_embd,
        "gpt2.block_count": config.n_layer,
        "gpt2.attention.head_count": config.n_head,
        "gpt2.attention.layer_norm_epsilon": NORM_EPSILON,
        **_vocabulary(tokenizer, config.vocab_size),
    }
    full = with_biases(config, weights)
    if config.tie_weights:
        full[TIED_COPY] = full.pop(TIED_KEPT)
    return fields, {_their_name(name): tensor for name, tensor in full.items()}


def gguf_to_weights(source: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer | None]:
    """Config, weights and, of a file that fastchargpt wrote, the tokenizer.

    Raises:
        CheckpointError: the file is damaged, or a model that ours is not.
    """
    fields, tensors = read_gguf(source)
    architecture = fields.get("general.architecture")
    if architecture != "gpt2":
        raise CheckpointError(
            f"{source} has general.architecture={architecture!r:.40}, and fastchargpt reads the models of 'gpt2' alone"
        )
    epsilon = fields.get("gpt2.attention.layer_norm_epsilon")
    if not isinstance(epsilon, float) or not abs(epsilon - NORM_EPSILON) < 1e-9:  # NaN is none either
        raise CheckpointError(f"{source} has layer_norm_epsilon={epsilon!r:.40}, and our model computes 1e-05 alone")
    width = fields.get("gpt2.embedding_length")
    inner = fields.get("gpt2.feed_forward_length")
    if not isinstance(width, int) or inner != 4 * width:
        raise CheckpointError(f"{source} has feed_forward_length={inner!r:.40}, and our model's is 4 * n_embd")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{source} lacks the weight token_embd.weight")
    try:
        config = config_from_dict(
            GPTConfig,
            {
                "block_size": fields.get("gpt2.context_length"),
                "vocab_size": tensors["token_embd.weight"].shape[0],
                "n_layer": fields.get("gpt2.block_count"),
                "n_head": fields.get("gpt2.attention.head_count"),
                "n_embd": width,
                "activation": "gelu_tanh",
                "tie_weights": "output.weight" not in tensors,
            },
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} describes a model that ours cannot be: {error}") from None
    weights = {_our_name(name, source): tensor for name, tensor in check_tensors(tensors, source).items()}
    tokenizer, text = None, fields.get(TOKENIZER_KEY)
    if isinstance(text, str):
        try:
            tokenizer = load_tokenizer(text if text.startswith("{") else "{}")
        except TokenizerError as error:
            raise CheckpointError(f"{source} has no usable vocabulary: {error}") from None
    return config, check_weights(config, weights, source), tokenizer


def _their_name(name: str) -> str:
    part, kind = name.rsplit(".", 1)
    if found := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", part):
        return f"blk.{found[1]}.{OUR_PARTS[found[2]]}.{kind}"
    return f"{OUR_PARTS[part]}.{kind}"


def _our_name(name: str, source: Path) -> str:
    found = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", name)
    parts = PARTS if found is None or found[1] is None else BLOCK_PARTS
    if found is None or found[2] not in parts:
        raise CheckpointError(
            f"{source} has a weight {name[:80]!r} that llama.cpp's gpt2 does not: it is of another model"
        )
    block = "" if found[1] is None else f"transformer.h.{int(found[1])}."
    return f"{block}{parts[found[2]]}.{found[3]}"


def _vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Field]:
    """The tokenizer in llama.cpp's terms, padded to the model's vocabulary, and in ours."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none", "gpt2.vocab_size": vocab_size}
    fields: dict[str, Field] = {TOKENIZER_KEY: tokenizer.to_json()}
    padding = range(vocab_size - tokenizer.vocab_size)
    if isinstance(tokenizer, CharTokenizer):
        # llama.cpp's rwkv takes the longest token that fits, and has no end-of-text among ours, as its gpt2 would
        fields["tokenizer.ggml.model"] = "rwkv"
        # padding is spelled with a byte that no text has
        tokens = [*map(_escaped, tokenizer.chars), *(f"\\xff{i}" for i in padding)]
    else:
        model = json.loads(to_hugging_face(tokenizer))["model"]
        fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"] = "gpt2", "gpt-2"
        fields["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in model["merges"]]
        tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), *(f"<unused{i}>" for i in padding)]
    fields["tokenizer.ggml.tokens"] = tokens
    fields["tokenizer.ggml.token_type"] = [NORMAL] * tokenizer.vocab_size + [UNUSED] * len(padding)
    return fields


def _escaped(char: str) -> str:
    return {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\0": "\\x00"}.get(char, char)
