"""Which number format the matrix products use, chosen by what the device does fast and safely."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fastchargpt.errors import BackendUnavailableError, ConfigError, nearest

__all__ = ["Precision", "PrecisionName", "choose_device", "choose_precision"]

# Measured on two cores with AVX512-BF16 and no AMX, where bf16 products run at four times fp32's rate: a step of
# torch's in bf16 takes 1.17 times as long as in fp32 when the model is 64 wide, 0.67 to 0.92 at 128 and 0.43 at 384.
# The native step, in fp32, takes 0.56 to 0.82 of bf16's time at 64 and 128 and as long at 384, so where it serves it
# goes first.
BF16_WIDTH = 128

PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A choice of number format and its reason."""

    name: PrecisionName
    # one clause, for the log
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The format of the activations."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.float32)

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients must be scaled to stay in range."""
        return self.name == "fp16"

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=self.dtype)

    @contextlib.contextmanager
    def matmuls(self) -> Iterator[None]:
        """Let fp32 products run as TF32 (or not) inside, and restore torch's own setting after."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self.name == "fp32" else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first of cuda, mps, cpu that is there.

    Raises:
        ConfigError: the name is no device.
        BackendUnavailableError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        known = ("auto", "cpu", "cuda", "cuda:0", "mps")
        raise ConfigError(
            f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}{nearest(name, known)}"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "device cuda is not available here: use --device=cpu, or install a CUDA build of torch"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device {name} is not there: this machine has {torch.cuda.device_count()} GPU(s)"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BackendUnavailableError("device mps is not available here: use --device=cpu")
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}")
    return device


def choose_precision(name: str, device: torch.device, *, torch_width: int | None = None) -> Precision:
    """The precision of a name on a device; `auto` chooses.

    Args:
        torch_width: n_embd of a model that torch is to train there; None where nothing is trained, or by native code.

    Raises:
        BackendUnavailableError: the device cannot do what was asked for by name.
    """
    if name == "auto":
        return _auto(device, torch_width)
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        if name in ("bf16", "tf32") and major < 8 and not torch.version.hip:
            raise BackendUnavailableError(
                f"precision {name} needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older: "
                "use --precision=fp16"
            )
    elif name == "tf32":
        raise BackendUnavailableError(
            f"precision tf32 exists on NVIDIA GPUs only, not on {device.type}: use --precision=fp32"
        )
    elif name == "fp16" and device.type == "cpu":
        raise BackendUnavailableError("precision fp16 is slow and unsafe on a CPU: use --precision=fp32 or bf16")
    if name not in ("fp32", "tf32", "bf16", "fp16"):
        raise ConfigError(f"precision must be auto, fp32, tf32, bf16 or fp16, not {name!r}")
    return Precision(name=name, reason="asked for")  # type: ignore[arg-type]


def _auto(device: torch.device, torch_width: int | None) -> Precision:
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device)[0] >= 8:
            return Precision(
                name="bf16", reason="this GPU has bf16 tensor cores; what stays in fp32 is multiplied as TF32"
            )
        return Precision(name="fp16", reason="this GPU has no bf16: fp16 with a gradient scaler")
    if device.type != "cpu":
        return Precision(name="fp32", reason=f"the safe choice on {device.type}")
    if torch_width is None:
        return Precision(name="fp32", reason="exact, and on a CPU what the native code computes in")
    unit = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512-BF16"
    if unit != "AMX" and not torch.cpu._is_avx512_bf16_supported():
        return Precision(name="fp32", reason="this CPU has neither AMX nor AVX512-BF16, without which bf16 is slower")
    if torch_width < BF16_WIDTH:
        return Precision(name="fp32", reason=f"a model {torch_width} wide gains less from {unit} than casting costs")
    return Precision(name="bf16", reason=f"torch takes the step, and this CPU has {unit}")
