"""Bit-equal runs on a GPU: torch's deterministic algorithms for the length of a run, refused where they cannot be."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch

from fastchargpt.errors import BackendUnavailableError, FastchargptError

__all__ = ["check_deterministic", "deterministic_algorithms"]

# cuBLAS repeats its bits only with one of these workspaces
# (https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility)
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def check_deterministic(device: torch.device, compile: Literal["auto", "on", "off"]) -> None:
    """Refuse, before a run begins, what could not be bit-equal.

    Raises:
        BackendUnavailableError: the device, the environment or the compiler cannot promise it.
    """
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"deterministic=True cannot be had on {device.type}: use --device=cpu or cuda")
    if device.type == "cuda" and compile == "on":
        raise BackendUnavailableError(
            "deterministic=True cannot be had with compile=on on a GPU, where kernels are chosen by timing: "
            "leave one of the two out"
        )
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in WORKSPACES:
        raise BackendUnavailableError(
            f"deterministic=True needs {WORKSPACE} set to {' or '.join(WORKSPACES)} before the first CUDA call, and "
            f"it is {os.environ.get(WORKSPACE, 'not set')}"
        )


@contextlib.contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Inside, torch runs deterministic algorithms only (where `on`); torch's own setting is restored after.

    Raises:
        BackendUnavailableError: an operation has no deterministic form here.
    """
    if not on:
        yield
        return
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FastchargptError) or "deterministic" not in str(error):
            raise
        raise BackendUnavailableError(f"deterministic=True cannot be served: {str(error).splitlines()[0]}") from None
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
