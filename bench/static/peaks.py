"""Peak rates of the GPUs that the static estimate speaks of, each with where it was read.

Rates are per multiprocessor (AMD: compute unit) and clock; NVIDIA's come from the CUDA C++ programming guide, section
"arithmetic instructions" (table of results per clock cycle per multiprocessor), unless a line says otherwise.
"""

import dataclasses

__all__ = ["PEAKS", "Peak"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """One GPU. `lanes` are results a clock."""

    model: str
    processors: int
    clock: float  # Hz, boost
    tensor: int  # 16-bit multiply-adds with fp32 accumulation
    fp32: int  # lanes of fp32 add, multiply, multiply-add
    alu: int  # lanes of integer, comparison, select and conversion instructions
    special: int  # lanes of exp2
    memory_lanes: int  # lanes of load, store and shuffle instructions
    issue: int  # warp instructions (AMD: of any kind, one from each of four SIMDs)
    shared_bytes: int  # of shared memory
    fill_bytes: int  # from L2
    dram: float  # bytes a second
    warp: int = 32
    source: str

    @property
    def tensor_flops(self) -> float:
        """Peak of the whole chip, FLOP a second (two a multiply-add)."""
        return 2.0 * self.tensor * self.processors * self.clock


# Shared memory moves 128 bytes a clock (32 banks of 4 bytes, programming guide); 64 bytes a clock from L2 to each
# multiprocessor is NVIDIA's figure for A100 (whitepaper: 5120 bytes a clock in all, 47 for each when all ask; 64 is the
# width of the port), taken for the others too.
_NVIDIA = {"special": 16, "memory_lanes": 32, "issue": 4, "shared_bytes": 128, "fill_bytes": 64, "alu": 64}

PEAKS = {
    "sm_80": Peak(
        model="A100 SXM 80 GB", processors=108, clock=1.41e9, tensor=1024, fp32=64, dram=2.039e12, **_NVIDIA,
        source="A100 datasheet: 312 TFLOPS bf16, 2039 GB/s; A100 whitepaper: 108 SMs, 1410 MHz",
    ),
    "sm_86": Peak(
        model="RTX 3090", processors=82, clock=1.695e9, tensor=256, fp32=128, dram=0.936e12, **_NVIDIA,
        source="GA102 whitepaper: 71 TFLOPS fp16 with fp32 accumulation, 936 GB/s, 82 SMs, 1695 MHz",
    ),
    "sm_89": Peak(
        model="RTX 4090", processors=128, clock=2.52e9, tensor=256, fp32=128, dram=1.008e12, **_NVIDIA,
        source="Ada whitepaper: 165.2 TFLOPS fp16 with fp32 accumulation, 1008 GB/s, 128 SMs, 2520 MHz",
    ),
    "sm_90": Peak(
        model="H100 SXM", processors=132, clock=1.83e9, tensor=2048, fp32=128, dram=3.35e12, **_NVIDIA,
        source="H100 datasheet: 989.4 TFLOPS bf16, 3.35 TB/s; H100 whitepaper: 132 SMs; the clock follows from these",
    ),
    "sm_100": Peak(
        model="B200", processors=148, clock=1.85e9, tensor=4096, fp32=128, dram=8.0e12, **_NVIDIA,
        source="Blackwell architecture brief: 2.25 PFLOPS bf16, 8 TB/s; 148 SMs as reported; clock follows",
    ),
    "sm_120": Peak(
        model="RTX 5090", processors=170, clock=2.407e9, tensor=256, fp32=128, dram=1.792e12, **_NVIDIA,
        source="RTX Blackwell whitepaper: 209.5 TFLOPS fp16 with fp32 accumulation, 1792 GB/s, 170 SMs, 2407 MHz",
    ),
    "gfx942": Peak(
        model="MI300X", processors=304, clock=2.1e9, tensor=1024, fp32=64, alu=64, special=16, memory_lanes=64, issue=4,
        shared_bytes=128, fill_bytes=64, dram=5.3e12, warp=64,
        source="CDNA 3 whitepaper: 1307.4 TFLOPS bf16, 5.3 TB/s, 304 CUs, 2100 MHz, 128 bytes of LDS a clock",
    ),
}  # fmt: skip
