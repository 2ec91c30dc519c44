"""Byte-level BPE: ids 0 to 255 are the bytes, and each merge that makes something new is the next id.

Training and encoding run in Hugging Face's `tokenizers`; decoding is a table of byte strings, so it needs no library.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastchargpt.errors import TokenizerError
from fastchargpt.tokens import StreamDecoder, TokenArray, Tokens, as_ids, dump_tokenizer, encode_utf, token_dtype

__all__ = ["BPETokenizer"]

MAX_VOCAB_SIZE = 500_000
# Each merge can double a token, so a hostile file of 40 merges could ask for a terabyte without this.
MAX_TOKEN_BYTES = 256
PIECE_CHARS = 50_000
# The pre-tokenizer always ends a word where visible ASCII is followed by a space or a newline, so a text cut there
# has the same tokens as the whole.
_SAFE_CUT = re.compile(r"[!-~](?=[ \n])")


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabulary files."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(shifted)) for byte in range(256)]


class BPETokenizer:
    """Byte-level byte-pair encoding with GPT-2's word splitting: any text, exactly, in fewer tokens than bytes.

    Args:
        merges: pairs of ids, in the order learnt; each id is a byte or an earlier merge.

    Raises:
        TokenizerError: a merge is no pair of earlier ids, or makes a token longer than 256 bytes.
    """

    name = "bpe"

    def __init__(self, merges: Iterable[Sequence[int]]) -> None:
        self.merges: tuple[tuple[int, int], ...] = tuple(_checked_pairs(merges))
        self._table = [bytes([byte]) for byte in range(256)]
        known = set(self._table)
        for left, right in self.merges:
            if max(left, right) >= len(self._table):
                raise TokenizerError(f"BPE merge ({left}, {right}) uses an id that no earlier merge has made")
            token = self._table[left] + self._table[right]
            if len(token) > MAX_TOKEN_BYTES:
                raise TokenizerError(f"BPE merge ({left}, {right}) makes a token longer than {MAX_TOKEN_BYTES} bytes")
            if token not in known:  # two merges may spell the same bytes; they share an id
                known.add(token)
                self._table.append(token)
        self.vocab_size = len(self._table)
        self._engine: Any = None

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from `text`, or from pieces of it, until there are `vocab_size` tokens or nothing more to merge.

        Raises:
            TokenizerError: vocab_size outside [256, 500000], or a lone surrogate in the text.
        """
        if type(vocab_size) is not int or not 256 <= vocab_size <= MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"a BPE vocabulary must have 256 (the bytes) to {MAX_VOCAB_SIZE} tokens, not {vocab_size!r}"
            )
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        engine = Tokenizer(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        parts = [text] if isinstance(text, str) else text
        pieces = (piece for part in parts for piece in _pieces(part))
        engine.train_from_iterator(pieces, trainer)
        # Renumber: the library orders the bytes by their stand-in character, here an id below 256 is the byte itself.
        byte_of = {char: byte for byte, char in enumerate(_byte_characters())}
        ids = {bytes([byte]): byte for byte in range(256)}
        merges = []
        for left, right in json.loads(engine.to_str())["model"]["merges"]:
            pair = [bytes(byte_of[char] for char in side) for side in (left, right)]
            merges.append((ids[pair[0]], ids[pair[1]]))
            ids.setdefault(pair[0] + pair[1], len(ids))
        return cls(merges)

    def encode(self, text: str) -> TokenArray:
        """Token ids of `text`, (n,). Long texts go through in pieces of about 50,000 characters, in bounded memory.

        Raises:
            TokenizerError: the text has a lone surrogate.
        """
        engine = self._get_engine()
        dtype = token_dtype(self.vocab_size)
        pieces = _pieces(text)
        parts = [np.zeros(0, dtype)]
        while group := list(itertools.islice(pieces, 32)):
            parts.extend(np.array(encoding.ids, dtype) for encoding in engine.encode_batch_fast(group))
        return np.concatenate(parts)

    def decode(self, tokens: Tokens) -> str:
        """Text of 1-D `tokens`; bytes that are not UTF-8, which only a model can produce, become U+FFFD.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        table = self._table
        return b"".join([table[i] for i in as_ids(tokens, self.vocab_size).tolist()]).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one id at a time and gives only whole characters."""
        return StreamDecoder(self.vocab_size, self._table.__getitem__)

    def to_json(self) -> str:
        """One JSON object that `load_tokenizer` reads back."""
        return dump_tokenizer(self.name, merges=self.merges)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path`."""
        Path(path).write_text(self.to_json(), encoding="ascii")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BPETokenizer) and self.merges == other.merges

    def __hash__(self) -> int:
        return hash(self.merges)

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def _get_engine(self) -> Any:
        """Hugging Face's encoder for these merges, built on first use."""
        if self._engine is None:
            from tokenizers import Tokenizer, models, pre_tokenizers

            characters = _byte_characters()
            spelled = ["".join(characters[byte] for byte in token) for token in self._table]
            engine = Tokenizer(
                models.BPE(
                    vocab={token: i for i, token in enumerate(spelled)},
                    merges=[(spelled[left], spelled[right]) for left, right in self.merges],
                )
            )
            engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self._engine = engine
        return self._engine


def _checked_pairs(merges: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    for count, pair in enumerate(merges):
        if count >= MAX_VOCAB_SIZE:
            raise TokenizerError(f"a BPE vocabulary has at most {MAX_VOCAB_SIZE} tokens")
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(i) is not int or i < 0 for i in pair):
            raise TokenizerError(f"BPE merge {count} must be a pair of non-negative ids, not {pair!r:.60}")
        yield pair[0], pair[1]


def _pieces(text: str) -> Iterator[str]:
    """`text` in order, in pieces cut where a word ends; a text without such places is cut anywhere after 100,000.

    Raises:
        TokenizerError: not a str, or a lone surrogate, which the library would refuse less clearly.
    """
    encode_utf(text, "utf-8")
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        found = _SAFE_CUT.search(text, start + PIECE_CHARS, start + 2 * PIECE_CHARS)
        end = found.end() if found else start + 2 * PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
