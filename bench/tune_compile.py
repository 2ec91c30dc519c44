"""Compiles the tuner's candidates on all cores before any is timed: one after another they take minutes.

A process of its own compiles each, by running it once, so that the caches on disk hold exactly what the tuner will ask
for. What fails there fails again, with its reason, when the tuner comes to it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from fastchargpt.bench.tune import BrokenDevice
from fastchargpt.bench.tune_launches import GpuRig
from fastchargpt.bench.tune_space import Place, candidates
from fastchargpt.kernels.tables import Config
from fastchargpt.kernels.tuning import Plan, plan_for

__all__ = ["Job", "compile_ahead", "jobs"]

MOST_WORKERS = 16  # each holds some 600 MB of the GPU's memory


@dataclasses.dataclass(frozen=True)
class Job:
    """One candidate, at the first place that tries it."""

    place: Place
    plan: Plan
    what: str


def jobs(places: Iterable[Place], arch: str) -> list[Job]:
    """The candidates of these places, each machine code once: a candidate is the same code at every length."""
    found: dict[tuple[str, int, bool, tuple[Config, ...]], Job] = {}
    for place in places:
        shipped = plan_for(arch, place.dtype, place.head_dim, place.length, place.dropout)
        for kernel, what in (("forward", "forward"), ("dq", "backward"), ("dkdv", "backward"), ("blocks", "backward"),
                             ("tile", "backward"), ("decode", "decode")):  # fmt: skip
            if kernel == "decode" and (place.dropout or shipped.decode is None):
                continue
            if kernel in ("tile", "blocks") and place.max_length is None:
                continue
            for config in candidates(kernel, place):
                plan = _with(shipped, config, arch, place)
                launched = plan.backward if what == "backward" else (config,)
                found.setdefault((place.dtype, place.head_dim, place.dropout, launched), Job(place, plan, what))
    return list(found.values())


def _with(shipped: Plan, config: Config, arch: str, place: Place) -> Plan:
    if config.kernel == "forward":
        return dataclasses.replace(shipped, forward=config)
    if config.kernel == "decode":
        return dataclasses.replace(shipped, decode=config)
    if config.kernel in ("tile", "blocks"):
        return dataclasses.replace(shipped, backward=(config,))
    first, second = plan_for(arch, place.dtype, place.head_dim, 2**30, place.dropout).backward
    return dataclasses.replace(shipped, backward=(config, second) if config.kernel == "dq" else (first, config))


def compile_ahead(
    places: Iterable[Place], arch: str, device: torch.device, say: Callable[[str], None], *, workers: int | None = None
) -> None:
    """Fill the caches on disk; whatever goes wrong is said, and left to the tuner.

    Args:
        places: to be tuned.
        arch: the table's.
        device: the GPU.
        say: takes a line of text.
        workers: processes; None is one for each core, sixteen at most.
    """
    todo = jobs(places, arch)
    count = min(workers or os.cpu_count() or 1, MOST_WORKERS, len(todo))
    if count < 2:
        return
    say(f"compiling {len(todo)} candidates with {count} processes")
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_compile, job, str(device)) for job in todo]):
                done.result()
        except BrokenProcessPool:  # a candidate took its process down: the others are compiled as they are measured
            say("a process that compiled candidates died; the rest are compiled one after another")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compile(job: Job, device: str) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenDevice):
        GpuRig(torch.device(device)).problem(job.place, job.plan, job.what)
