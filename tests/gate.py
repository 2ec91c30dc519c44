"""The rules of the compile gate: what a kernel's machine code must and must not have before a launch may ship."""

from typing import NamedTuple

from aot import TARGETS, Launch, Report, compile_launch, record_launches
from launches import Case, run_kernel

from fastchargpt.kernels.tuning import Config

__all__ = ["TENSOR_MEMORY_COLUMNS", "Judgement", "judge", "launches_of", "problems"]

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
    for loop in report.matrix_loops:
        products = loop.count("HGMMA")
        if products > 3 and loop.count(r"WARPGROUP\.DEPBAR") >= products:
            found.append(f"serialized: each of a loop's {products} matrix instructions waits for the one before")
    if report.tf32 and "ieee" in launch.constants.values():
        found.append("tf32 in the code of a kernel asked for ieee precision")
    if report.atomics:
        found.append(f"atomics: {', '.join(report.atomics)}")
    if report.narrow_products:
        found.append(f"32-bit offsets: {len(report.narrow_products)}, the first in {report.narrow_products[0]!r}")
    return found


class Judgement(NamedTuple):
    """One launch of a kernel, what the compiler made of it, and everything that keeps it from shipping."""

    launch: Launch
    report: Report | None  # None: it does not compile
    problems: list[str]


def launches_of(config: Config, case: Case, target: str) -> list[Launch]:
    """The launches that an entry of the tables is responsible for."""
    with record_launches(target) as launches:
        run_kernel(config, case, "meta")
    if config.kernel in ("dq", "dkdv"):  # they run together, and are judged apart
        return [launch for launch in launches if f"_{config.kernel}_" in launch.name]
    return launches


def judge(config: Config, case: Case, target: str) -> list[Judgement]:
    """Compile what an entry launches in one case, and hold it against the rules."""
    found = []
    for launch in launches_of(config, case, target):
        try:
            report = compile_launch(launch, target)
        except Exception as error:  # whatever a compiler raises when it gives up
            found.append(Judgement(launch, None, [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"]))
        else:
            found.append(Judgement(launch, report, problems(launch, report)))
    return found
