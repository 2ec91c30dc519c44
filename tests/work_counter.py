"""What a kernel does, counted while the strict interpreter runs it: loop trips, matrix products, bytes, exponentials.

    with strict_interpreter(counter=WorkCounter()) as counter:
        kernel[grid](...)
    counter.products, counter.loaded, counter.loops

Machine code says what an iteration costs, this says how many there are. The static speed estimate multiplies the two.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["LoopWork", "WorkCounter"]


@dataclasses.dataclass
class LoopWork:
    """An innermost loop, summed over the programs of a launch."""

    trips: int = 0
    products: int = 0  # tl.dot executed in it


@dataclasses.dataclass
class WorkCounter:
    """Sums over all launches in its scope.

    `loops` holds the innermost loops in the order in which a program comes to them: the n-th loop of one program and
    the n-th of another are the same loop of the source, as long as no `if` skips a loop in some programs.
    """

    launches: int = 0
    programs: int = 0
    products: Counter[tuple[int, int, int]] = dataclasses.field(default_factory=Counter)  # (M, N, K) of each tl.dot
    loaded: int = 0  # bytes, active lanes
    stored: int = 0
    exponentials: int = 0
    loops: list[LoopWork] = dataclasses.field(default_factory=list)
    _reached: int = 0  # loops that the running program has come to
    _open: list[LoopWork] = dataclasses.field(default_factory=list)

    @property
    def multiply_adds(self) -> int:
        """Scalar multiply-adds of all matrix products."""
        return sum(m * n * k * times for (m, n, k), times in self.products.items())

    def start_program(self) -> None:
        """A program begins: its loops are counted from the first again."""
        self.programs += 1
        self._reached = 0
        self._open.clear()

    def product(self, m: int, n: int, k: int) -> None:
        """A tl.dot of (M, K) by (K, N)."""
        self.products[m, n, k] += 1
        if self._open:
            self._open[-1].products += 1

    @contextlib.contextmanager
    def _loop(self) -> Iterator[LoopWork]:
        work = LoopWork()
        before = self._reached
        self._open.append(work)
        try:
            yield work
        finally:
            if self._open:
                self._open.pop()
            if self._reached == before:  # no loop inside: an innermost one
                if len(self.loops) == before:
                    self.loops.append(LoopWork())
                self.loops[before].trips += work.trips
                self.loops[before].products += work.products
                self._reached += 1

    def count_trips(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """Pass an iterable of a `for` through, counting."""
        with self._loop() as work:
            for item in iterable:
                work.trips += 1
                yield item
