"""A contest: contestants that compute the same thing, each checked before it is timed, all timed in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastchargpt.errors import BackendUnavailableError
from fastchargpt.timing import Timing, race

__all__ = ["Absent", "Contestant", "Result", "allow_recompiles", "hold", "peak_memory"]

MAX_ROUNDS = 400


class Absent(Exception):
    """A contestant that cannot take part here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute what the contest is about."""

    # what is timed
    call: Callable[[], object]
    # run first: what is wrong with the result, as a sentence, or None
    check: Callable[[], str | None]
    # bytes that a call uses outside torch's allocator
    other_bytes: Callable[[], int] | None = None
    # further figures of the row (JSON values); flops, bytes and tokens of a call become rates
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a contestant did."""

    # None where it took no part
    timing: Timing | None = None
    # bytes allocated at once during a call, beyond those before it
    peak_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    # why it is not ranked: a wrong result, or an absence
    wrong: str | None = None
    absent: str | None = None


def hold(
    entrants: Mapping[str, Callable[[], Contestant]],
    device: torch.device,
    *,
    seconds: float,
    rounds: int,
    warmup: int = 1,
    lead: int = 0,
) -> dict[str, Result]:
    """Build and check every entrant, then time those that are right, in turns.

    Args:
        entrants: name -> what builds the contestant; it raises Absent, ImportError or BackendUnavailableError where the
            contestant cannot be had.
        device: where they compute.
        seconds: time to spend on timing all of them.
        rounds: timed calls of each at least.
        warmup: untimed calls of each, beside the two that check it and count its memory.
        lead: untimed calls before each timed one.
    """
    results: dict[str, Result] = {}
    ready: dict[str, Contestant] = {}
    for name, build in entrants.items():
        try:
            contestant = build()
            wrong = contestant.check()
        except (Absent, BackendUnavailableError, ImportError) as reason:
            results[name] = Result(absent=_sentence(reason))
        except torch.OutOfMemoryError:
            results[name] = Result(absent="it does not fit in this device's memory")
        except Exception as error:  # a contestant that breaks is reported as such; the others still compete
            results[name] = Result(wrong=f"raises {type(error).__name__}: {_sentence(error)}")
        else:
            if wrong is None:
                ready[name] = contestant
            else:
                results[name] = Result(wrong=wrong, facts=dict(contestant.facts))
    peaks = {name: _peak(contestant, device) for name, contestant in ready.items()}
    timings = race(
        {name: contestant.call for name, contestant in ready.items()},
        device,
        seconds=seconds,
        warmup=warmup,
        min_rounds=rounds,
        max_rounds=MAX_ROUNDS,
        lead=lead,
    )
    for name, contestant in ready.items():
        facts = dict(contestant.facts)
        results[name] = Result(timing=timings[name], peak_bytes=peaks[name], facts=facts)
    return {name: results[name] for name in entrants}


def allow_recompiles() -> None:
    """Let torch.compile compile one function for as many models and shapes as a suite has.

    By default it gives up after eight and goes on eager, with no more than a warning: a time of something else.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 512)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 2048)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that torch's allocator holds at most during a call, beyond those before it; None where it does not say."""
    call()  # what is allocated once and kept is not the call's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events() if profile.profiler is not None else []
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak(contestant: Contestant, device: torch.device) -> int | None:
    peak = peak_memory(contestant.call, device)
    return peak if peak is None or contestant.other_bytes is None else peak + contestant.other_bytes()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
