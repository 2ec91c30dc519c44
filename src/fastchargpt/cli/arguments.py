"""From words to dataclasses: tyro, with nanoGPT's spellings let in and its error boxes folded into one sentence."""

import argparse
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn, TypeVar

import tyro

from fastchargpt.errors import ConfigError
from fastchargpt.tokenizers import CharTokenizer, Tokenizer

__all__ = ["PlainParser", "given", "parse", "peek", "with_unknown"]

T = TypeVar("T")

# nanoGPT's flags whose name or values differ from ours
RENAMED = {"dataset": "data", "dtype": "precision", "start": "prompt"}
VALUES: Mapping[str, Mapping[str, str]] = {
    "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
    "compile": {"True": "on", "False": "off"},
}
BOOLEANS = {"True": "--", "False": "--no-", "true": "--", "false": "--no-"}


def parse(kind: type[T], argv: Sequence[str], *, command: str, default: T | None = None) -> T:
    """Read a command's words into its dataclass.

    Args:
        kind: the dataclass; the fields of dataclasses inside it become flags without a prefix.
        argv: the words after the command.
        command: its name, for the help.
        default: where the flags that are not given come from.

    Raises:
        ConfigError: a flag is unknown (the nearest is named), or its value breaks a rule.
        SystemExit: after `--help`, with status 0.
    """
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(
                kind,
                args=[_ours(word) for word in argv],
                prog=f"fastchargpt {command}",
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise ConfigError(f"{_sentence(boxes.getvalue())} (`fastchargpt {command} --help` lists the options)")


def peek(argv: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, in any spelling, before the words are parsed; None where it is not given."""
    found = None
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == flag:
            following = argv[position + 1] if position + 1 < len(argv) else ""
            found = value if equals else following
    return found


def with_unknown(tokenizer: Tokenizer, unknown: Literal["error", "replace"] | None) -> Tokenizer:
    """The tokenizer with what `--unknown` says of characters outside its vocabulary; bytes and BPE spell them all."""
    return tokenizer.with_unknown(unknown) if unknown and isinstance(tokenizer, CharTokenizer) else tokenizer


def given(argv: Sequence[str], flag: str) -> bool:
    """Whether a flag stands among the words, in any spelling."""
    return peek(argv, flag) is not None


def _ours(word: str) -> str:
    """A word in our spelling: `--dtype=float32` is `--precision=fp32`, `--bias=False` is `--no-bias`."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or not equals:
        return word
    flag = name[2:].replace("-", "_")
    flag = RENAMED.get(flag, flag)
    if flag == "decay_lr" and value in BOOLEANS:
        return "--schedule=cosine" if BOOLEANS[value] == "--" else "--schedule=constant"
    if flag in VALUES:
        value = VALUES[flag].get(value, value)
    elif value in BOOLEANS:
        return BOOLEANS[value] + flag.replace("_", "-")
    return f"--{flag.replace('_', '-')}={value}"


def _sentence(box: str) -> str:
    """The message in a box that tyro drew, with Unicode's lines or ASCII's, on one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines[1:]:  # the first is the box's title
        if re.fullmatch(r"[─-]+", line):
            sections.append([])
        elif line:
            sections[-1].append(line)
    sections = [section for section in sections if section] or [["the options cannot be read"]]
    sentence = " ".join(sections[0]).rstrip(".")
    # our own rules name the field; tyro adds which dataclass it was in
    sentence = re.sub(r"^Error parsing \w+: ", "", sentence)
    sentence = sentence[:1].lower() + sentence[1:]
    for section in sections[1:]:
        if section[0].startswith("Perhaps you meant") and len(section) > 1:
            sentence += f" (did you mean {section[1].split()[0].rstrip(',')}?)"
    return sentence


class PlainParser(argparse.ArgumentParser):
    """argparse whose complaints are this package's errors, for the commands that must work where tyro is missing."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (`{self.prog} --help` lists the options)")
