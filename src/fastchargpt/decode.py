"""One token after another: the key/value cache, its rules past block_size, and the engine in plain torch.

Shapes in names: B sequences, T tokens, C channels (n_embd), H heads, D channels per head, S slots of the cache,
V vocabulary.

**Past block_size** the context follows one of three rules (`SamplingConfig.context`):

- *crop*: each new token is predicted from the last block_size tokens, computed anew, as nanoGPT does.
- *rechunk*: when the context is full, its oldest half is dropped and the rest computed anew, at positions from 0 up;
  then decoding goes on at the cached speed.
- *slide* (RoPE only): each layer attends to the keys and values of the last block_size positions, as they were computed
  when their token came. That equals one pass over the whole sequence under a causal band of width block_size; what
  left the window still has an influence through the deeper layers, as in any sliding-window attention.

A prompt longer than block_size is first cut to its last block_size tokens, under every rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from fastchargpt.cache import KVCache
from fastchargpt.decode_step import Place, decode_step, place_at, turn_tables
from fastchargpt.errors import SamplingError
from fastchargpt.layers import rope_tables
from fastchargpt.model import GPT
from fastchargpt.sampling import SamplingConfig

__all__ = ["DecodeMemory", "DecodeSession", "DrawingEngine", "Engine", "TorchEngine", "resolve_context"]


class Engine(Protocol):
    """What computes logits. Rows are the sequences of a batch; each has its own place in the cache."""

    def fill(self, rows: Sequence[int], windows: Sequence[Sequence[int]], *, keep: bool = True) -> Tensor:
        """Start rows anew with these tokens, one forward for all: logits (len(rows), V) after each one's last.

        With keep=False the cache is left as it is.
        """

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to each row at its position: logits (len(rows), V). Other rows' caches may be spoiled."""


class DrawingEngine(Engine, Protocol):
    """An engine that also draws, for the knobs that `can_draw` allows: several tokens of each row in one call."""

    @property
    def at_once(self) -> int:
        """How many tokens of a row `decode` should draw in one call, and the most that it can."""

    def draw(self, logits: Tensor, vocab_size: int, config: SamplingConfig, u: Tensor) -> list[int]:
        """Draw from what `fill` or `step` returned, by a uniform number (rows,) float64 for each."""

    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        vocab_size: int,
        config: SamplingConfig,
        u: Tensor,
    ) -> list[list[int]]:
        """Append a token to each row and draw up to N more by u (rows, N) float64: the rows' tokens, step by step.

        They are the same that as many calls of `step` and `draw` would have given.
        """


@dataclass(frozen=True)
class DecodeMemory:
    """The tensors that decoding in torch works on."""

    cache: KVCache
    # `turn_tables` of every position that there may be, (2, P, D); None for learned positions
    rope: Tensor | None
    # 0 .. B - 1 and 0 .. block_size - 1
    rows: Tensor
    slots: Tensor

    @classmethod
    def allocate(cls, model: GPT, batch_size: int, positions: int) -> Self:
        """For `batch_size` sequences that reach `positions` positions, on the model's device and in its dtype."""
        config, weight = model.config, model.lm_head.weight
        rope = None
        if config.position == "rope":
            length = max(positions, config.block_size)
            rope = turn_tables(rope_tables(length, config.head_dim, config.rope_base, weight.device))
        return cls(
            cache=KVCache(config, batch_size, device=weight.device, dtype=weight.dtype),
            rope=rope,
            rows=torch.arange(batch_size, device=weight.device),
            slots=torch.arange(config.block_size, device=weight.device),
        )


class TorchEngine:
    """Decoding in torch operations, on any device and in any precision: the reference, and the fallback."""

    def __init__(self, model: GPT, batch_size: int, positions: int, memory: DecodeMemory | None = None) -> None:
        """Take the memory for `batch_size` sequences that reach `positions` positions, or allocate it."""
        self.model, self.config, self.batch_size = model, model.config, batch_size
        self.memory = memory or DecodeMemory.allocate(model, batch_size, positions)
        self.cache, weight = self.memory.cache, model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype

    def fill(self, rows: Sequence[int], windows: Sequence[Sequence[int]], *, keep: bool = True) -> Tensor:
        """See `Engine`. Shorter windows are padded on the right, where causality hides the padding."""
        lengths = [len(window) for window in windows]
        longest = max(lengths)
        idx_BT = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows], device=self.device)
        if not keep:
            cache = None
        elif len(rows) == self.batch_size:
            cache = self.cache
            cache.length = 0
        else:
            cache = KVCache(self.config, len(rows), capacity=longest, device=self.device, dtype=self.dtype)
        x_BTC = self.model.hidden(idx_BT, cache)
        if cache is not None and cache is not self.cache:
            self.cache.kv_L2BHSD[:, :, list(rows), :, :longest] = cache.kv_L2BHSD
        last = torch.tensor(lengths, device=self.device) - 1
        return self.model.logits(x_BTC[torch.arange(len(rows), device=self.device), last])

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See `Engine`. Computes every row; those not named get token 0 at position 0."""
        if len(rows) < self.batch_size:
            chosen = dict(zip(rows, zip(tokens, positions, strict=True), strict=True))
            both = [chosen.get(row, (0, 0)) for row in range(self.batch_size)]
            logits_BV = self._step([token for token, _ in both], [position for _, position in both])
            return logits_BV[list(rows)]
        return self._step(tokens, positions)

    def _step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        size = self.config.block_size
        seen = min(max(positions) + 1, size)
        if len(set(positions)) == 1:
            first = positions[0]
            place = Place(at=slice(first, first + 1), slot=first % size, rows=slice(None), seen=seen, mask=None)
        else:
            at_B = torch.tensor(positions, device=self.device)
            place = place_at(at_B, self.memory.rows, self.memory.slots, seen, self.dtype)
        tokens_B = torch.tensor(tokens, device=self.device)
        return decode_step(self.model, self.cache.kv_L2BHSD, self.memory.rope, tokens_B, place)


class DecodeSession:
    """The tokens of a batch of sequences, and how their context moves on.

    Args:
        engine: what computes.
        block_size: longest context, in tokens.
        context: the rule past block_size, one of crop, rechunk and slide.
        prompts: the tokens of each sequence, at least one each.
    """

    def __init__(
        self,
        engine: Engine,
        block_size: int,
        context: Literal["crop", "rechunk", "slide"],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.engine, self.block_size, self.context = engine, block_size, context
        # what the cache holds of each sequence, at positions 0, 1, ...; under `slide` all that came since the prompt
        self.windows = [list(prompt[-block_size:]) for prompt in prompts]

    def start(self) -> Tensor:
        """One forward over the prompts: logits (B, V) of each one's next token."""
        return self.engine.fill(range(len(self.windows)), self.windows)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append a token to each of these rows (the others are not needed any more): logits (len(rows), V)."""
        stepping: list[tuple[int, int, int]] = []
        refilling: list[tuple[int, int, int]] = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            window = self.windows[row]
            full = len(window) >= self.block_size and self.context != "slide"
            window.append(token)
            (refilling if full else stepping).append((place, row, token))
        if not refilling:
            return self._step(stepping)
        # steps first: an engine may spoil the caches of rows that do not step
        parts = [self._step(stepping)] if stepping else []
        parts.append(self._refill([row for _, row, _ in refilling]))
        order = torch.tensor([place for place, _, _ in stepping + refilling], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]

    def _step(self, stepping: list[tuple[int, int, int]]) -> Tensor:
        _, rows, tokens = zip(*stepping, strict=True)
        return self.engine.step(rows, tokens, [len(self.windows[row]) - 1 for row in rows])

    def _refill(self, rows: list[int]) -> Tensor:
        crop = self.context == "crop"
        kept = self.block_size if crop else max(1, self.block_size // 2)
        for row in rows:
            del self.windows[row][:-kept]
        # a cropped context is computed anew for every token, so its cache would never be read
        return self.engine.fill(rows, [self.windows[row] for row in rows], keep=not crop)


def resolve_context(context: str, model: GPT) -> Literal["crop", "rechunk", "slide"]:
    """The rule that `auto` stands for; the others as they are.

    Raises:
        SamplingError: slide with learned positions, which have no table entry past block_size.
    """
    rope = model.config.position == "rope"
    if context == "slide" and not rope:
        raise SamplingError(
            "context='slide' needs RoPE, and this model's positions are a learned table of block_size "
            f"{model.config.block_size}: take 'crop' or 'rechunk'"
        )
    if context == "crop" or context == "rechunk" or context == "slide":
        return context  # type: ignore[return-value]
    return "slide" if rope else "crop"
