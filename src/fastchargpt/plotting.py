"""The picture of a run: its losses against its steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_losses"]

INK, MUTED, TRAIN, VAL = "#22262e", "#7a828f", "#9db8d9", "#d1495b"


def plot_losses(rows: Sequence[dict[str, float]], path: Path, *, title: str) -> bool:
    """Draw training and validation loss to a PNG.

    Args:
        rows: the lines of metrics.jsonl.
        path: the picture, replaced.
        title: one line above it.

    Returns:
        Whether a picture was drawn: False without matplotlib (the extra `plot`), or with nothing to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if not val:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1, label="train, one batch")
    axes.plot(
        *zip(*val, strict=True), color=VAL, linewidth=2, marker="o", markersize=4, label="validation, whole split"
    )
    _annotate_best(axes, val)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss, nats per token", color=INK)
    # the first steps fall from ln(vocabulary) in no time; the picture is about what follows
    low = min(value for _, value in (*train, *val))
    high = max([value for step, value in val if step > 0] or [val[0][1]])
    high += 0.25 * (high - low)
    if math.isfinite(low) and math.isfinite(high) and high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.grid(color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c8cdd5")
    axes.legend(frameon=False, labelcolor=INK)
    figure.savefig(path, metadata={"Software": None})
    return True


def _annotate_best(axes: Any, val: list[tuple[float, float]]) -> None:
    step, loss = min(val, key=lambda point: point[1])
    axes.annotate(
        f"best {loss:.4f}",
        (step, loss),
        textcoords="offset points",
        xytext=(-8, 14),
        ha="right",
        color=VAL,
        fontweight="bold",
    )
