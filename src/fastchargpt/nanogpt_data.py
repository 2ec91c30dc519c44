"""nanoGPT's data folders: train.bin and val.bin of headerless uint16 tokens, and a meta.pkl that is never unpickled."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastchargpt.errors import CorpusError, TokenizerError
from fastchargpt.text_files import map_tokens
from fastchargpt.tokenizers import CharTokenizer

__all__ = ["GPT2_VOCAB_SIZE", "load_nanogpt_folder", "read_meta"]

GPT2_VOCAB_SIZE = 50257
MAX_META_BYTES = 2 * 2**20  # a hundred thousand distinct characters
_SCAN_TOKENS = 1 << 24

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"),
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"),
}


def load_nanogpt_folder(folder: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any], CharTokenizer | None, int]:
    """train and val as memory maps, the tokenizer of meta.pkl or None without one, and the vocabulary size.

    Without meta.pkl the tokens are taken for GPT-2's, as nanoGPT does, and the vocabulary size is 50257.

    Raises:
        CorpusError: a file is missing, damaged, or holds a token outside the vocabulary.
    """
    if not (folder / "train.bin").is_file():
        raise CorpusError(
            f"{folder} is a folder without train.bin: pass a .txt file, or a folder in nanoGPT's layout "
            "(train.bin, val.bin and meta.pkl)"
        )
    train, val = (map_tokens(folder / name, np.dtype("<u2")) for name in ("train.bin", "val.bin"))
    tokenizer = read_meta(folder / "meta.pkl") if (folder / "meta.pkl").exists() else None
    vocab_size = GPT2_VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
    for name, tokens in (("train.bin", train), ("val.bin", val)):
        for start in range(0, len(tokens), _SCAN_TOKENS):
            top = int(tokens[start : start + _SCAN_TOKENS].max())
            if top >= vocab_size:
                belongs = "meta.pkl" if tokenizer is not None else "GPT-2's vocabulary (there is no meta.pkl)"
                raise CorpusError(
                    f"{folder / name} holds token {top}, outside the {vocab_size} of {belongs}: "
                    "prepare the folder again"
                )
    return train, val, tokenizer, vocab_size


def read_meta(path: Path) -> CharTokenizer:
    """The character vocabulary of nanoGPT's meta.pkl, read without Python's unpickler, so nothing in it can run.

    Raises:
        CorpusError: too large, damaged, or anything but the plain dicts of text and numbers that nanoGPT writes.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_META_BYTES + 1)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from None
    if len(raw) > MAX_META_BYTES:
        raise CorpusError(f"{path} is larger than a character vocabulary can be ({MAX_META_BYTES >> 20} MiB)")
    try:
        meta = _read_plain_pickle(raw)
        itos, stoi = meta["itos"], meta["stoi"]
        chars = [itos[i] for i in range(len(itos))]
        if stoi != {char: i for i, char in enumerate(chars)} or meta.get("vocab_size", len(chars)) != len(chars):
            raise ValueError("itos, stoi and vocab_size disagree")
        return CharTokenizer(chars)
    except TokenizerError as error:
        raise CorpusError(f"{path} has no usable vocabulary: {error}") from None
    # Whatever the bytes hold, reading them can only go wrong in these ways: a bad opcode, a missing or misplaced value.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:120] or type(error).__name__
        raise CorpusError(
            f"{path} is not a meta.pkl of nanoGPT's characters ({' '.join(reason.split())}): prepare the folder "
            "again, or train on the text itself"
        ) from None


def _read_plain_pickle(raw: bytes) -> Any:
    """The value of a pickle made only of dicts, str, int, bool and None; any other opcode is refused.

    A stack machine over `pickletools.genops`, which parses opcodes and runs none: no import, no call, no allocation
    beyond the bytes that are there.
    """
    import pickletools

    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = max(i for i, value in enumerate(stack) if value is _MARK)
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def put_items(target: Any, flat: list[Any]) -> None:
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[key] = value

    for opcode, arg, _ in pickletools.genops(raw):
        name = opcode.name
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            put_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = since_mark()
            put_items(stack[-1], items)
        elif name == "DICT":
            made: dict[Any, Any] = {}
            put_items(made, since_mark())
            stack.append(made)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it contains {name}, which plain text and numbers never need")
    raise ValueError("it ends early")
