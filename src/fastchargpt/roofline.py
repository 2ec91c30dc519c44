"""The two ceilings of a device, measured: matrix products a second and bytes a second."""

from dataclasses import dataclass

import torch

from fastchargpt.hardware import measure_matmul_flops
from fastchargpt.timing import race

__all__ = ["Roof", "measure_bandwidth", "measure_roof"]


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What no kernel on this device can beat."""

    # floating-point operations per second of matrix products
    flops: float
    # bytes per second read and written
    bandwidth: float

    def least_seconds(self, flops: float, bytes_moved: float) -> float:
        """The time that neither ceiling lets a kernel fall below."""
        return max(flops / self.flops, bytes_moved / self.bandwidth)


def measure_roof(device: torch.device, dtype: torch.dtype = torch.float32) -> Roof:
    """Measure both ceilings, in about a second.

    Args:
        device: what is measured.
        dtype: number format of the products; on a CPU the fp32 figure stands for all.
    """
    return Roof(flops=_matmul_flops(device, dtype), bandwidth=measure_bandwidth(device))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy far larger than the caches reads and writes: the median of a few."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    timing = race({"copy": lambda: target.copy_(source)}, device, seconds=0.4, min_rounds=3, max_rounds=20)["copy"]
    return 2 * size / timing.median


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    if device.type == "cpu":
        return measure_matmul_flops(torch.get_num_threads())
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.ones(size, size, dtype=dtype, device=device).uniform_(-1, 1) for _ in range(2))
    timing = race({"mm": lambda: left @ right}, device, seconds=0.5, min_rounds=5, max_rounds=100)["mm"]
    return 2 * size**3 / timing.median
