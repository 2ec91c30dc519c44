"""Where a run's figures go: metrics.jsonl, and any object with `.log(dict, step=)`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

__all__ = ["JsonlMetrics", "MetricsLogger", "TensorBoardMetrics", "read_metrics"]


class MetricsLogger(Protocol):
    """What the trainer reports to: wandb's run object fits as it is."""

    def log(self, metrics: Mapping[str, float], *, step: int) -> object:
        """Take the figures of a step."""


class JsonlMetrics:
    """One JSON object a line, `{"step": N, ...}`, each line written whole.

    Args:
        path: the file, appended to.
        resume_step: lines of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._path = path
        rows = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        partial = path.with_name(path.name + ".new")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


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
    """The lines of a metrics.jsonl, without a last one that a kill cut short; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
