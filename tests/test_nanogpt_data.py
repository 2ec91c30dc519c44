"""Folders that nanoGPT's prepare.py wrote, and metas meant to break the reader."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import TEXT, nothing_outside, write  # noqa: F401 (a fixture, used by name)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchargpt import nanogpt_data
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import CorpusError
from fastchargpt.tokenizers import CharTokenizer

pytestmark = pytest.mark.usefixtures("nothing_outside")


def nanogpt_folder(folder: Path, meta: bytes | None = None, tokens: Any = (0, 1, 2, 1)) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.array(tokens, np.uint16).tofile(folder / name)
    if meta is not None:
        write(folder / "meta.pkl", meta)
    return folder


META = {"vocab_size": 3, "itos": {0: "a", 1: "é", 2: "\n"}, "stoi": {"a": 0, "é": 1, "\n": 2}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpt_folder(protocol: int, tmp_path: Path) -> None:
    loaded = load_corpus(nanogpt_folder(tmp_path / "mine", pickle.dumps(META, protocol)))
    assert loaded.tokenizer == CharTokenizer("aé\n")
    assert (loaded.name, loaded.vocab_size) == ("mine", 3)
    assert loaded.tokenizer.decode(loaded.train) == "aé\né"
    assert isinstance(loaded.train, np.memmap)


def test_nanogpt_folder_without_meta_is_gpt2(tmp_path: Path) -> None:
    loaded = load_corpus(nanogpt_folder(tmp_path / "owt", tokens=[50256, 0]))
    assert loaded.tokenizer is None
    assert loaded.vocab_size == 50257
    with pytest.raises(CorpusError, match="token 50257"):
        load_corpus(nanogpt_folder(tmp_path / "owt", tokens=[50257, 0]))


def test_nanogpt_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a folder without train.bin"):
        load_corpus(tmp_path)
    folder = nanogpt_folder(tmp_path / "x", pickle.dumps(META))
    with pytest.raises(CorpusError, match="already tokenised"):
        load_corpus(folder, tokenizer="bpe")
    with pytest.raises(CorpusError, match="another vocabulary"):
        load_corpus(folder, tokenizer=CharTokenizer("ab\n"))
    with pytest.raises(CorpusError, match="split of its own"):
        load_corpus(folder, val_fraction=0.5)
    with pytest.raises(CorpusError, match=r"token 9, outside the 3 of meta.pkl"):
        load_corpus(nanogpt_folder(tmp_path / "y", pickle.dumps(META), [0, 9]))
    write(folder / "val.bin", b"abc")
    with pytest.raises(CorpusError, match=r"val.bin must be a file of uint16 tokens, and it has 3 bytes"):
        load_corpus(folder)
    (folder / "val.bin").unlink()
    with pytest.raises(CorpusError, match=r"val.bin cannot be read"):
        load_corpus(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_is_executed(protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for hostile in (Canary(canary), {**META, "extra": Canary(canary)}, {**META, "itos": Canary(canary)}):
        path = write(tmp_path / "meta.pkl", pickle.dumps(hostile, protocol))
        with pytest.raises(CorpusError, match=r"not a meta.pkl"):
            nanogpt_data.read_meta(path)
        assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary), protocol))
    assert canary.exists()  # the canary does sing where it is unpickled


HOSTILE_META = {
    "empty": b"",
    "text": b"hello",
    "no stop": pickle.dumps(META)[:-1],
    "number": pickle.dumps(5),
    "list": pickle.dumps([1, 2]),
    "keys missing": pickle.dumps({"itos": {}}),
    "itos a list": pickle.dumps({**META, "itos": ["a"]}),
    "gap": pickle.dumps({**META, "itos": {0: "a", 2: "b"}}),
    "disagree": pickle.dumps({**META, "stoi": {"a": 1, "é": 0, "\n": 2}}),
    "size": pickle.dumps({**META, "vocab_size": 65}),
    "two characters": pickle.dumps({"itos": {0: "ab"}, "stoi": {"ab": 0}}),
    "surrogate": pickle.dumps({"itos": {0: "\ud800", 1: "a"}, "stoi": {"\ud800": 0, "a": 1}}),
    "huge memo": b"\x80\x04}r\xff\xff\xff\x7f.",
    "huge string": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b".",
    "huge bytearray": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
    "huge integer": b"I" + b"9" * 5000 + b"\n.",
    "stack underflow": b"\x80\x04s.",
    "mark underflow": b"\x80\x04u.",
    "mark as key": b"\x80\x04}(K\x01s.",
    "memo missing": b"\x80\x04h\x05.",
    "self": b"\x80\x04}q\x00X\x04\x00\x00\x00itosh\x00sX\x04\x00\x00\x00stoih\x00s.",
    "large": pickle.dumps("a" * (3 * 2**20)),
}


@pytest.mark.parametrize("name", HOSTILE_META)
def test_hostile_meta_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"meta.pkl") as caught:
        nanogpt_data.read_meta(write(tmp_path / "meta.pkl", HOSTILE_META[name]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_meta_loads_or_says_why(data: st.DataObject) -> None:
    raw = bytearray(pickle.dumps(META, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        nanogpt_data._read_plain_pickle(bytes(raw))
