"""Downloads, from a server on this machine: verified, kept, and made by one process at a time."""

import functools
import hashlib
import http.server
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import TEXT, nothing_outside, write  # noqa: F401 (a fixture, used by name)

from fastchargpt import corpus, downloads
from fastchargpt.corpus import load_corpus
from fastchargpt.errors import CorpusError
from fastchargpt.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("nothing_outside")


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
