"""The native engine: whole decoding steps in one call, for float32 models on a CPU."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastchargpt.cache import KVCache
from fastchargpt.decode import TorchEngine
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.kernels.cpu_decode import ACTIVATIONS, NativeCache, NativeModel, library
from fastchargpt.layers import Block
from fastchargpt.model import GPT
from fastchargpt.sampling import SamplingConfig

__all__ = ["AHEAD", "NativeEngine", "native_problem"]

# Tokens drafted before each pass of the fp32 weights. Of the 9 that a pass can give, 8.7 came out on tiny shakespeare
# (a 4 x 128 model, temperature 0.8): the drafts are almost never refused, so more would only lengthen the waits.
AHEAD = 8
# Threads meet five times a layer, which costs more than it gains where each has less than this to read.
BYTES_PER_THREAD = 2**20


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


class NativeEngine(TorchEngine):
    """Decoding by kernels/cpu_decode.cpp; prompts are still read by the model itself, in one forward.

    Args:
        model: a float32 model on the CPU.
        batch_size: sequences.
        positions: tokens that a sequence may reach.
        int8: use int8 weights, one scale per output, for every step.
        draft: keep int8 weights beside the fp32 ones, to draft with.
    """

    def __init__(self, model: GPT, batch_size: int, positions: int, *, int8: bool = False, draft: bool = False) -> None:
        super().__init__(model, batch_size, positions)
        config = model.config
        self.int8, self.draft = int8, draft
        if config.position == "rope":
            # room for the drafted tokens, so that they do not overwrite what the window still holds
            self.cache = KVCache(config, batch_size, capacity=config.block_size + AHEAD)
        self._limit = config.block_size if self.rope is None else self.rope.shape[1]
        self.native = _packed(model, wide=not int8, narrow=int8 or draft)
        self.memory = NativeCache(self.cache.kv_L2BHSD, self.rope)
        self._tokens, self._rows_in, self._positions = np.zeros((3, batch_size), np.int32)
        self._logits = torch.empty(batch_size, config.vocab_size)

    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See `Engine`. The result is overwritten by the next step."""
        count = len(rows)
        assert max(positions) < self._limit, "native code reads its tables unchecked"
        self._tokens[:count], self._rows_in[:count], self._positions[:count] = tokens, rows, positions
        self.native.step(
            self.memory,
            self._tokens[:count],
            self._rows_in[:count],
            self._positions[:count],
            self._logits,
            int8=self.int8,
        )
        return self._logits[:count]

    def draw(self, logits: Tensor, vocab_size: int, config: SamplingConfig, u: Tensor) -> list[int]:
        """Draw from what `step` returned; for knobs that `can_draw` allows."""
        return self.native.draw(logits, vocab_size, config.temperature, config.top_k or 0, u.contiguous().numpy())

    def speculate(
        self, row: int, position: int, token: int, vocab_size: int, config: SamplingConfig, u: Tensor
    ) -> list[int]:
        """Append a token and draw 1 to len(u) more, the same that as many steps and draws would have given."""
        return self.native.speculate(
            self.memory,
            row=row,
            position=position,
            token=token,
            vocab_size=vocab_size,
            temperature=config.temperature,
            top_k=config.top_k or 0,
            u=u.contiguous().numpy(),
        )


# model -> what its weights were, whether fp32 and int8 were packed, and the packed copy
_cache: "weakref.WeakKeyDictionary[GPT, tuple[object, tuple[bool, bool], NativeModel]]" = weakref.WeakKeyDictionary()


def _packed(model: GPT, *, wide: bool, narrow: bool) -> NativeModel:
    """The packed weights, packed anew only where the weights changed."""
    config = model.config
    threads = max(1, min(torch.get_num_threads(), 4 * model.get_num_params() // BYTES_PER_THREAD))
    state = tuple((p.data_ptr(), p._version) for p in model.parameters())
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
