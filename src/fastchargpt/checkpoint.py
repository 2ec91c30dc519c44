"""Checkpoints that survive a kill at any moment, notice damage, and never run code.

A checkpoint is a folder: model.safetensors (weights), tokenizer.json, trainer.pt (optimiser and random state; only
where training can go on) and config.json, which is written last and holds the SHA-256 of the others and of itself.

A save writes a sibling folder `NAME.new`, syncs it, moves the old `NAME` to `NAME.old`, moves the new one in place and
removes the old. Whatever moment a save is cut off at, one of the three is whole, and `load_checkpoint` finds it.

With keep_previous `NAME.old` stays until the next save begins, so that damage to `NAME` costs one interval and not the
run: `load_last_good` falls back to it. A save then needs no more room than it does without.

Every version of this format keeps format, version, writer and sha256 in config.json, so that a file of another version
is told from a damaged one.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastchargpt import __version__
from fastchargpt.config import GPTConfig, TrainConfig, config_from_dict
from fastchargpt.errors import CheckpointError, ConfigError, OutDirError

__all__ = ["Checkpoint", "load_checkpoint", "load_last_good", "save_checkpoint"]

FORMAT = "fastchargpt.checkpoint"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER, TRAINER = "config.json", "model.safetensors", "tokenizer.json", "trainer.pt"
CONFIG_LIMIT_BYTES = 1 << 20
# with tied weights the embedding is the head's; one copy lies on disk
TIED_COPY, TIED_KEPT = "transformer.wte.weight", "lm_head.weight"
# What a config may claim beyond what the weights on disk prove: a rotary table of this many entries (262,144 positions
# of 128 channels), and no more blocks than there are weights for. A hostile config would have memory and time instead.
ROPE_ENTRIES, WEIGHTS_PER_BLOCK = 1 << 25, 4


class _OtherVersion(CheckpointError):
    """A whole checkpoint that this version cannot read: no damage, so nothing falls back from it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    model_config: GPTConfig
    # the model's state dict
    weights: dict[str, Tensor] = field(repr=False)
    # a tokenizer's JSON text; None where the corpus had none
    tokenizer_json: str | None = field(default=None, repr=False)
    # how it was trained; None for converted models
    train_config: TrainConfig | None = None
    # optimiser, random and data state; None where training cannot go on from here
    trainer_state: dict[str, Any] | None = field(default=None, repr=False)
    # facts about the run: iteration, val_loss, data, ... (JSON values)
    info: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint, *, keep_previous: bool = False) -> None:
    """Write a checkpoint in place of the one in `folder`, if any, without a moment at which neither can be loaded.

    Args:
        folder: the checkpoint's folder, made if it is not there.
        checkpoint: what to write.
        keep_previous: whether the one before stays, as `NAME.old`, for `load_last_good`.

    Raises:
        OutDirError: the folder cannot be written (no space, no permission); what was there before is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    new, old = _siblings(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in checkpoint.weights.items()}
    if checkpoint.model_config.tie_weights:
        weights.pop(TIED_COPY, None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file(weights, new / WEIGHTS)
        if checkpoint.tokenizer_json is not None:
            (new / TOKENIZER).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        if checkpoint.trainer_state is not None:
            with (new / TRAINER).open("wb") as file:  # by Python's file, which says what is wrong with the disk
                torch.save(checkpoint.trainer_state, file)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "writer": f"fastchargpt {__version__}",
            "model": asdict(checkpoint.model_config),
            "train": None if checkpoint.train_config is None else asdict(checkpoint.train_config),
            "info": checkpoint.info,
            "files": {path.name: _sha256(path) for path in sorted(new.iterdir())},
        }
        text = json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # safetensors makes a file that its owner alone can read
        for path in new.iterdir():
            _sync(path)
        _sync(new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        _sync(folder.parent)
        if not keep_previous:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a failed write as a RuntimeError beside the disk's own, safetensors as an error of its own
        shutil.rmtree(new, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        before = "the one before is untouched" if folder.exists() or old.exists() else "there is none before it"
        raise OutDirError(f"the checkpoint {folder} could not be written ({_reason(cause)}); {before}") from error


def load_checkpoint(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", with_trainer: bool = False
) -> Checkpoint:
    """Read a checkpoint, verifying every file's SHA-256. Nothing in it is executed.

    Args:
        folder: the checkpoint's folder, or a run's out dir that holds `best` or `last`.
        device: where the weights go.
        with_trainer: whether the trainer's state is read too.

    Raises:
        CheckpointError: there is none, it is damaged, foreign, or written by a later version; the message says which.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _find(Path(folder))
    content = _read_config(folder / CONFIG)
    for name, sha256 in content["files"].items():
        if name not in (WEIGHTS, TOKENIZER, TRAINER):
            raise CheckpointError(
                f"{folder / CONFIG} lists a file {name!r:.60} that no checkpoint has: it is foreign or damaged"
            )
        if name != TRAINER or with_trainer:
            _verify(folder / name, sha256)
    try:
        model_config = config_from_dict(GPTConfig, content["model"])
        train_config = None if content["train"] is None else config_from_dict(TrainConfig, content["train"])
    except (ConfigError, TypeError) as error:
        raise _OtherVersion(
            f"{folder / CONFIG}, written by {_writer(content)}, describes a model that fastchargpt {__version__} does "
            f"not know: {error}"
        ) from None
    if WEIGHTS not in content["files"]:
        raise CheckpointError(f"{folder / CONFIG} lists no {WEIGHTS}: the checkpoint is damaged")
    try:
        weights = load_file(folder / WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} holds no weights that can be read ({_reason(error)})") from None
    if model_config.tie_weights and TIED_KEPT in weights:
        weights[TIED_COPY] = weights[TIED_KEPT]
    _check_claims(folder / CONFIG, model_config, len(weights))
    trainer_state = None
    if with_trainer:
        if TRAINER not in content["files"]:
            raise CheckpointError(f"{folder} holds weights but no {TRAINER}: it can be sampled from, not resumed")
        try:
            trainer_state = torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
        except Exception:  # torch's own unpickler, made for tensors, meets odd bytes with errors of a dozen kinds
            raise CheckpointError(
                f"{folder / TRAINER} holds more than tensors and plain values, so fastchargpt did not write it "
                "and does not read it"
            ) from None
    return Checkpoint(
        model_config=model_config,
        weights=weights,
        tokenizer_json=(folder / TOKENIZER).read_text(encoding="utf-8") if TOKENIZER in content["files"] else None,
        train_config=train_config,
        trainer_state=trainer_state,
        info=content["info"],
    )


def load_last_good(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    with_trainer: bool = False,
    repair: bool = False,
) -> tuple[Checkpoint, str | None]:
    """The checkpoint in a folder or, where it is damaged, the one saved before it.

    Args:
        folder: the checkpoint's folder.
        device: where the weights go.
        with_trainer: whether the trainer's state is read too.
        repair: whether the earlier one is put in its place; the damaged one is then kept as `NAME.damaged`.

    Returns:
        The checkpoint, and what is wrong with the newest one where it is not that.

    Raises:
        CheckpointError: as `load_checkpoint`, and where there is no earlier one that can be read.
    """
    folder = Path(folder)
    try:
        return load_checkpoint(folder, device=device, with_trainer=with_trainer), None
    except _OtherVersion:
        raise
    except CheckpointError as error:
        for earlier in _siblings(folder):
            try:
                found = load_checkpoint(earlier, device=device, with_trainer=with_trainer)
            except CheckpointError:
                continue
            if repair:
                _put_in_place(earlier, folder)
            return found, str(error)
        raise


def _put_in_place(earlier: Path, folder: Path) -> None:
    """Make an earlier checkpoint the newest, keeping the damaged one aside; cut off anywhere, it can be done again."""
    new, _ = _siblings(folder)
    damaged = folder.with_name(folder.name + ".damaged")
    try:
        if earlier != new:
            shutil.rmtree(new, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(damaged, ignore_errors=True)
            os.replace(folder, damaged)
        os.replace(earlier, folder)
        _sync(folder.parent)
    except OSError as error:
        raise OutDirError(f"{earlier} could not be moved to {folder} ({_reason(error)})") from error


def _check_claims(path: Path, config: GPTConfig, weights: int) -> None:
    if config.n_layer * WEIGHTS_PER_BLOCK > weights:
        raise CheckpointError(f"{path} claims {config.n_layer} blocks, and there are {weights} weights: it is foreign")
    if config.position == "rope" and config.block_size * config.head_dim > ROPE_ENTRIES:
        raise CheckpointError(
            f"{path} claims a context of {config.block_size} tokens, for which a rotary table would need more than "
            f"{ROPE_ENTRIES} entries: it is foreign"
        )


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _whole(folder: Path) -> bool:
    """Whether a save into this folder was completed: config.json is written last."""
    try:
        _read_config(folder / CONFIG)
    except CheckpointError:
        return False
    return True


def _settle(folder: Path) -> None:
    """Finish what a killed save left undone, so that `folder` is the newest whole checkpoint."""
    new, old = _siblings(folder)
    if not folder.exists():
        for candidate in (new, old):
            if _whole(candidate):
                os.replace(candidate, folder)
                break
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)


def _find(folder: Path) -> Path:
    """The checkpoint meant by a folder: itself, a run's `best` or `last`, or what a killed save left beside it."""
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / CONFIG).is_file():
            return candidate
        if not candidate.exists():  # a save was cut off between its two moves
            for path in _siblings(candidate):
                if _whole(path):
                    return path
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint at {folder}: the folder does not exist")
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file, and a checkpoint is a folder: `fastchargpt convert` reads other formats"
        )
    if (folder / "ckpt.pt").is_file():
        raise CheckpointError(
            f"{folder} holds a nanoGPT checkpoint: bring it in with `fastchargpt convert {folder} NEW_FOLDER`"
        )
    raise CheckpointError(f"{folder} holds no checkpoint: there is no {CONFIG} in it, nor in best/ or last/ under it")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > CONFIG_LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {CONFIG_LIMIT_BYTES} bytes: it is foreign or damaged")
        content = json.loads(path.read_text(encoding="utf-8"))
        intact = isinstance(content, dict) and content.pop("sha256", None) == _digest(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({_reason(error)}): the checkpoint is damaged") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by fastchargpt: `fastchargpt convert` reads other formats")
    damaged = f"{path} does not match its own checksum: the checkpoint is damaged, or was edited by hand"
    if not intact:
        raise CheckpointError(damaged)
    if content.get("version") != VERSION:
        raise _OtherVersion(
            f"{path} is of checkpoint version {content.get('version')!r:.40}, written by {_writer(content)}, and "
            f"fastchargpt {__version__} reads version {VERSION}: use the fastchargpt that wrote it"
        )
    parts: dict[str, Any] = {"files": dict, "info": dict, "model": dict, "train": (dict, type(None))}
    if any(name not in content or not isinstance(content[name], kind) for name, kind in parts.items()):
        raise CheckpointError(damaged)
    return content


def _writer(content: dict[str, Any]) -> str:
    """The program that wrote a checkpoint, in its own words; the first ones did not say."""
    writer = content.get("writer")
    return writer[:60] if isinstance(writer, str) and writer.isprintable() else "a fastchargpt that did not say which"


def _verify(path: Path, sha256: object) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({_reason(error)}): the checkpoint is damaged") from None
    if found != sha256:
        raise CheckpointError(f"{path} does not match its checksum: the file is truncated or damaged")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or a folder's list of names, last through a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
