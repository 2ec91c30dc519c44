"""Any text file as a corpus: kept exactly, split where asked, streamed where it is large, refused in a sentence."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import TEXT, nothing_outside, write  # noqa: F401 (a fixture, used by name)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchargpt import corpus, text_files
from fastchargpt.batches import TokenBatches
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import CorpusError, TokenizerError
from fastchargpt.tokenizers import BPETokenizer, CharTokenizer

pytestmark = pytest.mark.usefixtures("nothing_outside")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_any_text_file_is_kept_exactly(kind: str, tmp_path: Path) -> None:
    text = "\ufeffBOM\r\nCRLF\0 é中🙂\n" * 20
    loaded = load_corpus(write(tmp_path / "any.txt", text), tokenizer=kind, bpe_vocab_size=280)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.name == kind
    assert loaded.tokenizer.decode(loaded.train) == text[: int(0.9 * len(text))]
    assert loaded.tokenizer.decode(loaded.val) == text[int(0.9 * len(text)) :]
    assert loaded.source == str(tmp_path / "any.txt")


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2), st.floats(0.01, 0.99))
def test_every_text_is_split_where_asked(text: str, val_fraction: float) -> None:
    plan = corpus._Plan("char", 300, 1 - val_fraction)
    try:
        loaded = plan.split_text(text, "x", "x")
    except CorpusError:
        assert len(set(text)) == 1 or int((1 - val_fraction) * len(text)) in (0, len(text))
        return
    assert loaded.tokenizer is not None
    cut = int((1 - val_fraction) * len(text))
    assert loaded.tokenizer.decode(loaded.train) == text[:cut]
    assert loaded.tokenizer.decode(loaded.val) == text[cut:]


def test_a_given_tokenizer_is_used_or_refuses(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcabc" * 10)
    given_one = CharTokenizer("cba")
    assert load_corpus(path, tokenizer=given_one).tokenizer is given_one
    with pytest.raises(TokenizerError, match=r"'c' .* position 2 "):
        load_corpus(path, tokenizer=CharTokenizer("ab"))
    trained = BPETokenizer.train("abcabc" * 10, 258)
    assert load_corpus(path, tokenizer=trained).vocab_size == 258


BAD_TEXT = {
    "empty": (b"", "is empty"),
    "one character": (b"a", "single character"),
    "one wide character": ("🙂".encode(), "single character"),
    "one distinct": (b"a" * 100, "only one distinct character"),
    "latin-1": ("abc é".encode("latin-1") + b" abc", r"not UTF-8 text \(byte 0xe9 at offset 4\)"),
    "utf-16": ("abc".encode("utf-16"), "UTF-16"),
    "cut character": ("abc🙂".encode()[:-1], "offset 3"),
    "surrogate": (b"abc\xed\xa0\x80", "offset 3"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, says = BAD_TEXT[name]
    with pytest.raises(CorpusError, match=says) as caught:
        load_corpus(write(tmp_path / "bad.txt", content))
    assert "\n" not in str(caught.value)


def test_the_offset_of_a_bad_byte_counts_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 7)
    path = write(tmp_path / "bad.txt", "é🙂".encode() * 50 + b"\xff" + b"x" * 30)
    with pytest.raises(CorpusError, match="0xff at offset 300"):
        load_corpus(path)
    good = write(tmp_path / "good.txt", "aé🙂中" * 50)
    assert text_files.read_text(good) == "aé🙂中" * 50


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("shakespear", "did you mean 'shakespeare'"),
        ("nowhere/at/all.txt", "neither a file, a folder nor one of auto, shakespeare"),
        ("a\0b", "neither"),
        (Path("shakespeare"), "neither"),
    ],
)
def test_missing_data_suggests_the_nearest(data: str | Path, says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        load_corpus(data)


def test_missing_path_suggests_its_neighbour_and_odd_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "novel.txt", "abc")
    with pytest.raises(CorpusError, match=r"did you mean 'novel.txt'"):
        load_corpus(tmp_path / "novell.txt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CorpusError, match="neither a regular file"):
            load_corpus(tmp_path / "pipe")


@pytest.mark.parametrize("bad", [0, 1, -0.1, 1.5, float("nan"), "0.1"])
def test_val_fraction_is_checked(bad: Any) -> None:
    with pytest.raises(CorpusError, match="val_fraction"):
        load_corpus("pydoc", val_fraction=bad)


def test_unknown_tokenizer_name() -> None:
    with pytest.raises(CorpusError, match="did you mean 'char'"):
        load_corpus("pydoc", tokenizer="chars")


# --- large texts --------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "STREAM_BYTES", 200)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 61)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_streamed_tokens_equal_those_in_memory(kind: str, streamed: None, tmp_path: Path) -> None:
    path = write(tmp_path / "large.txt", TEXT)
    loaded = load_corpus(path, tokenizer=kind, bpe_vocab_size=270)
    assert isinstance(loaded.train, np.memmap)
    assert loaded.tokenizer is not None
    cut = int(0.9 * len(TEXT))
    assert loaded.tokenizer.decode(loaded.train) == TEXT[:cut]
    assert loaded.tokenizer.decode(loaded.val) == TEXT[cut:]
    if kind == "char":
        assert loaded.tokenizer == CharTokenizer.from_text(TEXT)
    TokenBatches(loaded.train, batch_size=2, block_size=8, seed=0).next_batch()


def test_streamed_tokens_are_made_once_and_anew_when_the_text_changes(
    streamed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "large.txt", TEXT)
    load_corpus(path)
    with monkeypatch.context() as patch:
        patch.setattr(text_files, "_write_tokens", None)
        load_corpus(path)
    write(path, TEXT + "!")
    loaded = load_corpus(path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.val).endswith("!")
    load_corpus(path, tokenizer=CharTokenizer.from_text(TEXT + "!?"))
    entries = sorted(entry.name for entry in (tmp_path / "cache" / "fastchargpt").iterdir())
    assert len(entries) == 3
    assert all(entry.startswith("tokens-") for entry in entries)


def test_a_text_that_changes_while_read_is_noticed(streamed: None, tmp_path: Path) -> None:
    path = write(tmp_path / "large.txt", TEXT)
    text = text_files.LargeText(path)
    chunks = text.chunks()
    next(chunks)
    with path.open("a") as file:
        file.write("more")
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(chunks)
    write(path, TEXT)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(text.chunks())


def test_a_cache_that_cannot_be_written_is_named_and_left_clean(
    streamed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "large.txt", TEXT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_files, "_write_tokens", full)
    with pytest.raises(CorpusError, match="No space left"):
        load_corpus(path)
    assert list((tmp_path / "cache" / "fastchargpt").iterdir()) == []
