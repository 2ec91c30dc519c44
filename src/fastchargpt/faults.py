"""What can go wrong in a run of steps: numbers that are no longer finite, and memory that has run out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastchargpt.errors import TrainingError
from fastchargpt.parallel import Parallel
from fastchargpt.sharding import local
from fastchargpt.step import TrainStep

__all__ = ["NumberWatch", "first_not_finite", "is_out_of_memory"]

# The scaler begins at 2**16 and halves at each overflow: after so many in a row no scale is left that could help.
MAX_OVERFLOWS_IN_A_ROW = 40


@dataclass(frozen=True)
class _Unread:
    """Figures of one step, still on the device."""

    iteration: int
    loss: Tensor
    # norm of the whole gradient, and of each parameter's; None where nothing is clipped
    norm: Tensor | None
    norms: Tensor | None
    rate: float


class NumberWatch:
    """Holds each step's figures on the device and reads them only when asked, so that no step waits for the device.

    Where several processes share the steps, all of them read at the same time, and find the same.

    Args:
        step: whose figures they are.
        last_good: a clause that names the last good checkpoint, for the messages.
        log: takes a line when steps were skipped.
    """

    def __init__(self, step: TrainStep, *, last_good: Callable[[], str], log: Callable[[str], None]) -> None:
        self._step, self._last_good, self._log = step, last_good, log
        self._unread: list[_Unread] = []
        self._overflows = 0  # in a row

    def note(self, loss: Tensor) -> None:
        """Remember the loss and the gradient norms of the step just taken, without reading them."""
        step = self._step
        self._unread.append(_Unread(step.iteration - 1, loss, step.grad_norm, step.grad_norms, step.learning_rate))

    def read(self) -> float:
        """The newest loss, once everything noted since the last call was found finite; nan where there was nothing.

        Under a gradient scaler a gradient beyond range is no fault: the scaler skipped that step. It becomes one when
        no scale helps.

        Raises:
            TrainingError: a loss or a gradient is not finite; the message names the step, the learning rate, the norm
                and, where one is to blame, the parameter.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return math.nan
        losses = self._step.parallel.mean(torch.stack([figures.loss for figures in unread])).tolist()
        norms = [figures.norm for figures in unread if figures.norm is not None]
        totals = torch.stack(norms).tolist() if len(norms) == len(unread) else [0.0] * len(unread)
        skipped: list[_Unread] = []
        for figures, loss, total in zip(unread, losses, totals, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._sentence(f"the loss is {loss}", figures))
            if math.isfinite(total):
                self._overflows = 0
                continue
            if not self._step.precision.needs_scaler or self._overflows == MAX_OVERFLOWS_IN_A_ROW:
                raise TrainingError(self._sentence(f"the gradient of {self._culprit(figures)} is not finite", figures))
            self._overflows += 1
            skipped.append(figures)
        if skipped:
            self._log(
                f"skipped {len(skipped)} of {len(unread)} steps, the last at {skipped[-1].iteration}: the scaled "
                f"gradient of {self._culprit(skipped[-1])} left fp16's range, so the scale was halved"
            )
        newest: float = losses[-1]
        return newest

    def _culprit(self, figures: _Unread) -> str:
        """The first parameter whose gradient is not finite; where only the sum overflowed, the one with the largest."""
        if figures.norms is None:
            return "a parameter"
        norms = figures.norms.tolist()
        at = next((i for i, norm in enumerate(norms) if not math.isfinite(norm)), norms.index(max(norms)))
        return self._step.norm_names[at]

    def _sentence(self, what: str, figures: _Unread) -> str:
        norm = "" if figures.norm is None else f", gradient norm {float(figures.norm):.3g}"
        return (
            f"{what} at step {figures.iteration} (learning rate {figures.rate:.3g}{norm}): "
            f"lower --learning-rate or --grad-clip; {self._last_good()}"
        )


def first_not_finite(model: nn.Module, parallel: Parallel | None = None) -> str | None:
    """The name of the first parameter that holds a value that is not finite on any process, or None."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    broken = torch.stack([(~torch.isfinite(local(parameter))).any() for parameter in parameters])
    counts = (broken.int() if parallel is None else parallel.total(broken.int())).tolist()
    return next((name for name, count in zip(names, counts, strict=True) if count), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a device's or the machine's way to say that no memory is left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
