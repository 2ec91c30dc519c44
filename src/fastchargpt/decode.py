"""One token after another: the key/value cache, its rules past block_size, and the engine in plain torch.

Shapes in names: B sequences, T tokens, C channels (n_embd), P packed channels of q, k and v, H heads, D channels per
head, S slots of the cache, V vocabulary.

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
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastchargpt.cache import KVCache
from fastchargpt.errors import SamplingError
from fastchargpt.layers import ACTIVATIONS, NORM_EPS, Block, LayerNorm, rope_tables, rotate
from fastchargpt.model import GPT

__all__ = ["DecodeSession", "Engine", "TorchEngine", "resolve_context"]


class Engine(Protocol):
    """What computes logits. Rows are the sequences of a batch; each has its own place in the cache."""

    def fill(self, rows: Sequence[int], windows: Sequence[Sequence[int]], *, keep: bool = True) -> Tensor:
        """Start rows anew with these tokens, one forward for all: logits (len(rows), V) after each one's last.

        With keep=False the cache is left as it is.
        """

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append a token to each row at its position: logits (len(rows), V). Other rows' caches may be spoiled."""


class TorchEngine:
    """Decoding in torch operations, on any device and in any precision: the reference, and the fallback.

    A step is written out by hand over the model's weights: at one token, module calls cost more than arithmetic.
    """

    def __init__(self, model: GPT, batch_size: int, positions: int) -> None:
        """Allocate the cache for `batch_size` sequences and tables for `positions` positions."""
        config = model.config
        self.model, self.config = model, config
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = KVCache(config, batch_size, device=self.device, dtype=self.dtype)
        self.batch_size = batch_size
        self.rope: Tensor | None = None
        if config.position == "rope":
            self.rope = rope_tables(max(positions, config.block_size), config.head_dim, config.rope_base, self.device)
        self._rows = torch.arange(batch_size, device=self.device)
        self._slots = torch.arange(config.block_size, device=self.device)

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
        config, parts = self.config, self.model.transformer
        size = config.block_size
        seen = min(max(positions) + 1, size)
        at: Tensor | slice
        slot: Tensor | int
        rows: Tensor | slice
        mask = None
        if len(set(positions)) == 1:
            at, slot, rows = slice(positions[0], positions[0] + 1), positions[0] % size, slice(None)
        else:
            at = at_B = torch.tensor(positions, device=self.device)
            slot, rows = at_B % size, self._rows
            mask = (self._slots[:seen] <= at_B[:, None])[:, None, None]
        x_BC = parts.wte.weight[torch.tensor(tokens, device=self.device)]
        rope = None
        if self.rope is not None:
            rope = self.rope[:, at]
        elif parts.wpe is not None:
            x_BC = x_BC + parts.wpe.weight[at]
        heads, kv_heads = config.n_head, config.kv_heads
        for layer, block in enumerate(parts.h):
            assert isinstance(block, Block)
            qkv_BHD = F.linear(self._norm(x_BC, block.ln_1), block.attn.c_attn.weight, block.attn.c_attn.bias)
            qkv_BHD = qkv_BHD.view(len(tokens), heads + 2 * kv_heads, config.head_dim)
            if config.qk_norm or rope is not None:
                qk_BHD = qkv_BHD[:, : heads + kv_heads]
                if config.qk_norm:
                    qk_BHD = F.rms_norm(qk_BHD, (config.head_dim,), eps=NORM_EPS)
                if rope is not None:
                    # each sequence is a position of its own to `rotate`
                    qk_BHD = rotate(qk_BHD[None], rope)[0]
                q_BHD, k_BHD = qk_BHD[:, :heads], qk_BHD[:, heads:]
            else:
                q_BHD, k_BHD = qkv_BHD[:, :heads], qkv_BHD[:, heads : heads + kv_heads]
            k_BHSD, v_BHSD = self.cache.kv_L2BHSD[layer, 0], self.cache.kv_L2BHSD[layer, 1]
            k_BHSD[rows, :, slot] = k_BHD
            v_BHSD[rows, :, slot] = qkv_BHD[:, heads + kv_heads :]
            y_BHTD = F.scaled_dot_product_attention(
                q_BHD.unsqueeze(2),
                k_BHSD[:, :, :seen],
                v_BHSD[:, :, :seen],
                attn_mask=mask,
                enable_gqa=heads != kv_heads,
            )
            x_BC = x_BC + F.linear(y_BHTD.flatten(1), block.attn.c_proj.weight, block.attn.c_proj.bias)
            h_BC = F.linear(self._norm(x_BC, block.ln_2), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
            h_BC = ACTIVATIONS[config.activation](h_BC)
            x_BC = x_BC + F.linear(h_BC, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
        return self.model.logits(self._norm(x_BC, parts.ln_f))

    def _norm(self, x_BC: Tensor, norm: torch.nn.Module) -> Tensor:
        shape = (self.config.n_embd,)
        if isinstance(norm, LayerNorm):
            return F.layer_norm(x_BC, shape, norm.weight, norm.bias, NORM_EPS)
        return F.rms_norm(x_BC, shape, eps=NORM_EPS)


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
