"""Named corpora as verified bytes: from a folder of the user's, the cache, or the one named URL of each."""

import contextlib
import hashlib
import io
import os
import shutil
import socket
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastchargpt.errors import CorpusError

__all__ = ["SOURCES", "Source", "cache_dir", "fetch_named", "is_offline", "reachable", "sweep_cache"]

CONNECT_SECONDS = 3.0
READ_SECONDS = 15.0
# A temporary name in the cache that nothing has been written under for this long belongs to a process that was killed.
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a named corpus comes from and how its bytes are known."""

    url: str
    filename: str  # in the cache, and the first name looked for in a data folder
    sha256: str  # of the file at the URL
    also: tuple[tuple[str, str], ...] = ()  # other file names that a data folder may hold it under, with their sha256


_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

SOURCES = {
    "shakespeare": Source(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        filename="tinyshakespeare.txt",
        sha256=_SHAKESPEARE,
        also=(("input.txt", _SHAKESPEARE), ("shakespeare.txt", _SHAKESPEARE)),
    ),
    "enwik8": Source(
        url="http://mattmahoney.net/dc/enwik8.zip",
        filename="enwik8.zip",
        sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        also=(("enwik8", "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),),
    ),
    "text8": Source(
        url="http://mattmahoney.net/dc/text8.zip",
        filename="text8.zip",
        sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    ),
}


def cache_dir() -> Path:
    """The folder for downloads and encoded texts, by the platform's custom ($XDG_CACHE_HOME/fastchargpt on Linux)."""
    import pooch

    return Path(pooch.os_cache("fastchargpt"))


def sweep_cache() -> None:
    """Remove what killed downloads (`tmp*`) and encodings (`building-*`) left in the cache a day or more ago."""
    oldest = time.time() - STALE_SECONDS
    for path in [*cache_dir().glob("tmp*"), *cache_dir().glob("building-*")]:
        with contextlib.suppress(OSError):  # another process may be sweeping too
            if max(part.lstat().st_mtime for part in (path, *path.glob("*"))) >= oldest:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_offline(offline: bool | None) -> bool:
    """`offline` if it is given, else whether FASTCHARGPT_OFFLINE is set to anything but 0 or false."""
    if offline is not None:
        return offline
    return os.environ.get("FASTCHARGPT_OFFLINE", "").strip().lower() not in ("", "0", "false")


def fetch_named(name: str, data_dir: str | Path | None = None, offline: bool | None = None) -> tuple[bytes, Path]:
    """The bytes of a named corpus, unpacked and verified, and the file they came from.

    Looks in `data_dir` (default: $FASTCHARGPT_DATA_DIR), then in the cache, then downloads into the cache.

    Raises:
        CorpusError: it cannot be had, or what was found has the wrong checksum.
    """
    source = SOURCES[name]
    folder = data_dir if data_dir is not None else os.environ.get("FASTCHARGPT_DATA_DIR") or None
    if data_dir is not None and not Path(data_dir).is_dir():
        raise CorpusError(f"data_dir {str(data_dir)!r} is not a folder: create it, or leave data_dir out")
    found = _look_in(Path(folder), name, source) if folder is not None else None
    if found is None:
        cached = cache_dir() / source.filename
        raw = _read_verified(cached, source.sha256)
        if raw is None:
            if is_offline(offline):
                raise CorpusError(
                    f"the corpus {name!r} is not on this machine and downloads are off (FASTCHARGPT_OFFLINE): put "
                    f"{source.filename} from {source.url} into the folder that FASTCHARGPT_DATA_DIR names"
                )
            sweep_cache()
            _download(name, source, cached)
            raw = _read_verified(cached, source.sha256)
        if raw is None:
            raise CorpusError(f"{cached} changed while it was read: try again")
        found = raw, cached
    raw, path = found
    if path.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:  # its checksum was right, so its one member is trusted
            raw = archive.read(name)
    return raw, path


def _look_in(folder: Path, name: str, source: Source) -> tuple[bytes, Path] | None:
    for filename, sha256 in ((source.filename, source.sha256), *source.also):
        path = folder / filename
        raw = _read_verified(path, sha256)
        if raw is not None:
            return raw, path
        if filename == source.filename and path.is_file():
            raise CorpusError(
                f"{path} is not the corpus {name!r}: its sha256 must be {sha256}; delete it to download the right one, "
                "or pass its path as the data to train on it as it is"
            )
    return None


def _read_verified(path: Path, sha256: str) -> bytes | None:
    """The file's bytes if they have this checksum (of what was read, so that nothing changes in between), else None."""
    try:
        raw = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None
    return raw if raw is not None and hashlib.sha256(raw).hexdigest() == sha256 else None


def _download(name: str, source: Source, target: Path) -> None:
    """Download under a temporary name, verify, rename: of two processes at once, each ends with a whole file."""
    import pooch
    import requests

    way_out = f"put {source.filename} into the folder that FASTCHARGPT_DATA_DIR names, or use --data pydoc"
    if not reachable(source.url):
        raise CorpusError(f"the corpus {name!r} cannot be downloaded: {source.url} is out of reach; {way_out}")
    downloader = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS), progressbar=sys.stderr.isatty())
    try:
        pooch.retrieve(
            source.url,
            known_hash=f"sha256:{source.sha256}",
            fname=target.name,
            path=target.parent,
            downloader=downloader,
        )
    except requests.exceptions.RequestException as error:
        raise CorpusError(
            f"the corpus {name!r} cannot be downloaded from {source.url} ({_short(error)}); {way_out}"
        ) from None
    except OSError as error:
        raise CorpusError(f"the download of {name!r} cannot be written to {target.parent} ({_short(error)})") from None
    except ValueError:  # pooch's word for a wrong checksum; it has deleted the file
        raise CorpusError(
            f"what {source.url} sent has the wrong checksum for {name!r} (sha256 must be {source.sha256}); try again "
            f"later, or {way_out}"
        ) from None


def reachable(url: str) -> bool:
    """Whether the URL's host takes a connection within a few seconds, name look-up included.

    Without this a machine with no network can wait minutes: neither the resolver nor a host with many addresses heeds
    the connect timeout. Behind a proxy only the proxy can tell.
    """
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
        except OSError:
            return
        connected.set()

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(CONNECT_SECONDS)
    return connected.is_set()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
