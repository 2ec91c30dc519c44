"""How a step is computed: by torch or natively, compiled or not, as one CUDA graph or not; each with its reason."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.model import GPT
from fastchargpt.native_step import native_step_problem
from fastchargpt.precision import Precision, choose_precision
from fastchargpt.sharding import is_sharded

__all__ = [
    "CompileChoice",
    "EngineChoice",
    "GraphChoice",
    "choose_compile",
    "choose_engine",
    "choose_graph",
    "choose_training_precision",
    "graph_problem",
]

# A micro-batch of more operations than this keeps a GPU busy while the host launches the next kernels, and a graph
# would gain nothing for the memory that it holds. An estimate, from some hundred launches of 5 us and a GPU of 500
# TFLOP/s.
SMALL_STEP_FLOPS = 4e12


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """Whether the step is compiled, and why."""

    on: bool
    # one clause, for the log
    reason: str
    # whether the run itself decides, once its steps have been timed (`compiling.AutoCompile`)
    pending: bool = False

    def __str__(self) -> str:
        """The line of a log."""
        return f"compile {'auto' if self.pending else 'on' if self.on else 'off'}: {self.reason}"


def choose_compile(
    mode: Literal["auto", "on", "off"],
    device: torch.device,
    *,
    native: bool = False,
    deterministic: bool = False,
    sharded: bool = False,
) -> CompileChoice:
    """Whether to compile a step.

    Args:
        mode: on and off are served; auto leaves it to the run, which times its steps first, where that could help.
        device: where the step runs.
        native: whether native code takes the step unless it is compiled.
        deterministic: whether each run must give the same bits, which a decision by the clock would not.
        sharded: whether the model's weights lie in pieces on several processes.

    Raises:
        BackendUnavailableError: compilation was asked for by name and cannot be had; with the reason.
        ConfigError: the mode is none of auto, on and off.
    """
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"compile must be auto, on or off, not {mode!r}")
    if mode == "off":
        return CompileChoice(on=False, reason="asked for")
    if sharded:
        reason = "fsdp gathers each block's weights in hooks, which the compiler cannot see into"
        if mode == "on":
            raise BackendUnavailableError(f"compile=on cannot be served: {reason}; use --compile=off or --parallel=ddp")
        return CompileChoice(on=False, reason=reason)
    missing = _missing_compiler(device)
    if mode == "on":
        if missing:
            raise BackendUnavailableError(f"compile=on cannot be served: {missing}; install it or use --compile=off")
        return CompileChoice(on=True, reason="asked for")
    if native:
        return CompileChoice(
            on=False,
            reason="the native step takes 0.63 of a compiled one's time (two AVX-512 cores, at the CPU demo's shape)",
        )
    if missing:
        return CompileChoice(on=False, reason=missing)
    if deterministic:
        return CompileChoice(on=False, reason="deterministic=True leaves nothing to what the clock says")
    return CompileChoice(
        on=False, pending=True, reason="decided once some steps have been timed, by whether the rest earns it back"
    )


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Whether native code takes the step, and why."""

    native: bool
    # one clause, for the log
    reason: str


def choose_engine(
    engine: Literal["auto", "native", "torch"], model: nn.Module, precision: Precision, *, compile: bool
) -> EngineChoice:
    """Whether the step of a model is taken by the native code of `native_step`.

    Raises:
        BackendUnavailableError: it was asked for by name and cannot serve; with the reason.
        ConfigError: the engine is none of auto, native and torch.
    """
    if engine not in ("auto", "native", "torch"):
        raise ConfigError(f"engine must be auto, native or torch, not {engine!r}")
    if engine == "torch":
        return EngineChoice(native=False, reason="asked for")
    if compile:
        problem: str | None = "the step is compiled by torch"
    elif precision.name not in ("fp32", "tf32"):
        problem = f"the native step is for float32, and the precision is {precision.name}"
    elif any(map(is_sharded, model.parameters())):
        problem = "the native step needs whole weights, and fsdp keeps a piece of each on a process"
    else:
        problem = _native_problem(model)
    if problem is None:
        return EngineChoice(native=True, reason="one call for loss and gradients, one for the update")
    if engine == "native":
        raise BackendUnavailableError(f"engine=native cannot be served: {problem}; use --engine=torch")
    return EngineChoice(native=False, reason=problem)


def choose_training_precision(name: str, model: nn.Module, engine: str, *, compile: bool) -> Precision:
    """The precision of a step of this model; on a CPU `auto` depends on who takes it.

    Raises:
        BackendUnavailableError: the device cannot do what was asked for by name.
    """
    device = next(model.parameters()).device
    if not isinstance(model, GPT):
        return choose_precision(name, device)
    by_torch = compile or engine == "torch" or _native_problem(model) is not None
    return choose_precision(name, device, torch_width=model.config.n_embd if by_torch else None)


@dataclass(frozen=True, kw_only=True)
class GraphChoice:
    """Whether the whole step is one CUDA graph, and why."""

    on: bool
    # one clause, for the log
    reason: str


def choose_graph(
    mode: Literal["auto", "on", "off"],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    tokens: int,
    deterministic: bool = False,
) -> GraphChoice:
    """Whether to capture the step in a CUDA graph.

    Args:
        tokens: those of a micro-batch.
        deterministic: whether bit-equal runs were asked for, of which nobody has shown that a graph keeps them.

    Raises:
        BackendUnavailableError: it was asked for by name and cannot serve; with the reason.
        ConfigError: the mode is none of auto, on and off.
    """
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"cuda_graph must be auto, on or off, not {mode!r}")
    if mode == "off":
        return GraphChoice(on=False, reason="asked for")
    problem = graph_problem(model, optimizer, precision)
    if problem is None and deterministic:
        problem = "deterministic=True takes its steps one operation at a time"
    if mode == "on":
        if problem is not None:
            raise BackendUnavailableError(f"cuda_graph=on cannot be served: {problem}; use --cuda-graph=off")
        return GraphChoice(on=True, reason="asked for")
    if problem is None and type(model) is not GPT:
        problem = f"nothing is known of a {type(model).__name__}: cuda_graph=on tries it"
    if problem is not None:
        return GraphChoice(on=False, reason=problem)
    assert isinstance(model, GPT)
    flops = model.flops_per_token() * tokens
    size = f"{flops / 1e12:.2g} TFLOP in a micro-batch"
    if flops > SMALL_STEP_FLOPS:
        return GraphChoice(on=False, reason=f"{size} keep a GPU busy by themselves")
    return GraphChoice(on=True, reason=f"with {size} its launches would take much of a step")


def graph_problem(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision) -> str | None:
    """Why a step cannot be captured in a CUDA graph, or None."""
    kinds = _device_types(model)
    if kinds != {"cuda"}:
        return f"CUDA graphs are for CUDA GPUs, and the model is on {', '.join(sorted(kinds))}"
    if precision.needs_scaler:
        return "fp16's gradient scaler decides on the host whether a step is taken"
    if isinstance(model, GPT) and model.checkpoint_activations and model.config.dropout > 0.0:
        return "activation checkpointing reads the generator's state for its dropout, which a capture may not"
    if "capturable" not in optimizer.defaults:
        name = type(optimizer).__name__
        return f"a graph needs an optimiser that can take its rate from a tensor, as AdamW and Muon, and this is {name}"
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "the gradients of several processes are summed between its steps"
    return None


def _native_problem(model: nn.Module) -> str | None:
    if isinstance(model, GPT) and model.checkpoint_activations:
        return "activation checkpointing was asked for, and the native step keeps every activation"
    return native_step_problem(model)


def _device_types(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks here, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "torch.compile needs Triton on a GPU, and it is not installed"
        return None
    if device.type != "cpu":
        return f"torch.compile is not used on {device.type}"
    names = (
        [os.environ["CXX"]] if "CXX" in os.environ else ["cl"] if sys.platform == "win32" else ["g++", "clang++", "c++"]
    )
    if not any(shutil.which(name) for name in names):
        return "torch.compile needs a C++ compiler, and there is none on the path"
    return None
