"""The graph engine: one launch for each token on a CUDA device, and no wait between launches.

A token of a small model costs a GPU a tenth of a millisecond and the host, which launches its hundred kernels one by
one, more than ten times that. So all of it is recorded once as a CUDA graph: embedding, layers, logits, the draw of the
next token, and the step onward. A replay feeds itself, and the tokens are read back some dozens at a time.

What a graph works on stays where it is: the `_Desk`. It is kept for the next call with the same model, which then has
its graphs at once. What is recorded are torch's operations or, where that is asked for, fewer of Triton kernels
(fused_step.py), which take seconds to compile. B sequences, V vocabulary, N tokens of one call.
"""

import atexit
import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastchargpt.captured import CudaGraphs, Graphs
from fastchargpt.decode import DecodeMemory, TorchEngine
from fastchargpt.decode_step import decode_step, place_at
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.fused_step import fused_draw, fused_step
from fastchargpt.layers import CausalSelfAttention
from fastchargpt.model import GPT
from fastchargpt.sampling import Sampler, SamplingConfig

__all__ = ["GraphEngine", "graph_problem"]

# Steps taken one operation at a time before each capture, for what is made once (cuBLAS workspaces, kernels that load
# when first called). They are steps of the text like any other.
WARM_UP_STEPS = 1
# A graph looks at a fixed number of slots of the cache: the power of two that holds all that was seen, from here on.
LEAST_SEEN = 128
# Tokens drawn in one call; fewer where a pass over the weights takes so long that a stream of text would falter (this
# many bytes are some 30 ms of an H100's memory).
AT_ONCE = 64
CALL_BYTES = 10**11
# A desk is kept for the next call where its cache is no larger, so that idle memory does not stand in training's way.
KEPT_BYTES = 2**28
# Other knobs and longer texts are other graphs; beyond so many they are made anew.
MAX_GRAPHS = 16
# the backends that take a mask, without cuDNN's, which would plan anew for every shape
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def graph_problem(model: GPT) -> str | None:
    """Why this model cannot be decoded by CUDA graphs here; None where it can."""
    device = model.lm_head.weight.device
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the model is on {device}"
    if torch.is_autocast_enabled("cuda"):
        return "CUDA graphs hold no autocast, which is on: give the model the dtype instead, as model.bfloat16() does"
    return None


class _Desk:
    """The tensors that the graphs of one model and batch read and write, and the graphs."""

    def __init__(self, model: GPT, batch_size: int, reach: int, graphs: Graphs) -> None:
        self.memory = DecodeMemory.allocate(model, batch_size, reach)
        weight = model.lm_head.weight
        device = weight.device
        # the token that is to be appended to each sequence; its position; steps taken since the last read-back, the
        # same number for every sequence, so that a kernel's programs need not wait for each other
        self.state = torch.zeros(3 * batch_size, dtype=torch.int64, device=device)
        self.tokens_B, self.positions_B, self.done_B = self.state.view(3, batch_size)
        self.moving = self.state[batch_size:]
        self.uniforms_NB = torch.zeros(AT_ONCE, batch_size, dtype=torch.float64, device=device)
        self.drawn_NB = torch.zeros(AT_ONCE, batch_size, dtype=torch.int64, device=device)
        self.logits_BV = torch.zeros(batch_size, len(weight), dtype=weight.dtype, device=device)
        self.graphs = graphs
        self.problem: str | None = None
        # what makes a graph another one -> steps taken before its capture, or its replay
        self.recordings: dict[Hashable, int | Callable[[], None]] = {}
        self._whole: Tensor | None = None

    def whole_contexts(self, block_size: int) -> Tensor:
        """Room for a whole context of each sequence, (B, T) int64; made when first asked for."""
        if self._whole is None:
            self._whole = torch.zeros(len(self.tokens_B), block_size, dtype=torch.int64, device=self.state.device)
        return self._whole


class GraphEngine(TorchEngine):
    """Decoding by CUDA graphs: prompts as `TorchEngine` does, then one launch a token, past the context too.

    Args:
        model: a model on a CUDA device.
        batch_size: sequences.
        positions: tokens that a sequence may reach.
        graphs: what records; the device's own unless given.
        strict: refuse to go on without a graph.
        fused: record Triton kernels; the model must have no `fused_problem`.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        positions: int,
        *,
        graphs: Graphs | None = None,
        strict: bool = False,
        fused: bool = False,
    ) -> None:
        reach = model.config.block_size
        if model.config.position == "rope":
            reach = max(reach, 1 << (positions - 1).bit_length())  # few different ones, so that desks can be kept
        self._desk = _take_desk(self, model, batch_size, reach, graphs)
        super().__init__(model, batch_size, reach, self._desk.memory)
        self.fused = fused
        self._strict, self._pinned = strict, self.device.type == "cuda"
        self._samplers: dict[Hashable, Sampler] = {}
        self._at_once = max(1, min(AT_ONCE, CALL_BYTES // (self.dtype.itemsize * model.get_num_params())))

    @property
    def problem(self) -> str | None:
        """Why steps are no longer captured, one clause; None while they are."""
        return self._desk.problem

    @property
    def at_once(self) -> int:
        """How many tokens of a row `decode` should draw in one call, and the most that it can."""
        return self._at_once

    @torch.inference_mode()
    def fill(self, rows: Sequence[int], windows: Sequence[Sequence[int]], *, keep: bool = True) -> Tensor:
        """See `Engine`. Whole contexts that are not kept, as a cropped one moves on, are a graph too."""
        if keep or any(len(window) < self.config.block_size for window in windows):
            return super().fill(rows, windows, keep=keep)
        whole_BT = self._desk.whole_contexts(self.config.block_size)
        there = torch.tensor(list(windows), pin_memory=self._pinned).to(self.device, non_blocking=True)
        if self._all(rows):
            whole_BT.copy_(there)
        else:
            whole_BT.index_copy_(0, self._on_device(rows), there)
        # the one graph that goes through the modules, where others' calls choose the attention
        backends = tuple(part.backend for part in self.model.modules() if isinstance(part, CausalSelfAttention))
        self._take(("whole", backends), self._whole_step)
        logits_BV = self._desk.logits_BV
        return logits_BV if self._all(rows) else logits_BV.index_select(0, self._on_device(rows))

    @torch.inference_mode()
    def step(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """See `Engine`. The result is overwritten by the next step."""
        self._place(rows, tokens, positions)
        seen = self._seen(max(positions))
        self._take((self.fused, seen), functools.partial(self._logits_step, seen))
        logits_BV = self._desk.logits_BV
        return logits_BV if self._all(rows) else logits_BV.index_select(0, self._on_device(rows))

    @torch.inference_mode()
    def draw(self, logits: Tensor, vocab_size: int, config: SamplingConfig, u: Tensor) -> list[int]:
        """See `DrawingEngine`."""
        drawn: list[int] = self._sampler(vocab_size, config).choose(logits[:, :vocab_size], u).tolist()
        return drawn

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        positions: Sequence[int],
        vocab_size: int,
        config: SamplingConfig,
        u: Tensor,
    ) -> list[list[int]]:
        """See `DrawingEngine`."""
        count, last = u.shape[1], max(positions)
        self._place(rows, tokens, positions)
        everybody = self._all(rows)
        if everybody:
            self._desk.uniforms_NB[:count] = u.T
        else:
            self._desk.uniforms_NB[:count].index_copy_(1, self._on_device(rows), u.T)
        sampler = self._sampler(vocab_size, config)
        for step in range(count):
            seen = self._seen(last + step)
            key = (self.fused, seen, vocab_size, config.temperature, config.top_k)
            self._take(key, functools.partial(self._draw_step, seen, vocab_size, sampler))
        drawn = self._read_back(count)
        return drawn if everybody else [[step[row] for row in rows] for step in drawn]

    def _read_back(self, count: int) -> list[list[int]]:
        """The one place that waits for the device."""
        drawn: list[list[int]] = self._desk.drawn_NB[:count].tolist()
        return drawn

    def _place(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Set the rows up; those not named get token 0 at position 0."""
        batch_size = self.batch_size
        state = [0] * (3 * batch_size)
        for row, token, position in zip(rows, tokens, positions, strict=True):
            state[row], state[batch_size + row] = token, position
        self._desk.state.copy_(torch.tensor(state, pin_memory=self._pinned), non_blocking=True)

    def _all(self, rows: Sequence[int]) -> bool:
        return list(rows) == list(range(self.batch_size))

    def _on_device(self, values: Sequence[int]) -> Tensor:
        # from pinned memory nobody waits for the copy; torch keeps that memory until it is done
        return torch.tensor(list(values), pin_memory=self._pinned).to(self.device, non_blocking=True)

    def _seen(self, position: int) -> int:
        """How many slots the graph looks at that serves this position; 0 where it looks up how many."""
        if self.fused:
            return 0
        size = self.config.block_size
        return min(size, max(LEAST_SEEN, 1 << min(position, size - 1).bit_length()))

    def _sampler(self, vocab_size: int, config: SamplingConfig) -> Sampler:
        key = (vocab_size, config.temperature, config.top_k)
        if key not in self._samplers:
            self._samplers[key] = Sampler(config, vocab_size, range(self.batch_size), device=self.device)
        return self._samplers[key]

    def _take(self, key: Hashable, body: Callable[[], None]) -> None:
        """Take a step: replay its graph, or record it first, after a step or two as they are."""
        recordings, graphs = self._desk.recordings, self._desk.graphs
        found = recordings.get(key, 0)
        if self.problem is None and found == WARM_UP_STEPS:
            try:
                recordings[key] = found = graphs.capture(body)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
        if callable(found):
            found()
        elif self.problem is not None:
            body()
        else:
            if len(recordings) == MAX_GRAPHS:
                recordings.clear()
            recordings[key] = found + 1
            graphs.warm_up(body)

    def _give_up(self, problem: str) -> None:
        self._desk.problem = problem
        self._desk.recordings.clear()
        says = f"a decoding step cannot be captured as a CUDA graph: {problem}"
        if self._strict:
            raise BackendUnavailableError(f"{says}: take engine='torch'")
        warnings.warn(f"{says}; decoding goes on without, which is slower", RuntimeWarning, stacklevel=2)

    def _compute(self, seen: int) -> Tensor:
        desk, kv_L2BHSD, rope = self._desk, self.memory.cache.kv_L2BHSD, self.memory.rope
        if self.fused:
            return fused_step(self.model, kv_L2BHSD, rope, desk.tokens_B, desk.positions_B)
        place = place_at(desk.positions_B, self.memory.rows, self.memory.slots, seen, self.dtype)
        with self._attention():
            return decode_step(self.model, kv_L2BHSD, rope, desk.tokens_B, place)

    def _attention(self) -> AbstractContextManager[None]:
        return sdpa_kernel(MASKED) if self.device.type == "cuda" else contextlib.nullcontext()

    def _whole_step(self) -> None:
        whole_BT = self._desk.whole_contexts(self.config.block_size)
        self._desk.logits_BV.copy_(self.model.logits(self.model.hidden(whole_BT)[:, -1]))

    def _logits_step(self, seen: int) -> None:
        self._desk.logits_BV.copy_(self._compute(seen))

    def _draw_step(self, seen: int, vocab_size: int, sampler: Sampler) -> None:
        desk, logits_BV = self._desk, self._compute(seen)
        state = (desk.uniforms_NB, desk.drawn_NB, desk.tokens_B, desk.positions_B, desk.done_B)
        if self.fused and fused_draw(logits_BV, *state, vocab_size=vocab_size, config=sampler.config):
            return
        done = desk.done_B[:1]
        u_B = None if sampler.greedy else desk.uniforms_NB.index_select(0, done)[0]
        drawn_B = sampler.choose(logits_BV[:, :vocab_size], u_B)
        desk.drawn_NB.index_copy_(0, done, drawn_B[None])
        # a token that is none, of logits that are not finite, would be read from beyond the embedding's table
        torch.clamp(drawn_B, max=vocab_size - 1, out=desk.tokens_B)
        desk.moving.add_(1)


# model -> what its desk is for, and the desk, while nobody is using it
_idle: "weakref.WeakKeyDictionary[GPT, tuple[Hashable, _Desk]]" = weakref.WeakKeyDictionary()


@torch.inference_mode()
def _take_desk(engine: GraphEngine, model: GPT, batch_size: int, reach: int, graphs: Graphs | None) -> _Desk:
    """A desk for as long as the engine lives: the one kept of the model where it fits, else a new one."""
    weight = model.lm_head.weight
    # all that a graph knows of a model: where its weights lie, and how products are computed
    key = (
        *(batch_size, reach, model.config, weight.device, weight.dtype),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        *(parameter.data_ptr() for parameter in model.parameters()),
    )
    before, desk = _idle.pop(model, (None, None))
    if desk is not None and before == key and graphs is None:
        # what it holds of another text is not looked at, but times 0 what is not finite is not 0
        desk.memory.cache.kv_L2BHSD.zero_()
    else:
        desk = _Desk(model, batch_size, reach, graphs or CudaGraphs(weight.device))
    if desk.memory.cache.kv_L2BHSD.nbytes <= KEPT_BYTES:
        weakref.finalize(engine, _keep_desk, weakref.ref(model), key, desk).atexit = False
    return desk


@functools.cache
def _clear_at_exit() -> None:
    """Graphs are to go before the device's driver does."""
    atexit.register(_idle.clear)


def _keep_desk(model: "weakref.ref[GPT]", key: Hashable, desk: _Desk) -> None:
    owner = model()
    if owner is not None and desk.problem is None:
        _clear_at_exit()
        _idle[owner] = (key, desk)
