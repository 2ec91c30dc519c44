"""Other people's files: read without running anything in them, checked before anything is built from them."""

import dataclasses
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastchargpt.checkpoint import TIED_COPY, TIED_KEPT
from fastchargpt.config import GPTConfig
from fastchargpt.errors import CheckpointError
from fastchargpt.model import GPT, shapes_alone

__all__ = ["check_tensors", "check_weights", "read_json", "read_safetensors", "read_torch"]

JSON_LIMIT_BYTES = 64 << 20  # a tokenizer.json of a large vocabulary has 20 MB
# RoPE's tables are made from block_size alone, which no weight vouches for
ROPE_LIMIT_TOKENS = 1 << 22


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is none, it is too large, or it is no JSON object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(JSON_LIMIT_BYTES + 1)
        if len(raw) > JSON_LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT_BYTES >> 20} MiB: it is foreign or damaged")
        content = json.loads(raw)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not JSON ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and it holds a {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in memory, and its metadata.

    Raises:
        CheckpointError: there is none, or it is damaged or foreign.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or _first_line(error)})") from None
    except (SafetensorError, ValueError, RuntimeError, AttributeError) as error:
        # a dtype that this torch does not have surfaces as one of the last three
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({_first_line(error)})") from None


def read_torch(path: Path) -> dict[Any, Any]:
    """The dict that torch.save wrote: tensors, numbers, text and containers of them, and nothing else.

    Raises:
        CheckpointError: there is none, it is damaged, it holds something else, or it would run code; none of it runs.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read (there is no such file)")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"{path} is a compressed archive, which torch.save never writes: refused")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else _first_line(error)
        raise CheckpointError(
            f"{path} is a pickle of more than weights ({reason}): refused, and nothing in it was run"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:
        # torch's reader promises no kind of exception for a damaged file: any that it lets out means just that
        raise CheckpointError(f"{path} is damaged or not a file of torch.save ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dict, and it holds a {type(content).__name__}")
    return content


def check_tensors(weights: Any, source: object) -> dict[str, Tensor]:
    """The weights, each a plain floating-point tensor whose numbers the file really holds, in fp32 or wider.

    Raises:
        CheckpointError: there are none, or one is something else.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{source} holds no weights")
    checked = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source} has an entry {name!r:.60} among its weights that is no tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name:.60} must be a dense floating-point tensor, not {_kind(tensor)}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{source}: {name:.60} claims more numbers than the file holds")
        checked[name] = tensor.detach().float() if tensor.element_size() < 4 else tensor.detach()
    return checked


def check_weights(config: GPTConfig, weights: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """The weights of this model; of a tied pair one may be missing.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape, or a tied pair differs.
    """
    weights = dict(weights)
    if config.tie_weights:
        for one, other in ((TIED_COPY, TIED_KEPT), (TIED_KEPT, TIED_COPY)):
            if one in weights:
                weights.setdefault(other, weights[one])
    # before a model is built: its number of layers and the length of its tables must be the file's own
    layers = {int(found[1]) for name in weights if (found := re.match(r"transformer\.h\.(\d{1,6})\.", name))}
    if len(layers) != config.n_layer:
        raise CheckpointError(f"{source} describes {config.n_layer} layers and holds the weights of {len(layers)}")
    if config.position == "rope" and config.block_size > ROPE_LIMIT_TOKENS:
        raise CheckpointError(f"{source} claims a block_size of {config.block_size}, above {ROPE_LIMIT_TOKENS}")
    try:
        with shapes_alone():
            sample = GPT(dataclasses.replace(config, n_layer=1)).state_dict()
    except RuntimeError as error:  # torch counts bytes in 64 bits
        raise CheckpointError(f"{source} describes a model beyond every memory ({_first_line(error)})") from None
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in sample.items():
        copies = range(config.n_layer) if name.startswith("transformer.h.0.") else range(1)
        expected |= {name.replace(".h.0.", f".h.{layer}."): tuple(tensor.shape) for layer in copies}
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{source} lacks the weight {name}")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} has the shape {tuple(weights[name].shape)}, where its config needs {shape}"
            )
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} has a weight {unexpected[0]:.80} that the model does not: it is of another model"
        )
    if config.tie_weights and not torch.equal(weights[TIED_COPY], weights[TIED_KEPT]):
        raise CheckpointError(f"{source}: {TIED_COPY} and {TIED_KEPT} differ, and the model ties them")
    return {name: weights[name] for name in expected}


def _kind(tensor: Tensor) -> str:
    where = "without numbers" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
    return f"{str(tensor.dtype).removeprefix('torch.')} ({where}, {math.prod(tensor.shape)} elements)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
