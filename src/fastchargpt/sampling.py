"""From logits to a token: which knobs there are, in which order they act; only those that are on cost anything.

The knobs (pure functions, knobs.py) act in this order, each on what the one before left:

1. `repetition_penalty`, `presence_penalty`, `frequency_penalty` on the model's own logits (the first looks at signs)
2. `logit_bias`, then `banned`
3. `temperature`
4. `top_k`, `top_p`, `min_p`, `typical_p`
5. one draw by inverting the distribution function, with one uniform number per sequence and step

The uniforms come from counter-based streams, one for each sequence, so what a sequence draws does not depend on its
neighbours in the batch. Shapes: B sequences, V tokens in the vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from fastchargpt.errors import SamplingError
from fastchargpt.knobs import (
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_counts,
    penalise_repeats,
    uniforms,
)

__all__ = ["Sampler", "SamplingConfig"]

_MAX_SEED = 2**63  # seeds stay within what a checkpoint, a JSON file and torch's generator can hold


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to continue a text. Checked on construction; the default draws from the model's own distribution.

    Raises:
        SamplingError: a knob is out of range, or two knobs contradict each other.
    """

    # tokens
    max_new_tokens: int = 500
    # logits are divided by it; 0 takes the likeliest token (greedy)
    temperature: float = 1.0
    # tokens; keep the k likeliest, and ties with the k-th; over the vocabulary: keep all
    top_k: int | None = None
    # probability in (0, 1]; keep the fewest likeliest tokens that hold this mass
    top_p: float | None = None
    # in [0, 1]; keep tokens at least this fraction as likely as the likeliest
    min_p: float | None = None
    # probability in (0, 1]; the same mass, of the tokens nearest the mean surprise
    typical_p: float | None = None
    # logits of tokens in prompt and continuation are divided by it (if < 0: times it)
    repetition_penalty: float = 1.0
    # logits, subtracted once from each token that the continuation has
    presence_penalty: float = 0.0
    # logits, subtracted for each time that the continuation has the token
    frequency_penalty: float = 0.0
    # logits added; a str is a one-token text
    logit_bias: Mapping[str | int, float] = field(default_factory=dict)
    # tokens never drawn; a str is a one-token text, an int a token
    banned: tuple[str | int, ...] = ()
    # the text ends before the first of these
    stop: tuple[str, ...] = ()
    # continuations of each prompt
    num_samples: int = 1
    # sequence i draws from stream seed + i; None takes one from torch's generator
    seed: int | None = None
    # report the model's own log-probability of each token, and of so many alternatives
    logprobs: int | None = None
    # what goes on past block_size: crop recomputes the last block_size tokens for each new one, as nanoGPT does;
    # rechunk drops the oldest half and computes the rest once; slide drops the oldest key and value (RoPE only);
    # auto is slide for RoPE and crop for learned positions
    context: Literal["auto", "crop", "rechunk", "slide"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "top_k", "seed", "logprobs"):
            self._whole(name)
        for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"):
            self._number(name)
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name)
        self._within("max_new_tokens", self.max_new_tokens >= 0, "at least 0")
        self._within("num_samples", self.num_samples >= 1, "at least 1")
        greedy_or_safe = self.temperature == 0 or self.temperature >= 1e-6
        self._within("temperature", greedy_or_safe, "0 (the likeliest token) or at least 1e-6")
        self._within("top_k", self.top_k is None or self.top_k >= 1, "at least 1 (None keeps every token)")
        self._within("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        self._within("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1")
        self._within("typical_p", self.typical_p is None or 0 < self.typical_p <= 1, "above 0 and at most 1")
        self._within("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000 (1 is none)")
        self._within("presence_penalty", abs(self.presence_penalty) <= 1e3, "from -1000 to 1000 (0 is none)")
        self._within("frequency_penalty", abs(self.frequency_penalty) <= 1e3, "from -1000 to 1000 (0 is none)")
        self._within("seed", self.seed is None or 0 <= self.seed < _MAX_SEED, "from 0 to 2**63 - 1")
        self._within("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0")
        contexts = ("auto", "crop", "rechunk", "slide")
        self._within("context", self.context in contexts, f"one of {', '.join(contexts)}")
        self._check_tokens()
        self._check_contradictions()

    def _whole(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise SamplingError(f"{name} must be a whole number, got {value!r}")

    def _number(self, name: str) -> None:
        value = getattr(self, name)
        optional = next(f.default for f in fields(self) if f.name == name) is None
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SamplingError(f"{name} must be a finite number, got {value!r}")

    def _within(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise SamplingError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def _check_tokens(self) -> None:
        for name in ("stop", "banned"):
            if isinstance(single := getattr(self, name), str):
                raise SamplingError(f"{name} must be a tuple of texts, got the single text {single!r}")
        for text in self.stop:
            if not isinstance(text, str) or text == "":
                raise SamplingError(f"a stop string must be a text of at least one character, got {text!r}")
        for token, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= 1e6:
                raise SamplingError(
                    f"logit_bias of {token!r} must be from -1e6 to 1e6, got {bias!r}: "
                    "to forbid a token, put it in banned"
                )
        both = [token for token in self.banned if token in self.logit_bias]
        if both:
            raise SamplingError(f"{both[0]!r} is both banned and in logit_bias: keep one of the two")

    def _check_contradictions(self) -> None:
        if self.temperature == 0:
            for name, off in (
                ("top_k", (None, 1)),
                ("top_p", (None, 1)),
                ("min_p", (None, 0)),
                ("typical_p", (None, 1)),
            ):
                if getattr(self, name) not in off:
                    raise SamplingError(
                        f"temperature 0 takes the likeliest token, so {name}={getattr(self, name)!r} has no say: "
                        f"drop {name} or give a temperature above 0"
                    )
            if self.num_samples > 1:
                raise SamplingError(
                    f"temperature 0 would give num_samples={self.num_samples} copies of one text: "
                    "ask for 1 sample or give a temperature above 0"
                )


_Knob = Callable[[Tensor], Tensor]


class Sampler:
    """The knobs of one configuration, for B sequences: `tokens = sampler(logits)`, once for each step.

    Args:
        config: the knobs; texts in `banned` and `logit_bias` must have been resolved to tokens (see `generate`).
        vocab_size: V.
        seeds: B seeds, one for each sequence.
        prompts: the tokens of each prompt, for the repetition penalty; B of them, or none.
        device: where the logits will lie.

    Raises:
        SamplingError: a token is outside the vocabulary, a text was not resolved, or every token is banned.
    """

    def __init__(
        self,
        config: SamplingConfig,
        vocab_size: int,
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.seeds = tuple(seeds)
        self.greedy = config.temperature == 0 or config.top_k == 1
        self._step = 0
        self._table = torch.empty(len(self.seeds), 0, dtype=torch.float64, device=device)
        self._table_start = 0
        # (B, V): tokens of prompt and continuation, and how often the continuation has each; empty where no knob asks
        self._seen = self._counts = torch.empty(0)
        self._knobs: list[_Knob] = []
        self._build(vocab_size, prompts, torch.device(device))

    def _build(self, vocab_size: int, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        config, shape = self.config, (len(self.seeds), vocab_size)
        if (penalty := config.repetition_penalty) != 1:
            seen = torch.zeros(shape, dtype=torch.bool)
            for row, prompt in zip(seen, prompts, strict=bool(prompts)):
                row[torch.as_tensor(prompt, dtype=torch.int64)] = True
            self._seen = seen.to(device)
            self._knobs.append(lambda logits: penalise_repeats(logits, self._seen, penalty))
        if (presence := config.presence_penalty) or config.frequency_penalty:
            frequency = config.frequency_penalty
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
            self._knobs.append(lambda logits: penalise_counts(logits, self._counts, presence, frequency))
        if config.logit_bias or config.banned:
            bias = self._bias(vocab_size).to(device)
            self._knobs.append(lambda logits: add_bias(logits, bias.to(logits.dtype)))
        if self.greedy:
            return
        if (temperature := config.temperature) != 1:
            self._knobs.append(lambda logits: logits / temperature)
        cuts: tuple[tuple[float | None, Callable[[Tensor, float], Tensor], float], ...] = (
            (config.top_p, keep_top_p, 1.0),
            (config.min_p, keep_min_p, 0.0),
            (config.typical_p, keep_typical, 1.0),
        )
        if (k := config.top_k) is not None and k < vocab_size:
            self._knobs.append(lambda logits: keep_top_k(logits, k))
        for value, cut, off in cuts:
            if value is not None and value != off:
                self._knobs.append(lambda logits, cut=cut, value=value: cut(logits, value))  # type: ignore[misc]

    def _bias(self, vocab_size: int) -> Tensor:
        bias = torch.zeros(vocab_size, dtype=torch.float64)
        for name, tokens in (("logit_bias", self.config.logit_bias), ("banned", self.config.banned)):
            for token in tokens:
                if not isinstance(token, int):
                    raise SamplingError(f"{name} has the text {token!r}: without a tokenizer it must be a token number")
                if not 0 <= token < vocab_size:
                    raise SamplingError(f"{name} has token {token}, outside the vocabulary of {vocab_size} tokens")
                bias[token] = self.config.logit_bias[token] if name == "logit_bias" else -math.inf
        if bool(bias.isinf().all()):
            raise SamplingError(f"banned has all {vocab_size} tokens of the vocabulary: leave at least one")
        return bias

    def peek_uniforms(self, count: int) -> Tensor:
        """The next `count` uniform numbers of each sequence, (B, count) float64, without using them up."""
        column = self._step - self._table_start
        if column + count > self._table.size(1):
            # doubling blocks: a short text does not pay for a long one's numbers
            block = max(count, min(1024, max(32, 2 * self._table.size(1))))
            self._table = uniforms(self.seeds, self._step, block).to(self._table.device)
            self._table_start, column = self._step, 0
        return self._table[:, column : column + count]

    def use_uniforms(self, count: int) -> None:
        """Move on by `count` draws."""
        self._step += count

    def shape(self, logits: Tensor) -> Tensor:
        """The logits (B, V) after every knob, ready for a draw (for greedy: for argmax)."""
        for knob in self._knobs:
            logits = knob(logits)
        return logits

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) -> tokens (B,) int64; remembers them where a penalty needs it."""
        u = None
        if not self.greedy:
            u = self.peek_uniforms(1)[:, 0]
            self.use_uniforms(1)
        tokens = self.choose(logits, u)
        self.record(tokens)
        return tokens

    def choose(self, logits: Tensor, u: Tensor | None) -> Tensor:
        """(B, V) and uniform numbers (B,) -> tokens (B,) int64; a greedy sampler asks for none.

        Nothing is read back and nothing remembered. Where the logits are not finite the token may be V, which is none.
        """
        logits = self.shape(logits)
        if self.greedy:
            return logits.argmax(dim=-1)
        assert u is not None
        return draw(logits, u)

    def record(self, tokens: Tensor) -> None:
        """Count tokens (B,) that were drawn elsewhere, for the penalties."""
        if self._seen.numel():
            self._seen.scatter_(1, tokens[:, None], True)
        if self._counts.numel():
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))

    def select(self, places: Sequence[int]) -> None:
        """Go on with these of the present rows only, in this order."""
        index = torch.tensor(places, device=self._table.device)
        self.seeds = tuple(self.seeds[place] for place in places)
        self._table = self._table[index]
        if self._seen.numel():
            self._seen = self._seen[index]
        if self._counts.numel():
            self._counts = self._counts[index]
