"""`fastchargpt sample`: a trained model's continuation of a prompt, as it is drawn."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastchargpt.cli.arguments import parse, with_unknown
from fastchargpt.engines import EngineConfig
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.generation import generate, stream
from fastchargpt.loading import load
from fastchargpt.precision import choose_device
from fastchargpt.sampling import SamplingConfig

__all__ = ["run"]

SEPARATOR = "---------------"


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What to continue, and where."""

    # the text to continue; empty starts from a new line
    prompt: str = ""
    # read the prompt from a file instead; - is standard input
    prompt_file: str | None = None
    # a character that the vocabulary lacks: refuse the prompt, or replace it by the vocabulary's stand-in (as the
    # tokenizer was saved, where this is not given)
    unknown: Literal["error", "replace"] | None = None
    # write one JSON object a sample, with tokens and log-probabilities, instead of text
    json: bool = False
    # where to compute: auto takes cuda, then mps, then cpu
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Write text with a trained model."""

    # a run's out dir, or a checkpoint's folder
    folder: Annotated[str, tyro.conf.Positional] = "out"
    # what to continue, and where
    prompt: PromptOptions = field(default_factory=PromptOptions)
    # how the next token is chosen
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # what computes it
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(argv: Sequence[str]) -> int:
    """Sample as the words say; the exit status."""
    command = parse(SampleCommand, argv, command="sample", default=SampleCommand())
    options, config = command.prompt, command.sampling
    if config.logprobs is not None and not options.json:
        raise ConfigError("--logprobs is written with --json only: add --json, or leave --logprobs out")
    model, tokenizer = load(command.folder, device=choose_device(options.device))
    if tokenizer is None:
        raise CheckpointError(
            f"{command.folder} has no tokenizer, so its tokens cannot be written as text: name one that has"
        )
    tokenizer = with_unknown(tokenizer, options.unknown)
    prompt = _read_prompt(options)
    if options.json:
        for generation in generate(model, tokenizer, prompt, config, command.engine):
            print(json.dumps(asdict(generation), ensure_ascii=False))
    elif config.num_samples == 1:
        pieces = stream(model, tokenizer, prompt, config, command.engine)  # says what is wrong before a word is shown
        _show(prompt)
        try:
            for piece in pieces:
                _show(piece)
        finally:  # after Ctrl-C too: the text so far stays, and ends its line
            _show("\n")
    else:
        for generation in generate(model, tokenizer, prompt, config, command.engine):
            print(f"{prompt}{generation.text}\n{SEPARATOR}", flush=True)
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompt(options: PromptOptions) -> str:
    if options.prompt_file is None:
        return options.prompt
    if options.prompt:
        raise ConfigError("--prompt and --prompt-file both name a prompt: give one of the two")
    if options.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the prompt file {options.prompt_file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the prompt file {options.prompt_file} is not UTF-8 text: convert it first") from None
