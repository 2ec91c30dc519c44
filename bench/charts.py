"""Log-log charts as inline SVG: no script, no font, no colour of their own beyond the page's variables."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["Series", "chart"]

# name -> points (x, y), both above 0
Series = Mapping[str, Sequence[tuple[float, float]]]

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 84, 14, 12, 42
COLOURS = 8  # --c0 to --c7 of the page
DASHES = ("", "6 3", "2 3")  # a second and third round through the colours


def chart(
    series: Series,
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
    lines: Series | None = None,
    joined: bool = True,
    binary: bool = False,
) -> str:
    """A figure: the title as its caption, a legend, and the points of each series, joined or not.

    `lines` are drawn without points behind the series: ceilings, ideals. `binary`: y in powers of 2.
    """
    lines = lines or {}
    points = [point for group in (series, lines) for values in group.values() for point in values]
    points = [(x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    x_of = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_of = _axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    marked = sorted({x for values in series.values() for x, _ in values})
    ys = [y for _, y in points]
    x_ticks = marked if len(marked) <= 8 else _decades(marked[0], marked[-1])
    y_ticks = _doublings(min(ys), max(ys)) if binary else _decades(min(ys), max(ys))
    parts = [_grid([(x_of(x), x_format(x)) for x in x_ticks], [(y_of(y), y_format(y)) for y in y_ticks])]
    parts += [_polyline(values, x_of, y_of, "ceiling") for values in lines.values()]
    for number, (name, values) in enumerate(series.items()):
        style = f"--c:var(--c{number % COLOURS})"
        dash = DASHES[number // COLOURS % len(DASHES)]
        marks = "".join(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"><title>{escape(name)}: {escape(x_format(x))}, '
            f"{escape(y_format(y))}</title></circle>"
            for x, y in values
        )
        line = _polyline(values, x_of, y_of, "line", dash) if joined else ""
        parts.append(f'<g style="{style}">{line}{marks}</g>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="axis" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} class="axis" text-anchor="middle">{escape(y_label)}</text>')
    legend = "".join(
        f'<li style="--c:var(--c{number % COLOURS})"><i></i>{escape(name)}</li>' for number, name in enumerate(series)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(y_label)} against {escape(x_label)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def _axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    low, high = math.log(min(values)), math.log(max(values))
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _grid(columns: Sequence[tuple[float, str]], rows: Sequence[tuple[float, str]]) -> str:
    """Lines at the ticks (place, label) of both axes, and their labels."""
    parts = []
    for at, label in columns:
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        place = f'x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}"'
        parts.append(f'<text {place} text-anchor="middle">{escape(label)}</text>')
    for at, label in rows:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    return "".join(parts)


def _doublings(low: float, high: float) -> list[float]:
    """Powers of two between, at most a handful."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, (last - first + 5) // 6)
    return [2.0**power for power in range(first, last + 1, step) if low * 0.9 <= 2.0**power <= high * 1.1] or [
        low,
        high,
    ]


def _decades(low: float, high: float) -> list[float]:
    """Round values between: 1, 2, 5 in each decade where that is a handful, else whole decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    inside = [value for value in fine if low * 0.9 <= value <= high * 1.1]
    if len(inside) > 7:
        inside = [10.0**power for power in range(first, last + 1) if low * 0.9 <= 10.0**power <= high * 1.1]
    return inside or [low, high]


def _polyline(
    values: Sequence[tuple[float, float]],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    kind: str,
    dash: str = "",
) -> str:
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in values)
    return f'<polyline points="{path}" class="{kind}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
