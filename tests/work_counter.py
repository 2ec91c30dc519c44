"""What a kernel does, counted while the strict interpreter runs it: loop trips, matrix products, bytes, exponentials.

    with strict_interpreter(counter=WorkCounter()) as counter:
        kernel[grid](...)
    counter.launches[0].products, counter.launches[0].loaded, counter.launches[0].loops

Machine code says what an iteration costs, this says how many there are. The static speed estimate multiplies the two.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["LaunchWork", "LoopWork", "WorkCounter"]


@dataclasses.dataclass
class LoopWork:
    """An innermost loop, summed over the programs of a launch."""

    trips: int = 0
    products: int = 0  # tl.dot executed in it
    branches: int = 0  # bodies of an `if` that a program decides executed in it


@dataclasses.dataclass
class LaunchWork:
    """One launch, summed over its programs.

    `loops` holds the innermost loops in the order in which a program comes to them: the n-th loop of one program and
    the n-th of another are the same loop of the source, as long as no `if` skips a loop in some programs.
    """

    kernel: str
    programs: int = 0
    products: Counter[tuple[int, int, int]] = dataclasses.field(default_factory=Counter)  # (M, N, K) of each tl.dot
    loaded: int = 0  # bytes, active lanes
    stored: int = 0
    unique_loaded: int = 0  # bytes, each address once: what must come from DRAM
    unique_stored: int = 0
    exponentials: int = 0
    loops: list[LoopWork] = dataclasses.field(default_factory=list)

    @property
    def multiply_adds(self) -> int:
        """Scalar multiply-adds of all matrix products."""
        return sum(m * n * k * times for (m, n, k), times in self.products.items())


class WorkCounter:
    """Collects a `LaunchWork` for every launch in its scope; the interpreter calls the other methods."""

    def __init__(self) -> None:
        self.launches: list[LaunchWork] = []
        self._reached = 0  # innermost loops that the running program has come to
        self._open: list[LoopWork] = []  # loops that it is in

    @property
    def current(self) -> LaunchWork:
        return self.launches[-1]

    def start_launch(self, kernel: str) -> None:
        self.launches.append(LaunchWork(kernel))

    def start_program(self) -> None:
        """A program begins: its loops are counted from the first again."""
        self.current.programs += 1
        self._reached = 0
        self._open.clear()

    def product(self, m: int, n: int, k: int) -> None:
        """A tl.dot of (M, K) by (K, N)."""
        self.current.products[m, n, k] += 1
        if self._open:
            self._open[-1].products += 1

    def branch(self) -> None:
        """The body of an `if` whose condition is a tensor."""
        if self._open:
            self._open[-1].branches += 1

    def count_trips(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """Pass an iterable of a `for` through, counting."""
        work, before = LoopWork(), self._reached
        self._open.append(work)
        for item in iterable:
            work.trips += 1
            yield item
        self._open.pop()
        if self._reached == before:  # no loop inside: an innermost one
            loops = self.current.loops
            if len(loops) == before:
                loops.append(LoopWork())
            loops[before].trips += work.trips
            loops[before].products += work.products
            loops[before].branches += work.branches
            self._reached += 1
