"""A bound on a kernel's speed from its machine code: which unit of the GPU must be busy for how long. An ESTIMATE.

For each unit (tensor cores, fp32 lanes, integer lanes, exp2, load/store lanes, shared memory, L2 port, issue) the
cycles that the launch's instructions need there, if that unit never waited. The bound is the busiest unit, or DRAM if
moving each byte once takes longer. Real time is longer: latencies, barriers, a last wave that does not fill the chip,
clocks below boost. Two ends are given: everything overlaps perfectly, and tensor work overlaps with nothing.

Machine code gives the cost of one iteration of each loop (tests/aot.py), the interpreter gives their number
(tests/work_counter.py).
"""

import dataclasses
import re
from collections import Counter

from aot import MATRIX_OPCODE, Loop, Report
from peaks import Peak
from work_counter import LaunchWork

__all__ = ["LAUNCH_SECONDS", "Estimate", "estimate"]

# What a launch costs besides its work (start, filling and draining the chip) when launches follow one another on the
# device. An assumption, of the order that CUDA graphs reach; without them a launch from Python costs about 9 us of CPU.
LAUNCH_SECONDS = 4e-6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bounds for one launch. Seconds leave the launch itself out."""

    seconds: dict[str, float]  # by unit, DRAM included
    tensor_repeated: float  # tensor-core work over what the products need; above 1 warps do the same work twice
    loops_matched: bool  # each loop of the source was found in the machine code; otherwise an average iteration counts

    @property
    def limiter(self) -> str:
        return max(self.seconds, key=lambda unit: self.seconds[unit])

    @property
    def overlapped(self) -> float:
        """Seconds, every unit working while every other does."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """Seconds, tensor cores working only while nothing else does."""
        rest = max(time for unit, time in self.seconds.items() if unit not in ("tensor", "dram"))
        return max(self.seconds.get("tensor", 0.0) + rest, self.seconds["dram"])


def estimate(report: Report, work: LaunchWork, heads: int, peak: Peak, matrix_loops: list[int]) -> Estimate:
    """Bound a launch over `heads` heads from its machine code and from the work counted for one head.

    Args:
        matrix_loops: which of `work.loops` hold products, by position; taken from a run that enters all of them.
    """
    body = _Code(report, work, peak)
    trips = [work.loops[at].trips if at < len(work.loops) else 0 for at in matrix_loops]
    branches = [work.loops[at].branches if at < len(work.loops) else 0 for at in matrix_loops]
    compiled = report.matrix_loops
    matched = len(compiled) == len(trips)
    if not matched and compiled:
        trips, branches = ([sum(numbers) / len(compiled)] * len(compiled) for numbers in (trips, branches))
    cycles: Counter[str] = Counter()
    for loop, times, taken in zip(compiled, trips, branches, strict=bool(compiled)):
        cycles.update({unit: times * cost for unit, cost in body.cycles(loop.always).items()})
        cycles.update({unit: taken * cost for unit, cost in body.cycles(Loop(loop.skippable)).items()})
    rest = Counter(report.opcodes)
    for loop in compiled:
        rest.subtract(loop.opcodes)
    if compiled and sum(work.products.values()) == sum(loop.products for loop in work.loops):
        rest = _without_peeled(Loop(dict(rest)), compiled)
    cycles.update({unit: work.programs * cost for unit, cost in body.cycles(Loop(dict(+rest))).items()})
    cycles["fill"] = (work.loaded + work.stored) / peak.fill_bytes
    busy = min(peak.processors, work.programs * heads)
    seconds = {unit: amount * heads / busy / peak.clock for unit, amount in cycles.items()}
    seconds["dram"] = (work.unique_loaded + work.unique_stored) * heads / peak.dram
    needed = work.multiply_adds / peak.tensor
    return Estimate(seconds, cycles["tensor"] / needed if needed else 0.0, matched)


def _without_peeled(rest: Loop, loops: list[Loop]) -> Counter[str]:
    """The code outside the loops, less the iterations that the compiler's software pipeline peeled off them.

    They are matrix instructions outside loops in a kernel whose products all lie in loops. Their trips are counted with
    the loop's already.
    """
    copies = rest.matrix_instructions / sum(loop.matrix_instructions for loop in loops)
    left = Counter(rest.opcodes)
    for loop in loops:
        left.subtract({opcode: round(times * copies) for opcode, times in loop.opcodes.items()})
    return +left


class _Code:
    """Costs of instructions of one kernel, in cycles of one multiprocessor for all warps of one program."""

    def __init__(self, report: Report, work: LaunchWork, peak: Peak) -> None:
        self.warps, self.peak = report.warps, peak
        self.is_amd = report.target.startswith("gfx")
        # UTCHMMA does not show its shape: the mean over the source's products. It works on 128 rows whatever is asked.
        steps = sum(k / 16 * times for (_, _, k), times in work.products.items())
        rows = sum(max(m, 128) * n * k * times for (m, n, k), times in work.products.items())
        self.tcgen_multiply_adds = rows / steps if steps else 0.0
        self.tcgen_operand_bytes = (
            sum((m + n) * k * 2 * times for (m, n, k), times in work.products.items()) / steps if steps else 0.0
        )

    def cycles(self, loop: Loop) -> dict[str, float]:
        """Cycles by unit that one pass over these instructions needs."""
        cycles: Counter[str] = Counter()
        for opcode, times in loop.opcodes.items():
            cycles["issue"] += times * self.warps / self.peak.issue
            if re.match(MATRIX_OPCODE, opcode):
                cycles["tensor"] += times * self._multiply_adds(opcode) / self.peak.tensor
                cycles["shared"] += times * self._operand_bytes(opcode) / self.peak.shared_bytes
                continue
            unit = _amd_unit(opcode) if self.is_amd else _nvidia_unit(opcode)
            lanes = {
                "fp32": self.peak.fp32,
                "alu": self.peak.alu,
                "special": self.peak.special,
                "memory": self.peak.memory_lanes,
            }.get(unit)
            threads = times * self.warps * self.peak.warp
            if lanes:
                cycles[unit] += threads / lanes * (2 if re.match(r"F(FMA|ADD|MUL)2\b|v_pk_", opcode) else 1)
            cycles["shared"] += threads * _shared_width(opcode) / self.peak.shared_bytes
        return dict(cycles)

    def _multiply_adds(self, opcode: str) -> float:
        """Multiply-adds of one matrix instruction, over all warps of the program."""
        if opcode.startswith("UT"):
            return self.tcgen_multiply_adds  # one thread asks for the whole program
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):  # by four warps together
            m, n, k = map(int, shape.groups())
            return m * n * k * self.warps / 4
        if shape := re.match(r"v_mfma_\w*?_(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = map(int, shape.groups())
            return m * n * k * self.warps
        shape = re.match(r"HMMA\.(16)(8)(4|8|16)\b", opcode)
        assert shape, f"the shape of {opcode} is not known"
        m, n, k = map(int, shape.groups())
        return m * n * k * self.warps

    def _operand_bytes(self, opcode: str) -> float:
        """Bytes of shared memory that a matrix instruction reads itself, over all warps."""
        if opcode.startswith("UT"):
            return self.tcgen_operand_bytes
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            m, n, k = map(int, shape.groups())
            return (n + (m if opcode.endswith(".SS") else 0)) * k * 2 * self.warps / 4
        return 0.0


FP32 = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "IMAD")  # IMAD is in that pipe
MEMORY = ("SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "LDTM", "STTM", "LD", "ST")
ALU = (
    "FMNMX", "FMNMX3", "FSEL", "SEL", "ISETP", "FSETP", "IADD", "IADD3", "VIADD", "LOP3", "PRMT", "F2F", "F2FP", "LEA",
    "SHF", "PLOP3", "SGXT", "IMNMX", "VIMNMX", "VIADDMNMX", "MOV", "ISCADD", "IABS", "POPC", "HSETP2", "HMNMX2", "VOTE",
)  # fmt: skip


def _nvidia_unit(opcode: str) -> str:
    name = opcode.split(".")[0]
    if name == "MUFU":
        return "special"
    if name in FP32:
        return "fp32"
    if name in MEMORY:
        return "memory"
    return "alu" if name in ALU else "none"  # uniform registers, branches, barriers: issue only


def _amd_unit(opcode: str) -> str:
    if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", opcode):
        return "special"
    if opcode.startswith("v_"):
        return "fp32"  # one vector unit does it all
    return "memory" if opcode.startswith(("ds_", "global_", "buffer_", "flat_")) else "none"


def _shared_width(opcode: str) -> int:
    """Bytes of shared memory that one lane of an instruction moves."""
    if re.match(r"LDSM|STSM", opcode):
        return 16 if ".4" in opcode else 8 if ".2" in opcode else 4
    if re.match(r"(LDS|STS|LDGSTS)\b", opcode):
        found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4
    if found := re.match(r"ds_(?:read|write|load|store)(2?)\w*_[bui](\d+)", opcode):
        return int(found[2]) // 8 * (2 if found[1] else 1)
    return 0
