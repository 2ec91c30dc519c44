"""`fastchargpt eval`: a trained model's exact loss on a whole split."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.cli.arguments import parse, with_unknown
from fastchargpt.corpus import load_corpus
from fastchargpt.evaluation import evaluate
from fastchargpt.loading import restore
from fastchargpt.precision import choose_device, choose_precision

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Measure a trained model's loss on a whole split, every token predicted once."""

    # a run's out dir, or a checkpoint's folder
    folder: Annotated[str, tyro.conf.Positional] = "out"
    # the corpus, as in `train`; the one that the model was trained on by default
    data: str | None = None
    # which part of it
    split: Literal["val", "train"] = "val"
    # a character that the model's vocabulary lacks: refuse the corpus, or replace it by the vocabulary's stand-in (as
    # the tokenizer was saved, where this is not given)
    unknown: Literal["error", "replace"] | None = None
    # number format of the matrix products
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    # where to compute: auto takes cuda, then mps, then cpu
    device: str = "auto"
    # write one JSON object instead of a line
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Evaluate as the words say; the exit status."""
    command = parse(EvalCommand, argv, command="eval", default=EvalCommand())
    device = choose_device(command.device)
    checkpoint = load_checkpoint(command.folder, device=device)
    model, tokenizer = restore(checkpoint)
    tokenizer = None if tokenizer is None else with_unknown(tokenizer, command.unknown)
    data = command.data or checkpoint.info.get("data", "auto")
    corpus = load_corpus(data, tokenizer=tokenizer or "char")
    if corpus.note:
        print(corpus.note, file=sys.stderr)
    tokens = corpus.val if command.split == "val" else corpus.train
    result = evaluate(
        model, tokens, block_size=model.config.block_size, precision=choose_precision(command.precision, device)
    )
    # the first token is given, and so are the characters it stands for
    characters = result.tokens if tokenizer is None or tokenizer.name == "char" else len(tokenizer.decode(tokens[1:]))
    figures = {
        "loss": result.loss,
        "bits_per_character": result.loss * result.tokens / math.log(2) / characters,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "corpus": corpus.name,
        "split": command.split,
    }
    if command.json:
        print(json.dumps(figures))
    else:
        print(
            f"{corpus.name}, {command.split} split, {result.tokens:,} tokens: loss {result.loss:.4f} nats per token, "
            f"{figures['bits_per_character']:.4f} bits per character, perplexity {result.perplexity:.3f}"
        )
    return 0
