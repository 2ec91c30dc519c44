"""A run, or two of them, as Markdown and as one HTML page that needs nothing else."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fastchargpt.bench.charts import chart
from fastchargpt.bench.page import PAGE
from fastchargpt.bench.runs import Change, Row, Run, changes, load_run, rivalries

__all__ = ["machine_lines", "to_html", "to_markdown", "write_report"]

BUSY = 0.2  # processors that other work may have had for a run to count as quiet
NO_GPU = "No GPU took part in this run: every figure was measured on a CPU."


@dataclass(frozen=True)
class Table:
    """A heading, column names and rows of cells; the first column is text, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    # each row's share of the longest, for a bar in its second column; none where empty
    bars: Sequence[float] = ()


def write_report(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write `out` (HTML) and the same with the ending .md, for one result file or two (before, after).

    Raises:
        ConfigError: a file is no result.
    """
    runs = [load_run(path) for path in paths]
    markdown = out.with_suffix(".md")
    out.write_text(to_html(runs), encoding="utf-8")
    markdown.write_text(to_markdown(runs), encoding="utf-8")
    return [out, markdown]


def to_markdown(runs: Sequence[Run]) -> str:
    """The tables of a report, without its charts."""
    parts = ["# fastchargpt benchmarks", ""]
    for run in runs:
        parts += [f"**{run.name}**", "", *(f"- {line}" for line in machine_lines(run)), ""]
    for heading, tables in _sections(runs):
        parts += [f"## {heading}", ""]
        for table in tables:
            if table.title:
                parts += [f"### {table.title}", ""]
            parts.append("| " + " | ".join(table.columns) + " |")
            parts.append("|" + " --- |" + " ---: |" * (len(table.columns) - 1))
            parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
            parts.append("")
    return "\n".join(parts)


def to_html(runs: Sequence[Run]) -> str:
    """The whole report as a page: no script, nothing loaded from elsewhere, light and dark by the reader's setting."""
    parts = []
    for run in runs:
        items = "".join(f"<li>{escape(line)}</li>" for line in machine_lines(run))
        parts.append(f'<section class="machine"><h2>{escape(run.name)}</h2><ul>{items}</ul></section>')
    figures = _figures(runs[-1])
    if figures:
        parts.append(f'<section><h2>Pictures</h2><div class="figures">{"".join(figures)}</div></section>')
    for heading, tables in _sections(runs):
        parts.append(f"<section><h2>{escape(heading)}</h2>{''.join(map(_html_table, tables))}</section>")
    return PAGE.replace("<!-- body -->", "\n".join(parts))


def machine_lines(run: Run) -> list[str]:
    """What the run was made on and with, in words."""
    machine = run.machine
    gpu = machine.get("device_type") == "cuda"
    lines = [] if gpu else [NO_GPU]
    lines.append(f"device: {machine.get('device')}" + ("" if gpu else f", torch threads: {machine.get('threads')}"))
    if gpu:
        lines.append(
            f"capability {machine.get('capability')}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}, "
            f"clocks and power limit {machine.get('clocks') or 'not told'}"
        )
    for name, roof in machine.get("roof", {}).items():
        lines.append(
            f"measured ceilings: {roof['flops'] / 1e12:.3g} TFLOP/s of {name} products, "
            f"{roof['bandwidth'] / 1e9:.3g} GB/s"
        )
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("fastchargpt", "torch", "python"))
    lines.append(f"{versions}, {machine.get('system')}; commit {machine.get('commit') or 'unknown'}")
    peers = ", ".join(f"{name} at {commit or 'an unknown commit'}" for name, commit in machine.get("peers", {}).items())
    lines.append(f"settings: {'quick' if machine.get('quick') else 'full'}; peers: {peers or 'none'}")
    others = machine.get("others")
    if others is not None and others > BUSY and not gpu:
        lines.append(
            f"the machine was busy: other work took {others:.1f} processors on average; compare within a contest, not "
            "with other runs"
        )
    return lines


def _sections(runs: Sequence[Run]) -> list[tuple[str, list[Table]]]:
    run = runs[-1]
    sections = []
    if len(runs) == 2:
        sections.append((f"{runs[0].name} against {runs[1].name}", [_change_table(changes(*runs))]))
    rivals = list(rivalries(run))
    if rivals:
        sections.append(("Ours against the best peer", [_rival_table(rivals)]))
    for subject in run.subjects:
        tables = [_contest_table(name, rows) for name, rows in run.contests(subject).items()]
        sections.append((subject.capitalize(), tables))
    if run.not_ranked:
        sections.append(("Not ranked", [_absent_table(run.not_ranked)]))
    return sections


def _contest_table(name: str, rows: Sequence[Row]) -> Table:
    best, worst = rows[0].median, rows[-1].median
    extras: list[tuple[str, str, Callable[[float], str]]] = [
        ("TFLOP/s", "flops_per_s", lambda value: f"{value / 1e12:.3g}"),
        ("GB/s of floor", "bytes_per_s", lambda value: f"{value / 1e9:.3g}"),
        ("tokens/s", "tokens_per_s", lambda value: f"{value:,.0f}"),
        ("MB/s", "MB_per_s", lambda value: f"{value:,.0f}"),
        ("of measured peak", "roof_share", lambda value: f"{value:.0%}"),
        ("of the bound", "floor_share", lambda value: f"{value:.0%}"),
        ("tokens a pass", "tokens_per_pass", lambda value: f"{value:.2f}"),
        ("bits a token", "bits_per_token", lambda value: f"{value:.4f}"),
        ("peak memory", "peak_bytes", _bytes),
        ("loss", "loss", lambda value: f"{value:.4f}"),
        ("after steps", "loss_after_steps", lambda value: f"{value:.0f}"),
        ("first step, cold", "compile_cold_s", lambda value: f"{value:.1f} s"),
        ("first step, warm", "compile_warm_s", lambda value: f"{value:.1f} s"),
    ]
    shown = [extra for extra in extras if any(extra[1] in row.facts for row in rows)]
    cells = [
        [
            row.contestant,
            _seconds(row.median),
            f"{_seconds(row.p20)} to {_seconds(row.p80)}",
            f"{row.median / best:.2f}x",
            *(form(row.facts[key]) if key in row.facts else "" for _, key, form in shown),
        ]
        for row in rows
    ]
    columns = ["contestant", "median", "p20 to p80", "of the best", *(title for title, _, _ in shown)]
    return Table(name, columns, cells, bars=[row.median / worst for row in rows])


def _rival_table(rivals: Iterable[tuple[Row, Row]]) -> Table:
    cells = []
    for ours, peer in sorted(rivals, key=lambda pair: pair[1].median / pair[0].median):
        ratio = peer.median / ours.median
        word = "faster" if ours.p80 < peer.p20 else "slower" if ours.p20 > peer.p80 else "within noise"
        cells.append([ours.contest, ours.contestant, peer.contestant, f"{ratio:.2f}x", word])
    return Table("The worst for us first", ["contest", "ours", "best peer", "peer's time over ours", "we are"], cells)


def _change_table(found: Sequence[Change]) -> Table:
    cells = [
        [
            f"{change.after.contest}, {change.after.contestant}",
            _seconds(change.before.median),
            _seconds(change.after.median),
            f"{change.ratio:.2f}x",
            f"{change.drift:.2f}x",
            f"{change.before.p20 / change.before.median:.2f} to {change.before.p80 / change.before.median:.2f}",
            "within noise" if change.verdict == "same" else change.verdict,
        ]
        for change in found
    ]
    columns = ["contest", "before", "after", "after over before", "others' code", "noise band before", "verdict"]
    return Table("Times, the most slowed-down first", columns, cells)


def _absent_table(entries: Sequence[dict[str, str]]) -> Table:
    grouped: dict[tuple[str, str, str], int] = {}
    for entry in sorted(entries, key=lambda entry: entry["kind"] != "wrong"):
        key = (entry["contestant"], entry["kind"], entry["reason"])
        grouped[key] = grouped.get(key, 0) + 1
    cells = [[name, kind, str(count), reason] for (name, kind, reason), count in grouped.items()]
    return Table("", ["contestant", "wrong or absent", "contests", "why"], cells)


def _figures(run: Run) -> list[str]:
    """Time and memory against T by dtype, pass and head size; then the roofline."""
    panels: dict[tuple[str, str, int], list[Row]] = {}
    for row in run.rows:
        if row.subject == "attention":
            key = (row.facts["dtype"], row.facts["what"], row.facts["head_dim"])
            panels.setdefault(key, []).append(row)
    figures = []
    for (dtype, what, head_dim), rows in panels.items():
        if len({row.facts["time"] for row in rows}) < 2:
            continue
        title = f"Attention {what}, {dtype}, head_dim {head_dim}"
        shared: dict[str, Any] = {"x_label": "sequence length", "x_format": lambda x: f"{x:.0f}"}
        speed = _series(rows, lambda row: row.median)
        figures.append(chart(speed, title=title, y_label="median time", y_format=_seconds, **shared))
        memory = _series(rows, lambda row: row.facts.get("peak_bytes", 0))
        figures.append(
            chart(memory, title=f"{title}: memory", y_label="peak memory", y_format=_bytes, binary=True, **shared)
        )
    roofs = run.machine.get("roof", {})
    for dtype in dict.fromkeys(dtype for dtype, _, _ in panels):
        rows = [row for key, found in panels.items() if key[0] == dtype for row in found]
        roof = roofs.get(dtype) or roofs.get("bf16" if dtype == "fp16" else "fp32")
        if rows and roof:
            figures.append(_roofline(dtype, rows, roof))
    return [figure for figure in figures if figure]


def _series(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row.facts["time"]):
        if value(row) > 0:
            series.setdefault(row.contestant, []).append((row.facts["time"], value(row)))
    return series


def _roofline(dtype: str, rows: Sequence[Row], roof: dict[str, float]) -> str:
    """Achieved operations a second over the operations a byte that the shape allows, under the measured ceilings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        intensity = row.facts["flops"] / row.facts["bytes"]
        points.setdefault(row.contestant, []).append((intensity, row.facts["flops_per_s"]))
    xs = [x for values in points.values() for x, _ in values]
    low, high = min(xs) / 1.5, max(xs) * 1.5
    knee = roof["flops"] / roof["bandwidth"]
    ceiling = [(x, min(roof["flops"], x * roof["bandwidth"])) for x in sorted({low, min(max(knee, low), high), high})]
    return chart(
        points,
        title=f"Roofline of attention, {dtype}: the line is what products and memory allow",
        x_label="operations per byte that must move",
        y_label="operations per second",
        x_format=lambda x: f"{x:.3g}",
        y_format=lambda y: f"{y / 1e12:.3g} T" if y >= 1e12 else f"{y / 1e9:.3g} G",
        lines={"ceiling": ceiling},
        joined=False,
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        style = f' style="--share:{table.bars[number]:.3f}"' if table.bars else ""
        cells = "".join(f"<td{style if i == 1 else ''}>{escape(cell)}</td>" for i, cell in enumerate(row))
        body.append(f"<tr>{cells}</tr>")
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    kind = ' class="bars"' if table.bars else ""
    rows = "".join(body)
    return f'{title}<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _bytes(value: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"
