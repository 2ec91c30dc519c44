"""Corpora: the notebook's counts, every kind of source, downloads that are verified, and input meant to break them."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchargpt import corpus, downloads, nanogpt_data, text_files
from fastchargpt.batches import TokenBatches
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import CorpusError, TokenizerError
from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer

DATA_DIR = os.environ.get("FASTCHARGPT_DATA_DIR", "")
TEXT = "Über Ä中🙂 the quick brown fox\r\n\0\ufeffend " * 30


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no data folder, no network but this machine's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCHARGPT_DATA_DIR", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "1")


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- named corpora ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shakespeare", "auto"])
def test_shakespeare_counts(name: str) -> None:
    if not Path(DATA_DIR, "tinyshakespeare.txt").is_file() or not DATA_DIR:
        pytest.skip("needs tinyshakespeare.txt in $FASTCHARGPT_DATA_DIR")
    loaded = load_corpus(name, data_dir=DATA_DIR)
    assert (len(loaded.train), len(loaded.val), loaded.vocab_size) == (1_003_854, 111_540, 65)
    assert loaded.train.dtype == np.uint8
    assert loaded.train[:18].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10, 0, 14, 43, 44]
    assert (loaded.name, loaded.note) == ("shakespeare", None)


def test_pydoc_needs_nothing_and_is_ascii() -> None:
    loaded = load_corpus("pydoc", offline=True)
    assert loaded.tokenizer is not None
    text = loaded.tokenizer.decode(loaded.train) + loaded.tokenizer.decode(loaded.val)
    assert text.isascii()
    assert len(text) > 300_000
    assert loaded.vocab_size < 100
    assert "statement" in text
    again = load_corpus("pydoc")
    assert np.array_equal(again.train, loaded.train)


def test_pydoc_absent_from_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match="carries no language reference"):
        load_corpus("pydoc")


def test_auto_falls_back_and_says_why_and_a_name_does_not() -> None:
    loaded = load_corpus("auto")
    assert loaded.name == "pydoc"
    assert loaded.note is not None
    assert "FASTCHARGPT_OFFLINE" in loaded.note
    assert "\n" not in loaded.note
    for name in ("shakespeare", "enwik8", "text8"):
        with pytest.raises(CorpusError, match=f"'{name}'.*FASTCHARGPT_OFFLINE.*FASTCHARGPT_DATA_DIR"):
            load_corpus(name)


def test_offline_never_touches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("pooch.retrieve", refuse)
    load_corpus("auto")
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "0")
    load_corpus("auto", offline=True)


def test_auto_gives_up_on_a_silent_network_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> None:
        time.sleep(3)
        raise OSError("timed out")

    monkeypatch.setattr(downloads, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("socket.create_connection", silent)
    start = time.monotonic()
    loaded = load_corpus("auto", offline=False)
    assert time.monotonic() - start < 2
    assert loaded.note is not None
    assert "out of reach" in loaded.note


def test_a_wrong_file_in_the_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tinyshakespeare.txt", "not the Bard")
    monkeypatch.setenv("FASTCHARGPT_DATA_DIR", str(tmp_path))
    with pytest.raises(CorpusError, match=r"tinyshakespeare.txt is not the corpus 'shakespeare': its sha256"):
        load_corpus("shakespeare")
    with pytest.raises(CorpusError, match="is not a folder"):
        load_corpus("shakespeare", data_dir=tmp_path / "none")


def test_offline_no_command_opens_a_socket(tmp_path: Path) -> None:
    # an audit hook sees every socket, whichever library opens it
    program = """
import os, sys
events = []
def watch(event, _):
    if event.startswith("socket."):
        events.append(event)
        raise OSError("no network in this test")
sys.addaudithook(watch)
from fastchargpt.cli import main
from fastchargpt.corpus import load_corpus
tiny = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--max_iters=1", "--device=cpu", "--eval_iters=1"]
assert main(["train", "--data=shakespeare", *tiny, "--out-dir", "none"]) == 2
assert main(["train", "--data", "text.txt", *tiny, "--out-dir", "out"]) == 0
assert main(["sample", "out", "--max_new_tokens=2"]) == 0
load_corpus("auto")
assert not events, events
os.environ["FASTCHARGPT_OFFLINE"] = "0"
load_corpus("auto")
assert events  # the hook does see the attempt where downloads are on
"""
    (tmp_path / "text.txt").write_text("to be, or not to be " * 20, encoding="utf-8")
    environment = {**os.environ, "FASTCHARGPT_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("FASTCHARGPT_DATA_DIR", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_killed_downloads_left_is_swept_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(downloads, "cache_dir", lambda: cache)
    downloads.sweep_cache()  # no cache yet
    old = time.time() - 2 * downloads.STALE_SECONDS
    for folder in ("building-dead", "building-alive", "tokens-1"):
        (cache / folder).mkdir(parents=True)
    for name in (
        "tmpdead",
        "tmpalive",
        "building-dead/train.bin",
        "building-alive/train.bin",
        "enwik8.zip",
        "tokens-1/x",
    ):
        write(cache / name, "x")
    for path in [*cache.iterdir(), cache / "building-dead" / "train.bin"]:
        os.utime(path, (old, old))
    os.utime(cache / "tmpalive")  # written to just now; of building-alive a file in it is
    (tmp_path / "precious").mkdir()
    (cache / "tmplink").symlink_to(tmp_path / "precious")
    os.utime(cache / "tmplink", (old, old), follow_symlinks=False)
    os.utime(tmp_path / "precious", (old, old))
    downloads.sweep_cache()
    assert sorted(path.name for path in cache.iterdir()) == ["building-alive", "enwik8.zip", "tmpalive", "tokens-1"]
    assert (tmp_path / "precious").is_dir()


# --- downloads, from a server on this machine ---------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    gate: threading.Barrier | None = None

    def do_GET(self) -> None:
        if self.gate is not None:
            self.gate.wait(90)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served over HTTP, with `shakespeare` and `text8` pointing there."""
    folder = tmp_path / "served"
    folder.mkdir()
    write(folder / "play.txt", TEXT)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text8", "some words " * 100)
    write(folder / "text8.zip", packed.getvalue())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(downloads, "SOURCES", sources(url, folder))
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "0")
    yield folder
    server.shutdown()
    server.server_close()


def sources(url: str, folder: Path) -> dict[str, downloads.Source]:
    def source(name: str, filename: str) -> downloads.Source:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        return downloads.Source(url=f"{url}/{name}", filename=filename, sha256=digest)

    return {"shakespeare": source("play.txt", "tinyshakespeare.txt"), "text8": source("text8.zip", "text8.zip")}


def test_download_then_cache(served: Path, tmp_path: Path) -> None:
    first = load_corpus("auto")
    assert (first.name, first.note) == ("shakespeare", None)
    cached = tmp_path / "cache" / "fastchargpt" / "tinyshakespeare.txt"
    assert cached.read_bytes() == TEXT.encode()
    (served / "play.txt").unlink()
    assert np.array_equal(load_corpus("shakespeare", offline=True).train, first.train)
    cached.write_bytes(b"damaged")
    with pytest.raises(CorpusError, match="downloads are off"):
        load_corpus("shakespeare", offline=True)
    with pytest.raises(CorpusError, match=r"cannot be downloaded .*404"):
        load_corpus("shakespeare")


def test_a_damaged_cache_is_downloaded_anew(served: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "fastchargpt" / "tinyshakespeare.txt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"damaged")
    load_corpus("shakespeare")
    assert cached.read_bytes() == TEXT.encode()


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(served: Path, tmp_path: Path) -> None:
    write(served / "play.txt", "captive portal")
    with pytest.raises(CorpusError, match="wrong checksum for 'shakespeare'"):
        load_corpus("shakespeare")
    assert list((tmp_path / "cache" / "fastchargpt").iterdir()) == []
    note = load_corpus("auto").note
    assert note is not None
    assert "wrong checksum" in note


def test_zip_and_the_split_in_bytes(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "HUTTER_CUTS", (900, 1000))
    for tokenizer in ("char", "byte", ByteTokenizer()):
        loaded = load_corpus("text8", tokenizer=tokenizer)
        assert loaded.test is not None
        assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (900, 100, 100)
    with pytest.raises(CorpusError, match="split of its own"):
        load_corpus("text8", val_fraction=0.2)


def test_a_split_in_bytes_never_cuts_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = ("aé" * 40).encode()
    monkeypatch.setattr(corpus, "HUTTER_CUTS", (29, 62))  # 29 lies inside an é
    monkeypatch.setattr(corpus, "fetch_named", lambda *_: (raw, Path("enwik8.zip")))
    chars, by_byte = load_corpus("enwik8"), load_corpus("enwik8", tokenizer="byte")
    assert chars.tokenizer is not None
    assert chars.test is not None
    parts = [chars.tokenizer.decode(part).encode() for part in (chars.train, chars.val, chars.test)]
    assert b"".join(parts) == raw
    assert len(parts[0]) == 28
    assert len(by_byte.train) == 29


FETCH = """
import sys
from fastchargpt import downloads
url, sha256 = sys.argv[1:]
downloads.READ_SECONDS = 90.0
downloads.SOURCES["shakespeare"] = downloads.Source(url=url, filename="tinyshakespeare.txt", sha256=sha256)
print(len(downloads.fetch_named("shakespeare")[0]))
"""


def test_two_processes_download_at_once(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quiet, "gate", threading.Barrier(2))  # neither gets a byte before both have asked
    source = downloads.SOURCES["shakespeare"]
    command = [sys.executable, "-c", FETCH, source.url, source.sha256]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        printed, complaint = child.communicate(timeout=100)
        assert printed.split() == [str(len(TEXT.encode()))], complaint
    assert [path.name for path in (tmp_path / "cache" / "fastchargpt").iterdir()] == ["tinyshakespeare.txt"]


# --- text files ---------------------------------------------------------------------------------------------------


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


# --- nanoGPT's folders --------------------------------------------------------------------------------------------


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
