"""What each ingredient of the recipe `speedrun-cpu` is worth: the recipe without it, over several seeds."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.corpus import Corpus
from fastchargpt.errors import TrainingError
from fastchargpt.presets import preset
from fastchargpt.trainer import Trainer

__all__ = ["VARIANTS", "Variant", "Worth", "leave_one_out"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The recipe with something changed.

    Where what is changed has a natural setting of its own, as AdamW has a learning rate, each of `tries` is run and the
    best counts: an ingredient is not to look good because what replaces it is badly set.
    """

    name: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tries: Sequence[Mapping[str, Any]] = ({},)


def _rates(name: str, values: Sequence[float]) -> Sequence[Mapping[str, Any]]:
    return tuple({name: value} for value in values)


# All see as many tokens as the recipe, in the same number of steps unless the batch is what changes.
VARIANTS: tuple[Variant, ...] = (
    Variant(name="the recipe"),
    Variant(
        name="AdamW for all, in place of Muon",
        train=dict(optimizer="adamw", beta1=0.9),
        tries=_rates("learning_rate", (1.5e-3, 3e-3, 6e-3, 1e-2)),
    ),
    Variant(name="Muon's momentum 0.95, not 0.85", train=dict(momentum=0.95)),
    Variant(name="AdamW's first decay 0.9, not 0.6", train=dict(beta1=0.9)),
    Variant(name="learned positions, in place of RoPE", model=dict(position="learned")),
    Variant(name="RoPE's base 10000, not 200", model=dict(rope_base=10000.0)),
    Variant(name="without QK-norm", model=dict(qk_norm=False)),
    Variant(name="GELU, in place of squared ReLU", model=dict(activation="gelu")),
    Variant(name="LayerNorm, in place of RMSNorm", model=dict(norm="layernorm")),
    Variant(name="projections start as GPT-2's, not at 0", model=dict(proj_init="gpt2")),
    Variant(name="the head tied to the embedding", model=dict(tie_weights=True)),
    Variant(name="with a soft-cap of 15", model=dict(logit_softcap=15.0)),
    Variant(name="random offsets, in place of shuffled epochs", train=dict(order="random")),
    Variant(name="cosine, in place of a linear fall", train=dict(schedule="cosine")),
    Variant(name="the rate falls in the last 40 % only", train=dict(schedule="wsd", cooldown_fraction=0.4)),
    Variant(
        name="with averaged weights, the rate falling to part of it",
        train=dict(ema_decay=0.95),
        tries=_rates("min_lr", (2e-3, 4e-3, 8e-3)),
    ),
    Variant(name="with 20 steps of warm-up", train=dict(warmup_iters=20)),
    Variant(name="with weight decay of 0.1", train=dict(weight_decay=0.1)),
    Variant(name="with clipping at 1", train=dict(grad_clip=1.0)),
    Variant(name="batches of 12, twice the steps", train=dict(batch_size=12, max_iters=440)),
    Variant(name="batches of 48, half the steps", train=dict(batch_size=48, max_iters=110)),
    Variant(name="3 layers", model=dict(n_layer=3)),
    Variant(name="96 wide, 3 heads", model=dict(n_embd=96, n_head=3)),
    Variant(name="4 heads", model=dict(n_head=4)),
)


@dataclass(frozen=True, kw_only=True)
class Worth:
    """How a variant did."""

    name: str
    # exact validation loss of each seed, nats per token
    losses: tuple[float, ...]
    # median seconds of a step, milliseconds
    step_ms: float
    # the try that did best; empty where there was one
    chosen: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """Mean loss."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 and math.isfinite(self.mean) else 0.0


def leave_one_out(
    corpus: Corpus, seeds: Sequence[int], *, variants: Sequence[Variant] = VARIANTS, steps: int | None = None
) -> Iterator[Worth]:
    """Train every variant with every seed, one result at a time.

    Args:
        corpus: characters.
        seeds: of weights and batches.
        variants: what to train.
        steps: as many at most, for a trial.
    """
    recipe = preset("speedrun-cpu")
    for variant in variants:
        found: list[Worth] = []
        for attempt in variant.tries:
            model = dataclasses.replace(recipe.model, vocab_size=corpus.vocab_size, **variant.model)
            train = dataclasses.replace(recipe.train, **{**variant.train, **attempt})
            if steps is not None:
                train = dataclasses.replace(train, max_iters=min(steps, train.max_iters))
            runs = [_train(model, dataclasses.replace(train, seed=seed), corpus) for seed in seeds]
            losses, times = zip(*runs, strict=True)
            found.append(
                Worth(
                    name=variant.name,
                    losses=losses,
                    step_ms=statistics.median(times) * 1e3,
                    chosen=attempt,
                )
            )
        yield min(found, key=lambda worth: (math.isnan(worth.mean), worth.mean))


def _train(model: GPTConfig, config: TrainConfig, corpus: Corpus) -> tuple[float, float]:
    """The exact validation loss at the end, and seconds a step, evaluation included."""
    end = config.max_iters
    config = dataclasses.replace(config, eval_interval=end, log_interval=end + 1, eval_iters=1)
    with torch.random.fork_rng(devices=[]):
        try:
            result = Trainer(model, config, corpus, log=lambda line: None).run()
        except TrainingError:  # it diverged
            return math.nan, math.nan
    if result.stopped != "finished":  # the trainer takes Ctrl-C for the end of its run, and here it is that of all
        raise KeyboardInterrupt
    return result.val_loss, result.seconds / config.max_iters
