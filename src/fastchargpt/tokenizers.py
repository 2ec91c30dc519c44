"""Three tokenizers behind one protocol: characters (as in the notebook), UTF-8 bytes, and byte-level BPE."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastchargpt.bpe import BPETokenizer
from fastchargpt.errors import TokenizerError, nearest
from fastchargpt.tokens import (
    MAX_FILE_BYTES,
    StreamDecoder,
    TokenArray,
    Tokenizer,
    Tokens,
    as_ids,
    dump_tokenizer,
    encode_utf,
    parse_tokenizer,
    token_dtype,
)

__all__ = ["BPETokenizer", "ByteTokenizer", "CharTokenizer", "Tokenizer", "load_tokenizer"]

UNICODE_SIZE = 0x110000
# Small enough to stay in a core's cache on the way through UTF-32.
CHUNK_CHARS = 1 << 17


class CharTokenizer:
    """One id per Unicode character, in the order given; the notebook's order is that of sorted characters.

    Args:
        chars: the vocabulary, distinct characters.
        unknown: `error` refuses a character outside the vocabulary; `replace` encodes it as `replacement`: the first
            of U+FFFD, `?` and space that the vocabulary has, else its first character.

    Raises:
        TokenizerError: no characters, one twice, one that is no single character, or an unknown policy.
    """

    name = "char"

    def __init__(self, chars: str | Sequence[str], unknown: Literal["error", "replace"] = "error") -> None:
        if not isinstance(chars, str):
            for i, char in enumerate(chars):
                if not isinstance(char, str) or len(char) != 1:
                    raise TokenizerError(f"entry {i} of a character vocabulary must be one character, not {char!r:.40}")
            chars = "".join(chars)
        if not chars:
            raise TokenizerError(
                "a character vocabulary needs at least one character: pass chars or use from_text(text)"
            )
        if len(set(chars)) != len(chars):
            (twice, _), *_ = Counter(chars).most_common(1)
            raise TokenizerError(f"character {twice!r} is more than once in the vocabulary: each must stand once")
        if unknown not in ("error", "replace"):
            raise TokenizerError(f"unknown must be 'error' or 'replace', not {unknown!r:.40}")
        self.chars = chars
        self.unknown = unknown
        self.vocab_size = len(chars)
        self.replacement = next((char for char in "\ufffd? " if char in chars), chars[0])
        self._codes = _codes(chars)  # id -> code point
        # code point -> id; vocab_size stands for a character outside the vocabulary.
        self._ids = np.full(UNICODE_SIZE, self.vocab_size, token_dtype(self.vocab_size + 1))
        self._ids[self._codes] = np.arange(self.vocab_size)
        self._latin = bytes(self._codes[self._codes < 256].astype(np.uint8))
        # A vocabulary of more than 256 may hold latin characters with ids that no byte holds: those go the general way.
        fits_bytes = self.vocab_size <= 256
        self._latin_ids = bytes(np.minimum(self._ids[:256], 255).astype(np.uint8)) if fits_bytes else None

    @classmethod
    def from_text(cls, text: str | Iterable[str], unknown: Literal["error", "replace"] = "error") -> "CharTokenizer":
        """The vocabulary of a text, or of the pieces of one: its distinct characters, sorted.

        Raises:
            TokenizerError: the text is empty, or has a lone surrogate.
        """
        seen = np.zeros(UNICODE_SIZE, np.bool_)
        for part in [text] if isinstance(text, str) else text:
            for start in range(0, len(part), CHUNK_CHARS):
                seen[_codes(part[start : start + CHUNK_CHARS], offset=start)] = True
        if not seen.any():
            raise TokenizerError("an empty text has no characters to make a vocabulary from")
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())), unknown)

    def with_unknown(self, unknown: Literal["error", "replace"]) -> "CharTokenizer":
        """The same vocabulary with another policy for characters outside it."""
        return CharTokenizer(self.chars, unknown)

    def encode(self, text: str) -> TokenArray:
        """Token ids of `text`, (len(text),).

        Raises:
            TokenizerError: a character outside the vocabulary under unknown="error", or a lone surrogate.
        """
        if self._latin_ids is not None and isinstance(text, str):
            try:
                raw = bytearray(text, "latin-1")
            except UnicodeEncodeError:
                pass
            else:
                if not raw.translate(None, self._latin):  # nothing is left once the vocabulary is taken out
                    return np.frombuffer(raw.translate(self._latin_ids), np.uint8)
        ids = np.empty(len(text), token_dtype(self.vocab_size))
        for start in range(0, len(text), CHUNK_CHARS):
            codes = _codes(text[start : start + CHUNK_CHARS], offset=start)
            found = self._ids[codes]
            outside = found == self.vocab_size
            if outside.any():
                if self.unknown == "error":
                    self._refuse(text, start + int(outside.argmax()))
                found[outside] = self._ids[ord(self.replacement)]
            ids[start : start + len(found)] = found
        return ids

    def decode(self, tokens: Tokens) -> str:
        """Text of 1-D `tokens`.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        return self._codes[as_ids(tokens, self.vocab_size)].tobytes().decode("utf-32-le")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one id at a time; for characters, each id gives its one character."""
        return StreamDecoder(self.vocab_size, lambda token: self.chars[token].encode("utf-8"))

    def to_json(self) -> str:
        """One JSON object that `load_tokenizer` reads back."""
        return dump_tokenizer(self.name, chars=self.chars, unknown=self.unknown)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path`."""
        Path(path).write_text(self.to_json(), encoding="ascii")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and (self.chars, self.unknown) == (other.chars, other.unknown)

    def __hash__(self) -> int:
        return hash((self.chars, self.unknown))

    def __repr__(self) -> str:
        return f"CharTokenizer(vocab_size={self.vocab_size}, unknown={self.unknown!r})"

    def _refuse(self, text: str, position: int) -> None:
        char = text[position]
        raise TokenizerError(
            f"character {char!r} (U+{ord(char):04X}) at position {position} is not among the vocabulary's "
            f"{self.vocab_size} characters: remove it, or read it as {self.replacement!r} with "
            "unknown='replace' (`--unknown replace` on the command line)"
        )


class ByteTokenizer:
    """One id per byte of the text's UTF-8: 256 ids that spell any text."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str) -> TokenArray:
        """Token ids of `text`, uint8, one per UTF-8 byte.

        Raises:
            TokenizerError: a lone surrogate.
        """
        return np.frombuffer(bytearray(encode_utf(text, "utf-8")), np.uint8)

    def decode(self, tokens: Tokens) -> str:
        """Text of 1-D `tokens`; bytes that are not UTF-8, which only a model can produce, become U+FFFD.

        Raises:
            TokenizerError: an id outside 0 to 255.
        """
        return as_ids(tokens, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one id at a time and gives only whole characters."""
        return StreamDecoder(256, lambda token: bytes([token]))

    def to_json(self) -> str:
        """One JSON object that `load_tokenizer` reads back."""
        return dump_tokenizer(self.name)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path`."""
        Path(path).write_text(self.to_json(), encoding="ascii")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    def __hash__(self) -> int:
        return hash(ByteTokenizer)

    def __repr__(self) -> str:
        return "ByteTokenizer()"


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer from what `to_json` or `save` wrote: a path, a folder with tokenizer.json, or the JSON text itself.

    Nothing in the file is executed, and everything in it is checked.

    Raises:
        TokenizerError: missing, unreadable, too large, damaged, or not written by fastchargpt.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _build(source, "the tokenizer")
    path = Path(source)
    try:
        path = path / "tokenizer.json" if path.is_dir() else path
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(f"{path} is not a tokenizer: it is not JSON text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TokenizerError(f"the tokenizer {str(path)!r} cannot be read ({reason})") from None
    return _build(text, str(path))


def _build(text: str, source: str) -> Tokenizer:
    fields = parse_tokenizer(text, source)
    kind = fields.pop("kind", None)
    expected = {"char": {"chars", "unknown"}, "byte": set(), "bpe": {"merges"}}
    if not isinstance(kind, str) or kind not in expected:
        hint = nearest(kind, expected) if isinstance(kind, str) else ""
        raise TokenizerError(
            f"{source} has the unknown tokenizer kind {kind!r:.40}{hint}: char, byte and bpe are known"
        )
    if fields.keys() != expected[kind]:
        odd = sorted(fields.keys() ^ expected[kind])
        raise TokenizerError(
            f"{source} is damaged: a {kind} tokenizer has the fields {sorted(expected[kind])}, see {odd!r:.80}"
        )
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        if not isinstance(fields["merges"], list):
            raise TokenizerError(f"{source} is damaged: merges must be a list")
        return BPETokenizer(fields["merges"])
    if not isinstance(fields["chars"], str):
        raise TokenizerError(f"{source} is damaged: chars must be a string")
    return CharTokenizer(fields["chars"], fields["unknown"])


def _codes(text: str, offset: int = 0) -> npt.NDArray[np.uint32]:
    """The code points of `text`; `offset` is where it starts in the text that an error speaks of."""
    return np.frombuffer(encode_utf(text, "utf-32-le", offset), "<u4")
