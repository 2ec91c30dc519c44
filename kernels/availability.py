"""Whether the Triton kernels can run here: asked once a device, answered in words."""

import importlib.metadata
import os
import shutil
import sys
import warnings

import torch

__all__ = ["MINIMUM_CAPABILITY", "MINIMUM_TRITON", "triton_problem", "triton_version"]

MINIMUM_TRITON = (3, 5)
MINIMUM_CAPABILITY = (8, 0)

_ANSWERS: dict[int, str | None] = {}  # by CUDA device


def triton_problem(device_type: str, index: int) -> str | None:
    """Why the Triton kernels cannot run on this device, as half a sentence, or None when they can.

    The first time that a GPU has to go without them, it is said in a warning.
    """
    if device_type != "cuda":
        return _probe(device_type, index)
    if index not in _ANSWERS:
        _ANSWERS[index] = _probe(device_type, index)
        if _ANSWERS[index] is not None:
            warnings.warn(f"fastchargpt: attention runs on torch's SDPA, because {_ANSWERS[index]}", stacklevel=3)
    return _ANSWERS[index]


# torch.compile calls it while tracing and keeps the answer (what torch.compiler.assume_constant_result sets, without
# the second that importing torch._dynamo takes).
triton_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_version() -> str | None:
    """Triton's version, without importing it where its package says so; None where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            import triton
        except ImportError:
            return None
        return str(triton.__version__)


def _probe(device_type: str, index: int) -> str | None:
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    try:
        import triton
    except Exception as error:
        return f"Triton {version} does not import ({type(error).__name__}: {error})"
    if triton.knobs.runtime.interpret:
        return None if device_type in ("cpu", "cuda") else f"Triton's interpreter does not serve {device_type}"
    if device_type != "cuda":
        return (
            f"Triton compiles for GPUs only (TRITON_INTERPRET=1 runs its interpreter), and the device is {device_type}"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MINIMUM_CAPABILITY:
        # Compiled for 7.5 (T4), every tl.dot becomes scalar instructions: correct, spilling, slower than SDPA.
        return f"Triton uses no tensor cores on {torch.cuda.get_device_name(index)} (compute capability below 8.0)"
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if sys.platform != "win32" and not any(shutil.which(name) for name in compilers if name):
        return "Triton finds no C compiler (cc, gcc or clang) to build its launcher with"
    return None
