"""The native engine: whole decoding steps in one call, for float32 models on a CPU."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastchargpt.errors import BackendUnavailableError
from fastchargpt.kernels.cpu_decode import ACTIVATIONS, NativeCache, NativeModel, library
from fastchargpt.layers import Block, rope_tables
from fastchargpt.model import GPT
from fastchargpt.sampling import SamplingConfig

__all__ = ["AHEAD", "NativeEngine", "native_problem"]

# Tokens drafted before each pass of the fp32 weights. Of the 9 that a pass can give, 8.6 came out on tiny shakespeare
# (6 x 384, temperature 0.8): the drafts are almost never refused, so more would only lengthen the waits.
AHEAD = 8
# Threads meet five times a layer, which costs more than it gains where each has less than this to read.
BYTES_PER_THREAD = 2**20
# Tokens of prompts read in one call: enough to fill the multipliers, few enough for the activations to stay in cache.
MOST_TOKENS = 256
# Tokens drawn in one call, so that Python's share is small; fewer where reading the weights so often would take long
# enough to be noticed in a stream of text.
AT_ONCE = 16
CALL_BYTES = 2**29


def native_problem(model: GPT) -> str | None:
    """Why this model cannot be decoded natively here; None where it can. Builds the library if need be."""
    weight = model.lm_head.weight
    if weight.device.type != "cpu":
        return f"the native decoder is for CPUs, and the model is on {weight.device}"
    if weight.dtype != torch.float32:
        return f"the native decoder is for float32, and the model is {str(weight.dtype).removeprefix('torch.')}"
    if model.config.activation not in ACTIVATIONS:
        return f"the native decoder has no {model.config.activation}"
    try:
        library()
    except BackendUnavailableError as error:
        return str(error)
    return None


class NativeEngine:
    """Decoding by kernels/cpu_decode.cpp: prompts in one forward, then a token, or several, in one call.

    Args:
        model: a float32 model on the CPU.
        batch_size: sequences.
        positions: tokens that a sequence may reach.
        int8: use int8 weights, one scale per output, throughout.
        draft: keep int8 weights beside the fp32 ones, to draft with.
    """

    def __init__(self, model: GPT, batch_size: int, positions: int, *, int8: bool = False, draft: bool = False) -> None:
        config = model.config
        self.int8, self.draft = int8, draft
        rope, self._limit = None, config.block_size
        if config.position == "rope":
            self._limit = max(positions, config.block_size)
            rope = rope_tables(self._limit, config.head_dim, config.rope_base)
        # room for the drafted tokens, so that they do not overwrite what the window still holds
        self.memory = NativeCache(
            config.n_layer, batch_size, config.kv_heads, config.head_dim, config.block_size, AHEAD, rope
        )
        self.native = _packed(model, wide=not int8, narrow=int8 or draft)
        self.vocab_size = config.vocab_size
        # tokens of one call while reading prompts
        self._most = max(config.block_size, MOST_TOKENS)
        # tokens drawn in one call, for one row
        self._at_once = max(1, min(AT_ONCE, CALL_BYTES // (4 * model.get_num_params())))
        self._tokens, self._rows_in, self._positions = np.zeros((3, batch_size), np.int32)
        self._logits = torch.empty(batch_size, config.vocab_size)

    def fill(self, rows: Sequence[int], windows: Sequence[Sequence[int]], *, keep: bool = True) -> Tensor:
        """See `Engine`. With keep=False the rows' caches are spoiled: nobody reads them then."""
        logits = torch.empty(len(rows), self.vocab_size)
        first = 0
        while first < len(rows):
            end, total = first + 1, len(windows[first])
            while end < len(rows) and total + len(windows[end]) <= self._most:
                total += len(windows[end])
                end += 1
            # the prompts' last tokens stand at the end, where logits are computed
            entries = [
                (token, row, position)
                for row, window in zip(rows[first:end], windows[first:end], strict=True)
                for position, token in enumerate(window[:-1])
            ]
            entries += [
                (window[-1], row, len(window) - 1)
                for row, window in zip(rows[first:end], windows[first:end], strict=True)
            ]
            tokens, at, positions = np.array(entries, np.int32).T.copy()
            self.native.step(self.memory, tokens, at, positions, logits[first:end], int8=self.int8)
            first = end
        return logits

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See `Engine`. The result is overwritten by the next step."""
        count = self._place(rows, tokens, positions, 1)
        self.native.step(
            self.memory,
            self._tokens[:count],
            self._rows_in[:count],
            self._positions[:count],
            self._logits[:count],
            int8=self.int8,
        )
        return self._logits[:count]

    def draw(self, logits: Tensor, vocab_size: int, config: SamplingConfig, u: Tensor) -> list[int]:
        """Draw from what `step` returned; for knobs that `can_draw` allows."""
        return self.native.draw(logits, vocab_size, config.temperature, config.top_k or 0, u.contiguous().numpy())

    @property
    def at_once(self) -> int:
        """How many tokens of a row `decode` should draw in one call."""
        return AHEAD + 1 if self.draft else self._at_once

    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        vocab_size: int,
        config: SamplingConfig,
        u: Tensor,
    ) -> list[list[int]]:
        """Append a token to each row and draw up to N more by u (rows, N): the rows' tokens, step by step.

        They are the same that as many calls of `step` and `draw` would have given.
        """
        count, uniforms = self._place(rows, tokens, positions, u.shape[1]), u.contiguous().numpy()
        temperature, top_k = config.temperature, config.top_k or 0
        if self.draft:
            assert count == 1, "drafts are for one row"
            drawn = self.native.speculate(
                self.memory,
                row=rows[0],
                position=positions[0],
                token=tokens[0],
                vocab_size=vocab_size,
                temperature=temperature,
                top_k=top_k,
                u=uniforms[0],
            )
            return [[token] for token in drawn]
        return self.native.decode(
            self.memory,
            self._tokens[:count],
            self._rows_in[:count],
            self._positions[:count],
            vocab_size=vocab_size,
            temperature=temperature,
            top_k=top_k,
            u=uniforms,
            int8=self.int8,
        )

    def _place(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], steps: int) -> int:
        count = len(rows)
        assert max(positions) + steps <= self._limit, "native code reads its tables unchecked"
        self._tokens[:count], self._rows_in[:count], self._positions[:count] = tokens, rows, positions
        return count


# model -> what its weights were, whether fp32 and int8 were packed, and the packed copy
_cache: "weakref.WeakKeyDictionary[GPT, tuple[object, tuple[bool, bool], NativeModel]]" = weakref.WeakKeyDictionary()


def _packed(model: GPT, *, wide: bool, narrow: bool) -> NativeModel:
    """The packed weights, packed anew only where the weights changed."""
    config = model.config
    threads = max(1, min(torch.get_num_threads(), 4 * model.get_num_params() // BYTES_PER_THREAD))
    # tensors made in inference mode do not count their changes: a new object equals no other
    state = tuple(object() if p.is_inference() else (p.data_ptr(), p._version) for p in model.parameters())
    found = _cache.get(model)
    if found is not None:
        before, (had_wide, had_narrow), packed = found
        if before == (threads, config, state):
            if had_wide >= wide and had_narrow >= narrow:
                return packed
            wide, narrow = wide or had_wide, narrow or had_narrow
    ints = [
        config.n_layer,
        config.n_embd,
        config.n_head,
        config.kv_heads,
        config.head_dim,
        config.block_size,
        config.vocab_size,
        config.norm == "rmsnorm",
        ACTIVATIONS[config.activation],
        config.qk_norm,
        config.position == "rope",
        threads,
        wide,
        narrow,
    ]
    parts = model.transformer
    weights = [parts.wte.weight, None if parts.wpe is None else parts.wpe.weight]
    for block in parts.h:
        assert isinstance(block, Block)
        for module in (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj):
            weights += [getattr(module, "weight", None), getattr(module, "bias", None)]
    for module in (parts.ln_f, model.lm_head):
        weights += [getattr(module, "weight", None), getattr(module, "bias", None)]
    packed = NativeModel([int(value) for value in ints], config.logit_softcap or 0.0, weights)
    _cache[model] = ((threads, config, state), (wide, narrow), packed)
    return packed
