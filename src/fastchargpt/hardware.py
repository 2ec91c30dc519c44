"""What this device can do at most: measured on a CPU, from NVIDIA's data sheets on a GPU."""

import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["GPU_PEAKS", "Peak", "measure_matmul_flops", "peak_flops"]


@dataclass(frozen=True)
class Peak:
    """A device's matrix-product peak."""

    # floating-point operations per second
    flops: float
    # where the figure comes from
    source: str


# Dense 16-bit tensor-core peaks with fp32 accumulation, in TFLOP/s, without sparsity, by the word in the device's name.
GPU_PEAKS: dict[str, tuple[float, str]] = {
    "B200": (2250.0, "NVIDIA DGX B200 data sheet"),
    "GH200": (989.4, "NVIDIA GH200 data sheet"),
    "H200": (989.4, "NVIDIA H200 data sheet"),
    "H100 PCIe": (756.0, "NVIDIA H100 data sheet, PCIe"),
    "H100 NVL": (835.0, "NVIDIA H100 data sheet, NVL"),
    "H100": (989.4, "NVIDIA H100 data sheet, SXM5"),
    "A100": (312.0, "NVIDIA A100 data sheet"),
    "A40": (149.7, "NVIDIA A40 data sheet"),
    "A10": (125.0, "NVIDIA A10 data sheet"),
    "L40S": (362.0, "NVIDIA L40S data sheet"),
    "L40": (181.0, "NVIDIA L40 data sheet"),
    "L4": (121.0, "NVIDIA L4 data sheet"),
    "RTX 5090": (209.5, "NVIDIA Blackwell RTX white paper"),
    "RTX 4090": (165.2, "NVIDIA Ada white paper"),
    "RTX 4080": (97.5, "NVIDIA Ada white paper"),
    "RTX 3090": (71.0, "NVIDIA Ampere GA102 white paper"),
    "RTX 3080": (59.5, "NVIDIA Ampere GA102 white paper"),
    "V100": (125.0, "NVIDIA V100 data sheet"),
    "T4": (65.0, "NVIDIA T4 data sheet"),
}
WITHOUT_TF32 = ("V100", "T4")


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> Peak | None:
    """The matrix-product peak of a device, or None where it is not known.

    Args:
        device: on a CPU the peak is measured, once per process and thread count (0.2 s).
        dtype: the number format of the products; on a GPU float32 means TF32, which has half of the 16-bit peak, and
            there is no figure where torch's `float32_matmul_precision` keeps TF32 out.
    """
    if device.type == "cpu":
        return Peak(measure_matmul_flops(torch.get_num_threads()), "measured here, fp32 products of 1024 x 1024")
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (tflops, source) in GPU_PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            if dtype.itemsize == 2:
                return Peak(tflops * 1e12, source)
            if known in WITHOUT_TF32 or torch.get_float32_matmul_precision() == "highest":
                return None
            return Peak(tflops * 1e12 / 2, f"{source}, TF32")
    return None


@functools.cache
def measure_matmul_flops(threads: int, size: int = 1024, seconds: float = 0.1) -> float:
    """Floating-point operations per second of fp32 matrix products on this CPU: the best decile of short runs.

    torch has two libraries for them, and a peak is that of the faster one: on an AMD processor with AVX-512 the one
    that `torch.mm` calls reaches less than half of what oneDNN does.

    Args:
        threads: torch's thread count, part of the cache's key; `torch.get_num_threads()`.
        size: rows and columns of the matrices.
        seconds: time to spend on each library.
    """
    private = torch.Generator().manual_seed(0)  # a measurement must not advance the run's own generator
    left, right, out = (torch.randn(size, size, generator=private) for _ in range(3))
    products: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if torch.backends.mkldnn.is_available():
        blocked_left, blocked_right = left.to_mkldnn(), right.to_mkldnn()
        products.append(lambda: torch._C._nn.mkldnn_linear(blocked_left, blocked_right, None))
    with torch.no_grad():
        return max(2 * size**3 / _best_decile(product, seconds) for product in products)


def _best_decile(call: Callable[[], object], seconds: float) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times, n=10)[0]
