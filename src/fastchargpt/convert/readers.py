"""Other people's models into a `Checkpoint`. Nothing in a file is executed, and everything in it is checked."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastchargpt.checkpoint import Checkpoint, load_checkpoint
from fastchargpt.config import GPTConfig, config_from_dict
from fastchargpt.convert.gguf_gpt2 import gguf_to_weights
from fastchargpt.convert.vocabulary import check_vocabulary, from_hugging_face
from fastchargpt.errors import CheckpointError, ConfigError, TokenizerError
from fastchargpt.integrations.gpt2 import read_gpt2
from fastchargpt.integrations.lecture import is_lecture, lecture_to_weights
from fastchargpt.integrations.untrusted import check_tensors, check_weights, read_json, read_safetensors, read_torch
from fastchargpt.nanogpt_data import read_meta
from fastchargpt.tokenizers import Tokenizer, load_tokenizer

__all__ = ["CONFIG_KEY", "TOKENIZER_KEY", "detect", "read"]

# metadata of a plain safetensors file that fastchargpt wrote
CONFIG_KEY, TOKENIZER_KEY = "fastchargpt.config", "fastchargpt.tokenizer"
NANOGPT_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def detect(source: Path) -> str:
    """Which format a file or folder is in: fastchargpt, nanogpt, lecture, hf, safetensors or gguf.

    Raises:
        CheckpointError: there is nothing there, or nothing that is known.
    """
    if not source.exists():
        raise CheckpointError(f"there is nothing at {source}")
    if source.is_dir():
        if (source / "config.json").is_file() and "model_type" in read_json(source / "config.json"):
            return "hf"
        return "nanogpt" if (source / "ckpt.pt").is_file() else "fastchargpt"
    if source.suffix == ".safetensors":
        return "safetensors"
    if source.suffix == ".gguf":
        return "gguf"
    content = read_torch(source)
    if "model_args" in content:
        return "nanogpt"
    if is_lecture(content):
        return "lecture"
    raise CheckpointError(
        f"{source} is neither nanoGPT's ckpt.pt (there is no 'model_args') nor the lecture's state dict (other names)"
    )


def read(source: Path, kind: str, notes: list[str]) -> Checkpoint:
    """The model in a file or folder of a format that `detect` names. What a user should know is added to `notes`.

    Raises:
        CheckpointError: it is damaged, hostile, or a model that ours cannot be.
    """
    if kind == "fastchargpt":
        return load_checkpoint(source)
    readers = {
        "nanogpt": _read_nanogpt,
        "lecture": _read_lecture,
        "hf": _read_hf,
        "safetensors": _read_safetensors,
        "gguf": _read_gguf,
    }
    return readers[kind](source, notes)


def _checkpoint(
    source: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer | None, **info: Any
) -> Checkpoint:
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, source)
    text = None if tokenizer is None else tokenizer.to_json()
    return Checkpoint(model_config=config, weights=weights, tokenizer_json=text, info=info)


def _read_nanogpt(source: Path, notes: list[str]) -> Checkpoint:
    folder = source if source.is_dir() else source.parent
    path = source / "ckpt.pt" if source.is_dir() else source
    content = read_torch(path)
    fields = content.get("model_args")
    if not isinstance(fields, dict) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(f"{path} is not nanoGPT's: it needs the dicts 'model' and 'model_args'")
    for name in fields:
        if name not in NANOGPT_FIELDS:
            raise CheckpointError(
                f"{path} has the model argument {name!r:.60}, which nanoGPT's model does not: it is a fork's"
            )
        if not isinstance(fields[name], int | float | str):
            kind = type(fields[name]).__name__
            raise CheckpointError(f"{path} has a {kind} for the model argument {name}: it is damaged")
    try:
        config = config_from_dict(GPTConfig, fields)
    except ConfigError as error:
        raise CheckpointError(f"{path} describes a model that ours cannot be: {error}") from None
    weights = {}
    for name, tensor in content["model"].items():
        # prefixes of torch.compile and DDP, and the causal masks that nanoGPT keeps on an old torch
        bare = re.sub(r"^(_orig_mod\.|module\.)+", "", str(name))
        if not re.search(r"\.attn\.bias$", bare):
            weights[bare] = tensor
    info: dict[str, Any] = {"converted_from": "nanogpt"}
    for theirs, ours in (("iter_num", "iteration"), ("best_val_loss", "val_loss")):
        value = content.get(theirs)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int | float):
            info[ours] = value
    return _checkpoint(
        path,
        config,
        check_weights(config, check_tensors(weights, path), path),
        _nanogpt_vocabulary(folder, content.get("config"), notes),
        **info,
    )


def _nanogpt_vocabulary(folder: Path, run: Any, notes: list[str]) -> Tokenizer | None:
    """meta.pkl beside ckpt.pt, or where nanoGPT keeps it: data/NAME of the checkout that the out dir lies in."""
    places = [folder / "meta.pkl"]
    dataset = run.get("dataset") if isinstance(run, dict) else None
    if isinstance(dataset, str) and re.fullmatch(r"[\w.-]+", dataset):
        places.append(folder.parent / "data" / dataset / "meta.pkl")
    for place in places:
        if place.is_file():
            return read_meta(place)
    notes.append(f"no vocabulary: there is no {' or '.join(map(str, places))}; name one with --tokenizer")
    return None


def _read_lecture(source: Path, notes: list[str]) -> Checkpoint:
    config, weights = lecture_to_weights(read_torch(source), source=source)
    notes.append("no vocabulary: the lecture's file has none; name its text (input.txt) with --tokenizer")
    return _checkpoint(source, config, weights, None, converted_from="lecture")


def _read_hf(source: Path, notes: list[str]) -> Checkpoint:
    config, weights = read_gpt2(source)
    tokenizer = None
    if (source / "tokenizer.json").is_file():
        tokenizer = from_hugging_face(source / "tokenizer.json")
        if tokenizer is None:
            notes.append(f"no vocabulary: fastchargpt has no tokenizer with the ids of {source / 'tokenizer.json'}")
    else:
        notes.append(f"no vocabulary: there is no {source / 'tokenizer.json'}; name one with --tokenizer")
    return _checkpoint(source, config, weights, tokenizer, converted_from="hf")


def _read_gguf(source: Path, notes: list[str]) -> Checkpoint:
    config, weights, tokenizer = gguf_to_weights(source)
    if tokenizer is None:
        notes.append(f"no vocabulary: {source} has none that fastchargpt wrote; name one with --tokenizer")
    return _checkpoint(source, config, weights, tokenizer, converted_from="gguf")


def _read_safetensors(source: Path, notes: list[str]) -> Checkpoint:
    weights, metadata = read_safetensors(source)
    if CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{source} does not say what model it is (metadata {CONFIG_KEY!r}): give the folder of a transformers "
            "model, with its config.json"
        )
    try:
        fields = json.loads(metadata[CONFIG_KEY])
        if not isinstance(fields, dict):
            raise CheckpointError(f"{source} is damaged: its {CONFIG_KEY} is no JSON object")
        config = config_from_dict(GPTConfig, fields)
        tokenizer = load_tokenizer(metadata[TOKENIZER_KEY]) if metadata.get(TOKENIZER_KEY, "").startswith("{") else None
    except (ValueError, RecursionError) as error:  # ConfigError and TokenizerError are ValueErrors
        if isinstance(error, CheckpointError):
            raise
        kind = (
            "describes a model or tokenizer that ours cannot be"
            if isinstance(error, ConfigError | TokenizerError)
            else "is damaged"
        )
        raise CheckpointError(f"{source} {kind}: {error}") from None
    weights = check_weights(config, check_tensors(weights, source), source)
    return _checkpoint(source, config, weights, tokenizer, converted_from="safetensors")
