"""`fastchargpt convert`: a model from one format into another."""

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from fastchargpt.cli.arguments import parse
from fastchargpt.convert import convert
from fastchargpt.convert.core import Format

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Convert a model: fastchargpt, nanoGPT, the lecture, GPT-2 as transformers keeps it, safetensors, GGUF."""

    # what to read: a run's out dir, nanoGPT's out dir or ckpt.pt, the lecture's .pt, a GPT-2 folder, or a file
    source: Positional[str]
    # what to write; it must not exist
    target: Positional[str]
    # the format to write; None takes safetensors or gguf for a name that ends so, else fastchargpt for foreign models
    to: Format | None = None
    # a vocabulary to take in place of the source's: a tokenizer.json, nanoGPT's meta.pkl, or the .txt it was made from
    tokenizer: str | None = None
    # compare the logits of source and result before saying done
    check: bool = False


def run(argv: Sequence[str]) -> int:
    """Convert as the words say; the exit status."""
    command = parse(ConvertCommand, argv, command="convert")
    done = convert(command.source, command.target, to=command.to, tokenizer=command.tokenizer, check=command.check)
    for note in done.notes:
        print(note)
    if done.checked is not None:
        worst, how = done.checked
        print(f"checked: the logits of both agree to {worst:.1g} in float64 (computed by {how})")
    print(f"converted {command.source} ({done.source_format}) to {command.target} ({done.target_format})")
    return 0
