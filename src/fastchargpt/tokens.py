"""What every tokenizer shares: the protocol, ids and their dtype, whole characters from a stream, the file format."""

import codecs
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastchargpt.errors import TokenizerError

__all__ = [
    "MAX_FILE_BYTES",
    "StreamDecoder",
    "TokenArray",
    "Tokenizer",
    "Tokens",
    "as_ids",
    "dump_tokenizer",
    "encode_utf",
    "parse_tokenizer",
    "token_dtype",
]

TokenArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor

FORMAT = "fastchargpt.tokenizer"
VERSION = 1
# Every Unicode character, escaped, fits; a JSON text of this size cannot ask for more than a few hundred megabytes.
MAX_FILE_BYTES = 16 * 2**20


class Tokenizer(Protocol):
    """Text to token ids and back, exactly: `decode(encode(text)) == text` for every text that `encode` accepts."""

    @property
    def name(self) -> str:
        """`char`, `byte` or `bpe`."""

    @property
    def vocab_size(self) -> int:
        """Number of different ids; they run from 0 to vocab_size - 1."""

    def encode(self, text: str) -> TokenArray:
        """The ids of `text`: a new 1-D array, uint8, uint16 or uint32, the smallest that holds vocab_size - 1."""

    def decode(self, tokens: Tokens) -> str:
        """The text of a 1-D sequence, array or tensor of ids."""

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time and gives only whole characters."""

    def to_json(self) -> str:
        """One JSON object that `load_tokenizer` reads back."""

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path`."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds vocab_size - 1."""
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)


def as_ids(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.int64]:
    """`tokens` as a 1-D int64 array (on the CPU), each id checked to lie in [0, vocab_size).

    Raises:
        TokenizerError: not one-dimensional, not integers, or an id out of range.
    """
    if isinstance(tokens, torch.Tensor):
        raw: npt.NDArray[Any] = tokens.detach().cpu().numpy()
    else:
        try:
            raw = np.asarray(tokens)
        except (ValueError, OverflowError, TypeError):  # a ragged list
            raise TokenizerError("tokens must be a one-dimensional sequence of integers, not a ragged list") from None
    if raw.ndim == 1 and raw.size == 0:
        return np.zeros(0, np.int64)
    if raw.ndim != 1 or raw.dtype.kind not in "iu":
        found = f"{raw.ndim}-dimensional {raw.dtype}"
        raise TokenizerError(
            f"tokens must be a one-dimensional sequence of integers, not {found}; decode one row a call"
        )
    outside = (raw < 0) | (raw >= vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise TokenizerError(
            f"token id {int(raw[at])} at position {at} is outside the vocabulary of {vocab_size} ids, "
            f"0 to {vocab_size - 1}: decode with the tokenizer that the model was trained with"
        )
    return raw.astype(np.int64)


def encode_utf(text: str, codec: str, offset: int = 0) -> bytes:
    """`text` in UTF-8 or UTF-32; `offset` is where it starts in the text that an error speaks of.

    Raises:
        TokenizerError: not a str, or a lone surrogate, which is no character.
    """
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, not {type(text).__name__}: decode bytes as UTF-8 first")
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate {text[error.start]!r} at position {offset + error.start}, which is not a "
            "character: read it as UTF-8, or drop it with text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None


class StreamDecoder:
    """Turns ids, pushed one at a time, into text without ever cutting a character in two.

    The pushed pieces and the flushed rest, joined, are exactly `decode` of all the ids.
    """

    def __init__(self, vocab_size: int, to_bytes: Callable[[int], bytes]) -> None:
        self._vocab_size = vocab_size
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes: often one, none inside a multi-byte character."""
        token = operator.index(token)
        if not 0 <= token < self._vocab_size:
            as_ids([token], self._vocab_size)  # says what is wrong
        return self._decoder.decode(self._to_bytes(token))

    def flush(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing. The decoder can then be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def dump_tokenizer(kind: str, **fields: object) -> str:
    """The JSON object of one tokenizer: pure ASCII, so that no editor or transfer changes its characters."""
    return json.dumps({"format": FORMAT, "version": VERSION, "kind": kind, **fields})


def parse_tokenizer(text: str, source: str) -> dict[str, Any]:
    """The fields of a tokenizer's JSON text, its format and version checked; `source` names it in errors.

    Raises:
        TokenizerError: too large, not JSON, another program's file, or another version's.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    if len(text) > MAX_FILE_BYTES:
        raise TokenizerError(f"{source} is larger than a tokenizer can be ({MAX_FILE_BYTES >> 20} MiB)")
    try:
        fields = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise TokenizerError(f"{source} is damaged or not JSON ({reason}): save the tokenizer again") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        hint = " (it looks like a Hugging Face tokenizer)" if isinstance(fields, dict) and "model" in fields else ""
        raise TokenizerError(f"{source} is not a tokenizer that fastchargpt saved{hint}: its format must be {FORMAT!r}")
    version = fields.get("version")
    if type(version) is not int or version != VERSION:
        raise TokenizerError(
            f"{source} has tokenizer version {version!r:.40}; this fastchargpt reads version {VERSION}"
        )
    return {name: value for name, value in fields.items() if name not in ("format", "version")}
