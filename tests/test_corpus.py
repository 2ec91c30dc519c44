"""Corpora: the notebook's counts, every name and what it falls back to."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus_cases import TEXT, nothing_outside, write  # noqa: F401 (a fixture, used by name)

from fastchargpt import downloads
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import CorpusError

pytestmark = pytest.mark.usefixtures("nothing_outside")
DATA_DIR = os.environ.get("FASTCHARGPT_DATA_DIR", "")


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
