"""Where a run's figures go: metrics.jsonl, and any object with `.log(dict, step=)`."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from fastchargpt.errors import OutDirError

__all__ = ["JsonlMetrics", "MetricsLogger", "TensorBoardMetrics", "read_metrics"]


# a line of ours has a dozen numbers; what is longer is foreign, and is read in pieces that are no JSON
MAX_LINE_BYTES = 1 << 16


class MetricsLogger(Protocol):
    """What the trainer reports to: wandb's run object fits as it is."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> object:
        """Take the figures of a step."""


class JsonlMetrics:
    """One JSON object a line, `{"step": N, ...}`, each line written whole.

    Args:
        path: the file, appended to.
        resume_step: the steps already taken by a resumed run; what was written of later ones is dropped, because the
            run writes it again. The evaluation before that step stays, the loss of that step itself does not.

    Raises:
        OutDirError: the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._path = path
        rows = [] if resume_step is None else [row for row in read_metrics(path) if _is_before(row, resume_step)]
        partial = path.with_name(path.name + ".new")
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise OutDirError(f"{path} cannot be written ({error.strerror})") from error

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append a line."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise OutDirError(f"{self._path} cannot be written ({error.strerror}): free some space") from error


class TensorBoardMetrics:
    """TensorBoard event files in a folder (needs the extra `tensorboard`)."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write each figure as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, none where there is no file.

    A line that a kill cut short, or that is not an object of finite numbers with a step, is left out.

    Raises:
        OutDirError: the file cannot be read.
    """
    if not path.is_file():
        return []
    rows = []
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                row = _row(line)
                if row is not None:
                    rows.append(row)
    except OSError as error:
        raise OutDirError(f"{path} cannot be read ({error.strerror})") from error
    return rows


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
        return None
    if any(type(value) not in (int, float) or not _is_finite(value) for value in row.values()):
        return None
    return row


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_before(row: Mapping[str, float], step: int) -> bool:
    return row["step"] < step or (row["step"] == step and "val_loss" in row)
