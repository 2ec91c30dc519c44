"""Text files as they are: strict UTF-8, nothing translated; a large one is streamed into memory-mapped tokens."""

import codecs
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastchargpt.errors import CorpusError, FastchargptError
from fastchargpt.tokenizers import Tokenizer, load_tokenizer
from fastchargpt.tokens import token_dtype

__all__ = ["LargeText", "decode_utf8", "encode_large", "map_tokens", "read_text"]

CHUNK_BYTES = 16 * 2**20

Encoded: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any], Tokenizer]


def read_text(path: Path) -> str:
    """The whole file, byte for byte as UTF-8: a BOM, CRLF and NUL stay the characters they are.

    Raises:
        CorpusError: unreadable, not UTF-8, or changed while it was read.
    """
    return "".join(LargeText(path).chunks())


def decode_utf8(raw: bytes, source: str, offset: int = 0, final: bool = True) -> tuple[str, int]:
    """The text of `raw` and how many bytes it took: all of them if `final`, else up to the last whole character.

    Raises:
        CorpusError: not UTF-8, naming the byte, counted from `offset`.
    """
    try:
        return codecs.utf_8_decode(raw, "strict", final)
    except UnicodeDecodeError as error:
        at = offset + error.start
        utf16 = offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "it looks like UTF-16" if utf16 else f"byte {raw[error.start]:#04x} at offset {at}"
        raise CorpusError(f"{source} is not UTF-8 text ({hint}): save it as UTF-8, for example with iconv") from None


class LargeText:
    """A file read in passes of 16 MiB chunks; a change between or during passes is an error, not a mixture.

    Raises:
        CorpusError: the file is missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = self._stat()
        self.size = self.stamp[0]

    def chunks(self, end: int | None = None) -> Iterator[str]:
        """The text in order, or its first `end` characters.

        Raises:
            CorpusError: unreadable, not UTF-8, or changed since this object was made.
        """
        rest, offset, given = b"", 0, 0
        try:
            with self.path.open("rb") as file:
                while end is None or given < end:
                    raw = file.read(CHUNK_BYTES)
                    text, used = decode_utf8(rest + raw, str(self.path), offset, final=not raw)
                    rest, offset = (rest + raw)[used:], offset + used
                    text = text if end is None else text[: end - given]
                    given += len(text)
                    if text:
                        yield text
                    if not raw:
                        break
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read ({error.strerror})") from None
        if self._stat() != self.stamp or (end is None and offset != self.size):
            raise CorpusError(f"{self.path} changed while it was read: wait until it is complete, then start again")

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read ({error.strerror})") from None
        return found.st_size, found.st_mtime_ns, found.st_ino


def encode_large(
    text: LargeText,
    *,
    spec: str,
    train_share: float,
    make_tokenizer: Callable[[int], Tokenizer],
    cache: Path,
) -> Encoded:
    """Tokens of a text too large for memory, as two memory maps in `cache`, made once per text, split and tokenizer.

    Args:
        text: the file.
        spec: what tells this tokenizer from others; part of the cache key.
        train_share: share of the characters that go to the first map.
        make_tokenizer: gets the number of characters to train on.
        cache: a folder; the entry is written under a temporary name and renamed, so that it is whole or absent.

    Raises:
        CorpusError: the text is not UTF-8 or changes, or the cache cannot be written.
    """
    key = hashlib.sha256(repr((str(text.path.resolve()), text.stamp, train_share, spec)).encode()).hexdigest()[:20]
    entry = cache / f"tokens-{key}"
    if not entry.is_dir():
        cut = int(train_share * sum(map(len, text.chunks())))
        tokenizer = make_tokenizer(cut)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
            try:
                _write_tokens(text, tokenizer, cut, building)
                tokenizer.save(building / "tokenizer.json")
                try:
                    building.rename(entry)
                except OSError:
                    if not entry.is_dir():  # another process was faster: its entry is the same
                        raise
            finally:
                shutil.rmtree(building, ignore_errors=True)
        except FastchargptError:
            raise
        except OSError as error:
            raise CorpusError(
                f"the tokens of {text.path} cannot be written to {cache} ({error.strerror}): free some space, or set "
                "XDG_CACHE_HOME to a folder that has it"
            ) from None
    tokenizer = load_tokenizer(entry)
    dtype = token_dtype(tokenizer.vocab_size)
    return map_tokens(entry / "train.bin", dtype), map_tokens(entry / "val.bin", dtype), tokenizer


def map_tokens(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A headerless file of tokens as a 1-D memory map, in mode "c": torch takes it, and the file is never written.

    Raises:
        CorpusError: missing, empty, or not a whole number of tokens.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size == 0 or size % dtype.itemsize:
            raise CorpusError(f"{path} must be a file of {dtype.name} tokens, and it has {size} bytes")
        return np.memmap(path, dtype, "c")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None


def _write_tokens(text: LargeText, tokenizer: Tokenizer, cut: int, folder: Path) -> None:
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        position = 0
        for chunk in text.chunks():
            here = max(0, min(cut - position, len(chunk)))  # this many characters of the chunk are for training
            for file, part in ((train, chunk[:here]), (val, chunk[here:])):
                if part:
                    tokenizer.encode(part).tofile(file)
            position += len(chunk)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
