"""How a step is computed: by torch or natively, compiled or not, as one CUDA graph or not; each with its reason."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.native_step import native_step_problem
from fastchargpt.precision import Precision

__all__ = ["CompileChoice", "EngineChoice", "choose_compile", "choose_engine"]

# What compiling costs and gains. On two CPU cores a cold compile takes about half a minute and saves about a twentieth
# of a 25 ms step. On a GPU, by nanoGPT's own account (its README, "efficiency notes"), it takes about a minute and
# halves a 250 ms step; nothing of ours has been measured there yet.
CPU_ITERATIONS_TO_EARN = 25_000
GPU_ITERATIONS_TO_EARN = 500


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """Whether the step is compiled, and why."""

    on: bool
    # one clause, for the log
    reason: str


def choose_compile(mode: Literal["auto", "on", "off"], device: torch.device, iterations: int) -> CompileChoice:
    """Whether to compile the step of a run of `iterations` steps.

    Raises:
        BackendUnavailableError: compilation was asked for by name and there is no compiler.
        ConfigError: the mode is none of auto, on and off.
    """
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"compile must be auto, on or off, not {mode!r}")
    if mode == "off":
        return CompileChoice(on=False, reason="asked for")
    missing = _missing_compiler(device)
    if mode == "on":
        if missing:
            raise BackendUnavailableError(f"compile=on cannot be served: {missing}; install it or use --compile=off")
        return CompileChoice(on=True, reason="asked for")
    if missing:
        return CompileChoice(on=False, reason=missing)
    needed = GPU_ITERATIONS_TO_EARN if device.type == "cuda" else CPU_ITERATIONS_TO_EARN
    if iterations < needed:
        return CompileChoice(
            on=False, reason=f"compiling pays from about {needed} steps on here, and this run has {iterations}"
        )
    return CompileChoice(on=True, reason=f"a run of {iterations} steps earns the compile time back")


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
    else:
        problem = native_step_problem(model)
    if problem is None:
        return EngineChoice(native=True, reason="one call for loss and gradients, one for the update")
    if engine == "native":
        raise BackendUnavailableError(f"engine=native cannot be served: {problem}; use --engine=torch")
    return EngineChoice(native=False, reason=problem)


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
