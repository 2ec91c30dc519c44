"""What a run says while it goes on: lines for people, figures for loggers, a progress bar."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastchargpt.metrics import MetricsLogger

__all__ = ["Reporter"]


class Reporter:
    """Passes a run's lines and figures on; on a process that is to be silent, nowhere.

    Args:
        log: takes each line that people read.
        loggers: whatever takes `.log(dict, step=)`; read at each report, so that some may be added later.
        progress: whether a tqdm bar is drawn.
        silent: whether nothing is reported.
    """

    def __init__(
        self, log: Callable[[str], None], loggers: Sequence[MetricsLogger], *, progress: bool, silent: bool
    ) -> None:
        self._log, self._loggers, self._progress, self._silent = log, loggers, progress and not silent, silent
        self._bar: Any = None

    def line(self, line: str) -> None:
        """A line that people read; under a bar it stands above it."""
        if self._silent:
            return
        if self._bar is None:
            self._log(line)
        elif not line.startswith("iter "):  # the bar itself shows what the iter lines say
            self._bar.write(line)

    def figures(self, figures: Mapping[str, float], iteration: int) -> None:
        """The figures of a step, for every logger."""
        if self._silent:
            return
        for logger in self._loggers:
            logger.log(figures, step=iteration)

    def move(self, iteration: int, note: str) -> None:
        """Move the bar to a count of steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(iteration - self._bar.n)

    @contextlib.contextmanager
    def bar(self, total: int, iteration: Callable[[], int]) -> Iterator[None]:
        """Draw the bar inside, where there is to be one.

        Args:
            total: steps of the whole run.
            iteration: gives the steps taken so far.
        """
        if not self._progress:
            yield
            return
        from tqdm import tqdm

        with tqdm(total=total, initial=iteration(), unit="step", dynamic_ncols=True) as self._bar:
            try:
                yield
            finally:
                self._bar.update(iteration() - self._bar.n)
                bar, self._bar = self._bar, None
                bar.refresh()
