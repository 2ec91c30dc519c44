"""The rules of the compile gate: what a kernel's machine code must and must not have before a launch may ship."""

from aot import TARGETS, Launch, Report

__all__ = ["TENSOR_MEMORY_COLUMNS", "problems"]

TENSOR_MEMORY_COLUMNS = 512  # of sm_100; asking for more compiles, without a word, to a kernel that only traps


def problems(launch: Launch, report: Report) -> list[str]:
    """Everything that keeps a launch from shipping on the target it was compiled for, one sentence each."""
    found = []
    if report.spills or report.stack:
        found.append(f"spills: {report.spills} local accesses or registers, {report.stack} bytes of stack a thread")
    limit = TARGETS[report.target].shared_limit
    if report.shared > limit:
        found.append(f"shared memory: {report.shared} bytes, over the limit of {limit}")
    if report.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory: {report.tensor_memory} columns, over the {TENSOR_MEMORY_COLUMNS} there are")
    if report.half_dots:
        if report.slow_dots or not report.whole.matrix_instructions:
            found.append(f"no tensor cores: {max(report.slow_dots, 1)} of {report.half_dots} 16-bit products")
        elif report.loops_with_dots and not report.matrix_loops:
            found.append("no tensor-core instruction in any loop, although the kernel multiplies in its loops")
    if report.tf32 and "ieee" in launch.constants.values():
        found.append("tf32 in the code of a kernel asked for ieee precision")
    if report.atomics:
        found.append(f"atomics: {', '.join(report.atomics)}")
    if report.narrow_products:
        found.append(f"32-bit offsets: {len(report.narrow_products)}, the first in {report.narrow_products[0]!r}")
    return found
