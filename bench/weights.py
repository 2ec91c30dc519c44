"""Weights for the generation contests: trained, since an untrained model does not show what drafts are worth."""

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastchargpt.batches import TokenBatches, place_tokens
from fastchargpt.bench.contest import Absent
from fastchargpt.config import GPTConfig
from fastchargpt.corpus import Corpus, load_corpus
from fastchargpt.errors import TokenizerError
from fastchargpt.loading import load
from fastchargpt.model import GPT
from fastchargpt.native import NativeEngine, native_problem
from fastchargpt.optim import make_muon
from fastchargpt.step import make_train_step

__all__ = ["Weights", "bits_per_token", "load_weights", "train_weights"]

BATCH_SIZE = 8
# tokens of the validation text that a loss in bits is measured on
BITS_TOKENS = 16_384


@dataclass(frozen=True, eq=False)
class Weights:
    """A trained model and a text it has not seen."""

    model: GPT
    # how they came about, in words
    about: str
    # validation tokens, int64; None where the corpus here is not of the model's vocabulary
    unseen: Tensor | None


@functools.cache
def _corpus() -> Corpus:
    return load_corpus()


@functools.cache
def train_weights(shape: GPTConfig, steps: int, device: torch.device) -> Weights:
    """A model of this shape after so many steps of Muon on the default corpus; its vocabulary is the corpus's."""
    corpus = _corpus()
    config = replace(shape, vocab_size=corpus.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(1337)
        model = GPT(config).to(device)
    optimizer = make_muon(
        model, learning_rate=2e-3, matrix_learning_rate=0.02, weight_decay=0.0, betas=(0.9, 0.95), momentum=0.9
    )
    # falling from the first step on: the most that so few can give
    step = make_train_step(
        model, optimizer=optimizer, learning_rate=lambda done: 2e-3 * (1 - done / steps), precision="fp32"
    )
    batches = TokenBatches(
        corpus.train, batch_size=BATCH_SIZE, block_size=config.block_size, order="epochs", device=device, seed=1
    )
    for _ in range(steps):
        step(*batches.next_batch())
    return Weights(model.eval(), f"{steps} steps of {BATCH_SIZE} sequences of {corpus.name}", _unseen(corpus))


@functools.cache
def load_weights(folder: Path, device: torch.device) -> Weights:
    """A checkpoint's model.

    Raises:
        ConfigError: its positions end before what is to be written does.
        CheckpointError: there is no checkpoint in the folder.
    """
    model, tokenizer = load(folder, device=device)
    if tokenizer is None:
        return Weights(model, "a checkpoint", None)
    try:
        unseen = _unseen(load_corpus(tokenizer=tokenizer))
    except TokenizerError:
        unseen = None
    return Weights(model, "a checkpoint", unseen)


def _unseen(corpus: Corpus) -> Tensor:
    return place_tokens(corpus.val).long()


@torch.inference_mode()
def bits_per_token(weights: Weights, *, int8: bool) -> float:
    """The loss on unseen text, in bits per token, by the native engine's fp32 or int8 weights.

    Raises:
        Absent: there is no unseen text, or the native engine does not serve.
    """
    if weights.unseen is None:
        raise Absent("the corpus that can be had here has characters which the model's vocabulary lacks")
    if (problem := native_problem(weights.model)) is not None:
        raise Absent(problem)
    size = weights.model.config.block_size
    engine = NativeEngine(weights.model, 1, size, int8=int8)
    places, row = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
    logits = torch.empty(size, weights.model.config.vocab_size)
    total, count = 0.0, max(1, min(BITS_TOKENS, len(weights.unseen) - 1) // size)
    for window in range(count):
        text = weights.unseen[window * size : (window + 1) * size + 1]
        tokens = text[:-1].numpy().astype(np.int32)
        seen = len(tokens)
        engine.native.step(engine.memory, tokens, row[:seen], places[:seen], logits[:seen], int8=int8)
        total += float(F.cross_entropy(logits[:seen].double(), text[1:]))
    return total / count / math.log(2)
