"""From one format to another, whole or not at all."""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fastchargpt.checkpoint import Checkpoint
from fastchargpt.convert.readers import detect, read
from fastchargpt.convert.vocabulary import check_vocabulary, read_vocabulary
from fastchargpt.convert.writers import IS_FOLDER, write
from fastchargpt.errors import CheckpointError, ConfigError, OutDirError, nearest
from fastchargpt.model import GPT

__all__ = ["FORMATS", "Conversion", "Format", "convert"]

Format = Literal["fastchargpt", "nanogpt", "lecture", "hf", "safetensors", "gguf"]
FORMATS: tuple[str, ...] = get_args(Format)
# logits in float64 of the same numbers: only the order of sums may differ
TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done."""

    # the formats
    source_format: str
    target_format: str
    # what could not be carried over, or is to be known, one sentence each
    notes: tuple[str, ...]
    # largest difference between the logits of source and result, and what computed them; None where not asked for
    checked: tuple[float, str] | None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Format | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    check: bool = False,
) -> Conversion:
    """Convert a model between formats.

    `fastchargpt` is our checkpoint folder (or a run's out dir, of which the best is taken), `nanogpt` a folder with
    ckpt.pt and meta.pkl, `lecture` the state dict of gpt.py's GPTLanguageModel in one file, `hf` a GPT-2 folder of
    transformers, `safetensors` one file that holds config and vocabulary as metadata, `gguf` the one that llama.cpp
    runs, for models with activation="gelu_tanh".

    Args:
        source: what to read; its format is found out.
        target: what to write; it must not exist.
        to: the target's format; None takes safetensors or gguf for a name that ends so, else fastchargpt for foreign
            models.
        tokenizer: a vocabulary to take in place of the source's: our tokenizer.json or Hugging Face's, nanoGPT's
            meta.pkl, or the .txt whose characters it is.
        check: read the result back and compare logits before it gets its name; with transformers at hand, its own
            GPT-2 computes those of an `hf` folder.

    Raises:
        CheckpointError: the source is missing, damaged, hostile or foreign; or the logits differ.
        ConfigError: the target's format cannot express the model.
        OutDirError: the target exists or cannot be written.
    """
    source, target = Path(source), Path(target)
    notes: list[str] = []
    kind = detect(source)
    checkpoint = read(source, kind, notes)
    to = _target_format(to, kind, target)
    if target.exists():
        raise OutDirError(f"{target} exists, and convert overwrites nothing: name another, or remove it first")
    if tokenizer is not None:
        found = read_vocabulary(Path(tokenizer))
        check_vocabulary(found, checkpoint.model_config.vocab_size, tokenizer)
        checkpoint = dataclasses.replace(checkpoint, tokenizer_json=found.to_json())
        notes = [note for note in notes if not note.startswith("no vocabulary")]
    part = target.with_name(target.name + ".part")
    try:
        _remove(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        write(checkpoint, part, to, notes, home=target)
        checked = _check(checkpoint, (source, kind), (part, to)) if check else None
        os.replace(part, target)
    except OSError as error:
        if isinstance(error, OutDirError):
            raise
        raise OutDirError(f"{target} cannot be written ({error.strerror or error})") from None
    finally:
        _remove(part)
    return Conversion(source_format=kind, target_format=to, notes=tuple(notes), checked=checked)


def _target_format(to: Format | None, kind: str, target: Path) -> Format:
    if to is None:
        if target.suffix == ".safetensors":
            return "safetensors"
        if target.suffix == ".gguf":
            return "gguf"
        if kind == "fastchargpt":
            raise ConfigError(f"say with --to what {target} is to be: {', '.join(FORMATS)}")
        return "fastchargpt"
    if to not in FORMATS:
        raise ConfigError(f"the format must be one of {', '.join(FORMATS)}, not {to!r}{nearest(to, FORMATS)}")
    if IS_FOLDER[to] and target.suffix in (".pt", ".pth", ".safetensors", ".bin", ".gguf"):
        raise ConfigError(f"{to} is a folder, and {target} looks like a file: leave the ending {target.suffix} out")
    return to


def _check(checkpoint: Checkpoint, source: tuple[Path, str], result: tuple[Path, str]) -> tuple[float, str]:
    """The largest difference between the logits of source and result, on random tokens.

    Raises:
        CheckpointError: it is more than rounding.
    """
    config = checkpoint.model_config
    tokens = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (2, min(config.block_size, 64)), generator=tokens)
    computed = [_logits(read(*result, []), idx), *_peer_logits(*source, idx), *_peer_logits(*result, idx)]
    expected = _logits(checkpoint, idx)
    worst = max(float((logits - expected).abs().max()) for logits in computed)
    if not worst <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(f"the logits of source and result differ by {worst:.2g}: nothing was written")
    return worst, "transformers too" if len(computed) > 1 else "fastchargpt"


@torch.no_grad()
def _logits(checkpoint: Checkpoint, idx: Tensor) -> Tensor:
    model = GPT.from_state_dict(checkpoint.model_config, checkpoint.weights).double().eval()
    return model.logits(model.hidden(idx))


@torch.no_grad()
def _peer_logits(path: Path, kind: str, idx: Tensor) -> list[Tensor]:
    """The logits that transformers computes of an hf folder, where it is installed."""
    if kind != "hf":
        return []
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        return []
    model = GPT2LMHeadModel.from_pretrained(str(path), dtype=torch.float64).eval()
    logits: Tensor = model(idx).logits
    return [logits]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
