"""How fast things are, fairly: the compared calls take turns in one process, and a GPU is timed by its own clock."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Timing", "quantile", "race"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The durations of one contestant's calls, in the order they were made."""

    # in seconds
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls were faster, in seconds."""
        return quantile(self.seconds, 0.5)

    @property
    def p20(self) -> float:
        """A fifth of the calls was faster, in seconds."""
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        """Four fifths of the calls were faster, in seconds."""
        return quantile(self.seconds, 0.8)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, linear between neighbours; nan for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def race(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    lead: int = 0,
) -> dict[str, Timing]:
    """Time calls that take turns: a round runs each once, and the order rotates from round to round.

    Whatever else slows the machine down then slows all of them alike. On CUDA each call is timed between two events on
    the device, after the L2 cache has been overwritten for a millisecond, in which the host gets ahead; elsewhere by
    the wall clock.

    Args:
        contestants: name -> a call without arguments.
        device: where the calls compute.
        seconds: time to spend on all of them together, warm-up not counted.
        warmup: untimed calls of each beforehand (compilation, allocation, clocks).
        min_rounds: timed calls of each at least, however long they take.
        max_rounds: timed calls of each at most.
        lead: untimed calls before each timed one, for a time as in a row of calls: threads that the contestant before
            has left spinning, as libgomp's do for some milliseconds, are then not charged to this one.
    """
    for call, _ in itertools.product(contestants.values(), range(warmup)):
        call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    timed = _CudaClock(device) if device.type == "cuda" else _wall_clock
    gc_was_on = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        _take_turns(contestants, times, timed, seconds, min_rounds, max_rounds, lead)
    finally:
        if gc_was_on:
            gc.enable()
    return {name: Timing(seconds=tuple(values)) for name, values in times.items()}


def _take_turns(
    contestants: Mapping[str, Callable[[], object]],
    times: dict[str, list[float]],
    timed: Callable[[Callable[[], object]], float],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    lead: int,
) -> None:
    names = list(contestants)
    end = time.perf_counter() + seconds
    for turn in range(max_rounds if names else 0):
        if turn >= min_rounds and time.perf_counter() >= end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(lead):
                contestants[name]()
            times[name].append(timed(contestants[name]))


def _wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# How long the device is kept busy before each timed call: the host enqueues the call's kernels meanwhile, so that what
# is timed is their own time. On an H200 a backward then took the same, within 2 %, through autograd and as an operator.
HEAD_START = 1e-3


class _CudaClock:
    """Times a call by the device's own events, with a cold L2 cache and the host ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)
        with torch.cuda.device(device):
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            once = min(self._elapsed(self._flush.zero_) for _ in range(5))
        self._times = math.ceil(HEAD_START / once)

    def __call__(self, call: Callable[[], object]) -> float:
        with torch.cuda.device(self._device):
            for _ in range(self._times):
                self._flush.zero_()
            return self._elapsed(call)

    def _elapsed(self, call: Callable[[], object]) -> float:
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3
