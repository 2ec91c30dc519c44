"""A checkpoint survives failures at every step of its writing, notices damage, and runs nothing that it reads."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchargpt.checkpoint import Checkpoint, load_checkpoint, load_last_good, save_checkpoint
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.errors import CheckpointError, OutDirError
from fastchargpt.loading import load
from fastchargpt.model import GPT
from fastchargpt.tokenizers import CharTokenizer

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=3)


def checkpoint(seed: int = 0, config: GPTConfig = CONFIG) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        model_config=config,
        weights=GPT(config).state_dict(),
        tokenizer_json=CharTokenizer("abc").to_json(),
        train_config=TrainConfig(seed=seed),
        trainer_state={"numbers": [1, 2.5], "tensor": torch.arange(3)},
        info={"iteration": seed},
    )


@pytest.mark.parametrize("family", ["lecture", "nanogpt", "modern"])
def test_round_trip(tmp_path: Path, family: str) -> None:
    config = GPTConfig.family(family, n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=3)  # type: ignore[arg-type]
    saved = checkpoint(3, config)
    save_checkpoint(tmp_path / "c", saved)
    found = load_checkpoint(tmp_path / "c", with_trainer=True)
    assert (found.model_config, found.train_config, found.info) == (config, TrainConfig(seed=3), {"iteration": 3})
    assert found.tokenizer_json == saved.tokenizer_json
    assert found.weights.keys() == saved.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in saved.weights.items())
    assert found.trainer_state is not None
    assert torch.equal(found.trainer_state["tensor"], torch.arange(3))
    model, tokenizer = load(tmp_path / "c")
    assert tokenizer is not None
    assert tokenizer.decode([0, 2]) == "ac"
    idx = torch.tensor([[0, 1, 2]])
    torch.manual_seed(3)
    assert torch.equal(model(idx)[0], GPT(config).eval()(idx)[0])


def test_an_out_dir_means_its_best(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", checkpoint(1))
    assert load_checkpoint(tmp_path).info == {"iteration": 1}
    save_checkpoint(tmp_path / "best", checkpoint(2))
    assert load_checkpoint(tmp_path).info == {"iteration": 2}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def _failing_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Callable[[], int]:
    """Make the number-th system call of a save fail; the returned function counts those that were made."""
    calls = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return original(*args, **kwargs)

        return call

    import safetensors.torch

    monkeypatch.setattr(os, "fsync", wrap(os.fsync))
    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(Path, "mkdir", wrap(Path.mkdir))
    monkeypatch.setattr(Path, "write_text", wrap(Path.write_text))
    monkeypatch.setattr(torch, "save", wrap(torch.save))
    monkeypatch.setattr(safetensors.torch, "save_file", wrap(safetensors.torch.save_file))
    monkeypatch.setattr(shutil, "rmtree", wrap(shutil.rmtree))
    return lambda: calls


@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize("kind", ["killed", "disk full"])
def test_every_system_call_may_fail(tmp_path: Path, kind: str, keep_previous: bool) -> None:
    number, finished = 0, False
    while not finished:
        number += 1
        folder = tmp_path / str(number) / "last"
        save_checkpoint(folder, checkpoint(0))
        save_checkpoint(folder, checkpoint(1), keep_previous=keep_previous)
        error: BaseException = Killed() if kind == "killed" else OSError(errno.ENOSPC, "No space left on device")
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = _failing_at(monkeypatch, number, error)
            with contextlib.suppress(Killed, OutDirError):
                save_checkpoint(folder, checkpoint(2), keep_previous=keep_previous)
            finished = calls() < number
        # whichever of the two is there is whole, and the next save goes through
        assert load_checkpoint(folder, with_trainer=True).info["iteration"] in (1, 2), f"call {number}"
        save_checkpoint(folder, checkpoint(3))
        assert load_checkpoint(folder).info == {"iteration": 3}
        assert sorted(path.name for path in folder.parent.iterdir()) == ["last"]
    assert number > 10


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    import signal

    save_checkpoint(tmp_path / "last", checkpoint(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OutDirError, match=r"could not be written \(.*\); the one before is untouched"):
            save_checkpoint(tmp_path / "last", checkpoint(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(tmp_path / "last", with_trainer=True).info == {"iteration": 1}


def _damage(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "trainer.pt", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path / "c", checkpoint())
    _damage(tmp_path / "c" / name, damage)
    with pytest.raises(CheckpointError, match=r"config.json|" + name):
        load_checkpoint(tmp_path / "c", with_trainer=True)


def test_foreign_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: there is no config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
        load_checkpoint(tmp_path / "file")
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "ckpt.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds a nanoGPT checkpoint: bring it in with `fastchargpt convert"):
        load_checkpoint(tmp_path / "nano")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="was not written by fastchargpt"):
        load_checkpoint(tmp_path / "hf")
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "bomb")


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit config.json and sign it again, as a hostile writer could."""
    from fastchargpt.checkpoint import _digest

    content = json.loads((folder / "config.json").read_text())
    del content["sha256"]
    change(content)
    (folder / "config.json").write_text(json.dumps({**content, "sha256": _digest(content)}))


def test_other_versions_and_hostile_configs(tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def refused(change: Callable[[dict[str, Any]], None], sentence: str) -> None:
        save_checkpoint(folder, checkpoint())
        _rewrite(folder, change)
        with pytest.raises(CheckpointError, match=sentence):
            load_checkpoint(folder)

    refused(
        lambda c: c.update(version=2, writer="fastchargpt 9.1"),
        r"is of checkpoint version 2, written by fastchargpt 9\.1, and fastchargpt .* reads version 1: use the fast",
    )
    refused(lambda c: (c.update(version=0), c.pop("writer")), "a fastchargpt that did not say which")  # type: ignore[arg-type]
    refused(lambda c: c["files"].update({"../../secret": "0"}), "lists a file '../../secret' that no checkpoint has")
    refused(lambda c: c["model"].update(n_layer=-1), "n_layer must be at least 1")
    refused(lambda c: c["model"].update(colour="red"), "written by fastchargpt .*GPTConfig has no field 'colour'")
    refused(lambda c: c["model"].update(n_layer=10**9), "claims 1000000000 blocks, and there are 17 weights")
    refused(lambda c: c["model"].update(position="rope", block_size=2**40), "a rotary table would need more than")
    refused(lambda c: c["files"].pop("model.safetensors"), "lists no model.safetensors")
    refused(lambda c: c.update(files=[]), "does not match its own checksum")


def test_a_checkpoint_from_before_a_setting_was_there_loads_with_its_default(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", checkpoint(4))
    _rewrite(tmp_path / "c", lambda c: (c.pop("writer"), c["train"].pop("deterministic"), c["model"].pop("rope_base")))  # type: ignore[arg-type, return-value]
    found = load_checkpoint(tmp_path / "c", with_trainer=True)
    assert (found.model_config, found.train_config) == (CONFIG, TrainConfig(seed=4))


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    save_checkpoint(folder, checkpoint())
    _rewrite(folder, lambda c: c["model"].update(n_embd=16))
    with pytest.raises(CheckpointError, match="do not fit the model it describes"):
        load(folder)


def test_a_pickle_with_code_does_not_run(tmp_path: Path) -> None:
    import hashlib

    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(canary),))

    folder = tmp_path / "c"
    save_checkpoint(folder, checkpoint())
    payload = pickle.dumps(Hostile(), protocol=2)
    (folder / "trainer.pt").write_bytes(payload)
    _rewrite(folder, lambda c: c["files"].update({"trainer.pt": hashlib.sha256(payload).hexdigest()}))
    with pytest.raises(CheckpointError, match=r"trainer.pt"):
        load_checkpoint(folder, with_trainer=True)
    torch.save({"state": Hostile()}, folder / "trainer.pt")
    digest = hashlib.sha256((folder / "trainer.pt").read_bytes()).hexdigest()
    _rewrite(folder, lambda c: c["files"].update({"trainer.pt": digest}))
    with pytest.raises(CheckpointError, match=r"trainer.pt"):
        load_checkpoint(folder, with_trainer=True)
    assert not canary.exists()


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    import dataclasses

    save_checkpoint(tmp_path / "c", dataclasses.replace(checkpoint(), trainer_state=None))
    with pytest.raises(CheckpointError, match="can be sampled from, not resumed"):
        load_checkpoint(tmp_path / "c", with_trainer=True)


# --- falling back to the save before --------------------------------------------------------------------------------


def two_saves(folder: Path) -> None:
    for iteration in (1, 2):
        save_checkpoint(folder, checkpoint(iteration), keep_previous=True)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "trainer.pt", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_the_save_before_stands_in_for_a_damaged_one(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "last"
    two_saves(folder)
    assert load_last_good(folder, with_trainer=True)[1] is None
    _damage(folder / name, damage)
    for _ in range(2):  # asking changes nothing
        found, why = load_last_good(folder, with_trainer=True)
        assert found.info == {"iteration": 1}
        assert why is not None
        assert name in why or "config.json" in why
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last.old"]
    assert load_last_good(folder, with_trainer=True, repair=True)[0].info == {"iteration": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last.damaged"]
    assert load_checkpoint(folder, with_trainer=True).info == {"iteration": 1}
    save_checkpoint(folder, checkpoint(3), keep_previous=True)
    assert load_checkpoint(folder, with_trainer=True).info == {"iteration": 3}
    assert load_checkpoint(tmp_path / "last.old", with_trainer=True).info == {"iteration": 1}


def test_a_whole_save_that_was_not_moved_in_yet_is_newer_than_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    two_saves(folder)
    save_checkpoint(tmp_path / "elsewhere", checkpoint(3))
    os.replace(tmp_path / "elsewhere", tmp_path / "last.new")  # killed after the sync, before the moves
    _damage(folder / "trainer.pt", "flipped")
    assert load_last_good(folder, with_trainer=True, repair=True)[0].info == {"iteration": 3}
    assert load_checkpoint(folder, with_trainer=True).info == {"iteration": 3}


def test_no_fall_back_without_a_save_before_or_from_another_version(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", checkpoint(1))
    _damage(tmp_path / "last" / "trainer.pt", "flipped")
    with pytest.raises(CheckpointError, match=r"trainer.pt does not match its checksum"):
        load_last_good(tmp_path / "last", with_trainer=True)
    two_saves(tmp_path / "last")
    for name in ("last", "last.old"):
        _damage(tmp_path / name / "trainer.pt", "flipped")
    with pytest.raises(CheckpointError, match=r"last.trainer.pt does not match its checksum"):
        load_last_good(tmp_path / "last", with_trainer=True)
    two_saves(tmp_path / "last")
    _rewrite(tmp_path / "last", lambda c: c.update(version=2))
    with pytest.raises(CheckpointError, match="is of checkpoint version 2"):
        load_last_good(tmp_path / "last")


def test_a_repair_may_be_cut_off_anywhere(tmp_path: Path) -> None:
    number, finished = 0, False
    while not finished:
        number += 1
        folder = tmp_path / str(number) / "last"
        two_saves(folder)
        _damage(folder / "trainer.pt", "flipped")
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = _failing_at(monkeypatch, number, Killed())
            with contextlib.suppress(Killed):
                load_last_good(folder, with_trainer=True, repair=True)
            finished = calls() < number
        assert load_last_good(folder, with_trainer=True, repair=True)[0].info == {"iteration": 1}
        assert load_checkpoint(folder, with_trainer=True).info == {"iteration": 1}
    assert number > 3


def test_the_save_before_needs_no_more_room_than_a_save_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "last"
    two_saves(folder)
    seen: list[list[str]] = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda *_: seen.append(sorted(path.name for path in tmp_path.iterdir())) or save(*_)
    )
    save_checkpoint(folder, checkpoint(3), keep_previous=True)
    assert seen == [["last", "last.new"]]
