"""Which engine decodes: `auto` takes the one made for the device and says once why where that does not serve."""

import warnings
from dataclasses import dataclass
from typing import Literal

from fastchargpt.decode import DrawingEngine, Engine, TorchEngine
from fastchargpt.errors import BackendUnavailableError, SamplingError
from fastchargpt.fused_step import fused_problem
from fastchargpt.graph_engine import GraphEngine, graph_problem
from fastchargpt.model import GPT
from fastchargpt.native import NativeEngine, native_problem
from fastchargpt.sampling import SamplingConfig

__all__ = ["EngineConfig", "can_draw", "drawing_engine", "make_engine"]

# Drafting pays where a pass over the fp32 weights takes much longer than one over their int8 copy: at 4 x 128 (3 MB) it
# gained nothing, at 6 x 384 (43 MB) it was 1.9 times as fast.
DRAFT_BYTES = 16 * 2**20
# packing int8 weights takes as long as this many tokens
DRAFT_TOKENS = 32
# fewer tokens than these do not earn the capture of a graph, which takes about as long as two steps without one
GRAPH_TOKENS = 8
# Fused kernels took 3.0 s to compile when a shape was first met, and then saved 0.15 ms a step (4 x 128, on an H200):
# so many steps earn it back.
FUSED_TOKENS = 20_000

_said: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How tokens are computed; nothing here but `weights=int8` changes what is computed.

    Raises:
        SamplingError: a value is not one of its choices, or two contradict each other.
    """

    # native: one C++ call per token, for float32 models on a CPU; graph: one CUDA graph per token, on a GPU; torch:
    # everywhere; auto: native or graph where it serves
    engine: Literal["auto", "native", "graph", "torch"] = "auto"
    # int8 decodes with rounded weights: faster, at a loss (under 0.001 bits per character for models of 4 x 128 and of
    # 6 x 384 trained on tiny shakespeare)
    weights: Literal["model", "int8"] = "model"
    # draft tokens with int8 weights and let the fp32 weights judge several at once; the text is the same either way
    speculate: Literal["auto", "on", "off"] = "auto"
    # let the graph engine launch Triton kernels instead of torch's operations: fewer, but they take seconds to compile
    # when first used on a machine; auto: for 20,000 tokens or more
    fuse: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("engine", ("auto", "native", "graph", "torch")),
            ("weights", ("model", "int8")),
            ("speculate", ("auto", "on", "off")),
            ("fuse", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in choices:
                raise SamplingError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.weights == "int8" and self.speculate == "on":
            raise SamplingError("speculate='on' drafts for the model's own weights: drop it or weights='int8'")
        if self.fuse == "on" and (
            self.engine in ("native", "torch") or self.weights == "int8" or self.speculate == "on"
        ):
            raise SamplingError("fuse='on' is for the graph engine: drop it or what asks for another engine")
        if self.engine in ("graph", "torch") and (self.weights == "int8" or self.speculate == "on"):
            name = "weights='int8'" if self.weights == "int8" else "speculate='on'"
            raise SamplingError(f"{name} needs the native engine: drop it or engine={self.engine!r}")


def can_draw(config: SamplingConfig) -> bool:
    """Whether an engine that draws has all the knobs that are on: temperature and top_k."""
    return (
        config.top_p in (None, 1)
        and config.min_p in (None, 0)
        and config.typical_p in (None, 1)
        and config.repetition_penalty == 1
        and config.presence_penalty == config.frequency_penalty == 0
        and not config.banned
        and not config.logit_bias
        and config.logprobs is None
    )


def make_engine(model: GPT, config: EngineConfig, sampling: SamplingConfig, batch_size: int, positions: int) -> Engine:
    """The engine for `batch_size` sequences that reach `positions` tokens.

    Raises:
        BackendUnavailableError: the native engine or the graph engine was asked for and cannot serve; with the reason.
        SamplingError: speculate="on" with more than one sequence, or knobs that it cannot judge.
    """
    explicit = config.engine == "native" or config.weights == "int8" or config.speculate == "on"
    cuda = model.lm_head.weight.device.type == "cuda"
    if config.engine == "torch":
        return TorchEngine(model, batch_size, positions)
    if config.engine == "graph" or config.fuse == "on" or (cuda and not explicit):
        return _on_cuda(model, config, sampling, batch_size, positions)
    if (problem := native_problem(model)) is not None:
        if explicit:
            raise BackendUnavailableError(f"{problem}: take engine='torch'")
        if model.lm_head.weight.device.type == "cpu":
            _say_slower(problem)
        return TorchEngine(model, batch_size, positions)
    return NativeEngine(
        model, batch_size, positions, int8=config.weights == "int8", draft=_drafts(model, config, sampling, batch_size)
    )


def drawing_engine(engine: Engine, config: SamplingConfig) -> DrawingEngine | None:
    """The engine, where it can draw for these knobs by itself."""
    return engine if isinstance(engine, (NativeEngine, GraphEngine)) and can_draw(config) else None


def _on_cuda(model: GPT, config: EngineConfig, sampling: SamplingConfig, batch_size: int, positions: int) -> Engine:
    explicit = config.engine == "graph" or config.fuse == "on"
    if (problem := graph_problem(model)) is not None:
        if explicit:
            out = "leave out fuse='on'" if config.fuse == "on" else "take engine='torch'"
            raise BackendUnavailableError(f"{problem}: {out}")
        _say_slower(problem)
    elif explicit or sampling.max_new_tokens >= GRAPH_TOKENS:
        fused = config.fuse == "on" or (config.fuse == "auto" and sampling.max_new_tokens >= FUSED_TOKENS)
        if fused and (problem := fused_problem(model)) is not None:
            if config.fuse == "on":
                raise BackendUnavailableError(f"fuse='on' cannot be had: {problem}: take fuse='off'")
            fused = False
        return GraphEngine(model, batch_size, positions, strict=explicit, fused=fused)
    return TorchEngine(model, batch_size, positions)


def _say_slower(problem: str) -> None:
    if problem not in _said:
        _said.add(problem)
        warnings.warn(f"{problem}; decoding in torch, which is slower", RuntimeWarning, stacklevel=3)


def _drafts(model: GPT, config: EngineConfig, sampling: SamplingConfig, batch_size: int) -> bool:
    if config.speculate == "on":
        if batch_size > 1 or not can_draw(sampling):
            why = f"{batch_size} sequences" if batch_size > 1 else "knobs beyond temperature and top_k"
            raise SamplingError(f"speculate='on' serves one sequence with temperature and top_k, and there are {why}")
        return True
    size = 4 * model.get_num_params()
    worth = size >= DRAFT_BYTES and sampling.max_new_tokens >= DRAFT_TOKENS
    return config.speculate == "auto" and config.weights == "model" and batch_size == 1 and worth and can_draw(sampling)
