"""A corpus: train and validation tokens with their tokenizer, from a name, a text file or a nanoGPT folder."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastchargpt.downloads import cache_dir, fetch_named, sweep_cache
from fastchargpt.errors import CorpusError, nearest
from fastchargpt.nanogpt_data import load_nanogpt_folder
from fastchargpt.text_files import LargeText, decode_utf8, encode_large, read_text
from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

__all__ = ["CORPUS_NAMES", "Corpus", "load_corpus"]

TokenData: TypeAlias = npt.NDArray[Any]

CORPUS_NAMES = ("auto", "shakespeare", "enwik8", "text8", "pydoc")
DEFAULT_VAL_FRACTION = 0.1
# A larger file is streamed into memory-mapped tokens; a smaller one is encoded in memory each time, which is quicker.
STREAM_BYTES = 256 * 2**20
# The published split of enwik8 and text8, in bytes: 90, 5 and 5 million.
HUTTER_CUTS = (90_000_000, 95_000_000)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens to train and to validate on, and what turns them back into text."""

    name: str  # the corpus name, or the file's or folder's
    train: TokenData  # (n_train,) uint8, uint16 or uint32, in memory or mapped
    val: TokenData  # (n_val,) of the same dtype
    test: TokenData | None = None  # only the corpora with a published test split have one
    tokenizer: Tokenizer | None  # None: a nanoGPT folder without meta.pkl, whose tokens are GPT-2's
    vocab_size: int
    note: str | None = None  # one line to show the user: why `auto` took another corpus
    source: str  # the file or folder the text came from


def load_corpus(
    data: str | Path = "auto",
    *,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: int = 1024,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    data_dir: str | Path | None = None,
    offline: bool | None = None,
) -> Corpus:
    """Find, read, split and encode a corpus.

    Args:
        data: `auto` (shakespeare where it can be had, else pydoc with a note), another of CORPUS_NAMES, or a path: a
            UTF-8 text file, or a folder in nanoGPT's layout. A file that is called like a corpus needs `./` or a Path.
        tokenizer: `char` (the text's own characters), `byte`, `bpe` (trained on the training part), or a tokenizer.
        bpe_vocab_size: tokens of a `bpe` vocabulary, at least 256.
        val_fraction: share of the text, at its end, kept for validation. enwik8 and text8 (90, 5 and 5 million bytes)
            and nanoGPT folders have a split of their own and take only the default.
        data_dir: where named corpora are looked for first; default $FASTCHARGPT_DATA_DIR.
        offline: never download; default whether FASTCHARGPT_OFFLINE is set.

    Raises:
        CorpusError: the corpus cannot be had, read, split or used.
        TokenizerError: a given tokenizer cannot encode the text.
    """
    if not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise CorpusError(f"val_fraction must lie between 0 and 1, not {val_fraction!r}")
    if isinstance(tokenizer, str) and tokenizer not in ("char", "byte", "bpe"):
        hint = nearest(tokenizer, ("char", "byte", "bpe"))
        raise CorpusError(f"tokenizer must be char, byte or bpe, not {tokenizer!r}{hint}")
    plan = _Plan(tokenizer, bpe_vocab_size, 1 - val_fraction)
    if isinstance(data, str) and data in CORPUS_NAMES:
        if data == "pydoc":
            return plan.split_text(_pydoc_text(), "pydoc", _pydoc_source())
        try:
            raw, path = fetch_named("shakespeare" if data == "auto" else data, data_dir, offline)
        except CorpusError as error:
            if data != "auto":
                raise
            note = f"using pydoc, the language reference of {_pydoc_source()}, because {error}"
            return plan.split_text(_pydoc_text(), "pydoc", _pydoc_source(), note)
        if data in ("enwik8", "text8"):
            _refuse_val_fraction(data, val_fraction)
            return plan.split_bytes(raw, data, str(path))
        return plan.split_text(decode_utf8(raw, str(path))[0], "shakespeare", str(path))
    path = Path(data)
    try:
        if path.is_dir():
            _refuse_val_fraction(f"the folder {path}", val_fraction)
            return _from_folder(path, tokenizer)
        if not path.is_file():
            raise CorpusError(_not_found(data, path))
        large = path.stat().st_size > STREAM_BYTES
    except PermissionError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None
    return plan.stream(path) if large else plan.split_text(read_text(path), path.name, str(path))


@dataclass(frozen=True)
class _Plan:
    """How a text becomes a corpus: the tokenizer asked for and the share of training text."""

    tokenizer: str | Tokenizer
    bpe_vocab_size: int
    train_share: float

    def make_tokenizer(
        self, everything: Callable[[], Iterable[str]], to_train: Callable[[], Iterable[str]]
    ) -> Tokenizer:
        """The tokenizer asked for: characters come from the whole text, as in the notebook; merges from train only."""
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "byte":
            return ByteTokenizer()
        if self.tokenizer == "bpe":
            return BPETokenizer.train(to_train(), self.bpe_vocab_size)
        return CharTokenizer.from_text(everything())

    def split_text(self, text: str, name: str, source: str, note: str | None = None) -> Corpus:
        _check_length(len(text), source)
        cut = int(self.train_share * len(text))
        tokenizer = self.make_tokenizer(lambda: [text], lambda: [text[:cut]])
        if isinstance(tokenizer, CharTokenizer):  # one token per character: encode once, split the tokens
            ids = tokenizer.encode(text)
            train, val = ids[:cut], ids[cut:]
        else:
            train, val = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
        return _checked(name=name, train=train, val=val, tokenizer=tokenizer, note=note, source=source)

    def split_bytes(self, raw: bytes, name: str, source: str) -> Corpus:
        """The 90, 5 and 5 million bytes of enwik8 and text8; only byte tokens let a cut split a character."""
        first, second = HUTTER_CUTS
        if isinstance(self.tokenizer, ByteTokenizer) or self.tokenizer == "byte":
            ids = np.frombuffer(bytearray(raw), np.uint8)
            parts = [ids[:first], ids[first:second], ids[second:]]
            tokenizer: Tokenizer = ByteTokenizer()
        else:
            texts, offset = [], 0
            for end in (first, second, len(raw)):
                text, used = decode_utf8(raw[offset:end], source, offset, final=False)
                texts.append(text)
                offset += used
            tokenizer = self.make_tokenizer(lambda: texts, lambda: texts[:1])
            parts = [tokenizer.encode(text) for text in texts]
        train, val, test = parts
        return _checked(name=name, train=train, val=val, test=test, tokenizer=tokenizer, source=source)

    def stream(self, path: Path) -> Corpus:
        """A text too large for memory: its tokens are memory maps in the cache."""
        sweep_cache()
        text = LargeText(path)
        given = self.tokenizer if isinstance(self.tokenizer, str) else self.tokenizer.to_json()
        train, val, tokenizer = encode_large(
            text,
            spec=f"bpe {self.bpe_vocab_size}" if given == "bpe" else given,
            train_share=self.train_share,
            make_tokenizer=lambda cut: self.make_tokenizer(text.chunks, lambda: text.chunks(min(cut, STREAM_BYTES))),
            cache=cache_dir(),
        )
        return _checked(name=path.name, train=train, val=val, tokenizer=tokenizer, source=str(path))


def _checked(
    *,
    name: str,
    train: TokenData,
    val: TokenData,
    tokenizer: Tokenizer,
    source: str,
    test: TokenData | None = None,
    note: str | None = None,
) -> Corpus:
    if tokenizer.vocab_size < 2:
        raise CorpusError(f"{source} has only one distinct character: there is nothing to learn; use a longer text")
    if not len(train) or not len(val):
        raise CorpusError(
            f"{source} leaves {len(train)} tokens to train and {len(val)} to validate on, and both need some: "
            "use a longer text or another val_fraction"
        )
    return Corpus(
        name=name,
        train=train,
        val=val,
        test=test,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        note=note,
        source=source,
    )


def _check_length(characters: int, source: str) -> None:
    if characters < 2:
        found = "is empty" if characters == 0 else "has a single character"
        raise CorpusError(f"{source} {found}: a corpus needs text to train and to validate on")


def _from_folder(folder: Path, tokenizer: str | Tokenizer) -> Corpus:
    train, val, own, vocab_size = load_nanogpt_folder(folder)
    chosen: Tokenizer | None = own
    if not isinstance(tokenizer, str):
        if tokenizer.vocab_size < vocab_size if own is None else _vocabulary(tokenizer) != own.chars:
            raise CorpusError(f"the tokens of {folder} were made with another vocabulary than {tokenizer!r}")
        chosen = tokenizer
    elif tokenizer != "char":
        raise CorpusError(f"{folder} is already tokenised, so tokenizer {tokenizer!r} cannot apply: leave it out")
    name = folder.resolve().name
    return Corpus(name=name, train=train, val=val, tokenizer=chosen, vocab_size=vocab_size, source=str(folder))


def _vocabulary(tokenizer: Tokenizer) -> str | None:
    return tokenizer.chars if isinstance(tokenizer, CharTokenizer) else None


def _refuse_val_fraction(what: str, val_fraction: float) -> None:
    if val_fraction != DEFAULT_VAL_FRACTION:
        raise CorpusError(f"{what} has a split of its own, so val_fraction {val_fraction} cannot apply: leave it out")


def _not_found(data: str | Path, path: Path) -> str:
    if "\0" not in str(path) and os.path.lexists(path):
        return f"{str(data)!r} is neither a regular file nor a folder that can be read"
    hint = nearest(str(data), CORPUS_NAMES)
    if not hint:
        with contextlib.suppress(OSError):
            hint = nearest(path.name, sorted(os.listdir(path.parent)))
    return f"{str(data)!r:.300} is neither a file, a folder nor one of {', '.join(CORPUS_NAMES)}{hint}"


def _pydoc_source() -> str:
    return f"Python {platform.python_version()}"


def _pydoc_text() -> str:
    """The language reference inside this Python, topics in alphabetical order, in plain ASCII."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python carries no language reference (pydoc_data), so the corpus 'pydoc' cannot be had: "
            "pass a .txt file"
        ) from None
    plain = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\xa0": " "})
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    return text.translate(plain).encode("ascii", "ignore").decode("ascii")
