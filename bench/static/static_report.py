"""The static speed report: every figure is an ESTIMATE from machine code and byte counts; nothing runs on a GPU.

    python bench/static/static_report.py            # prints tables in Markdown, writes bench/results/static.csv
    python bench/static/static_report.py sm_90 --head-dim 64

For each target and shape: the bound of the package's own kernels, and beside its backward the textbook's (three
launches: delta, dK and dV, dQ), written and judged in the same way, with the best of its own block sizes. Shapes keep
the work of a training step: width 384 (heads = 384 / head_dim) and 16,384 tokens (batch = 16,384 / T).

How a row comes about: record_launches() notes what the package's host code would launch on the target, compile_launch()
makes the machine code, the interpreter counts loop trips, products and bytes for one head, cost_model.py puts them
together. Every launch is taken to find the L2 cache cold, which is right for the sizes here (88 MB and more for a
backward) and unfair to kernels that follow one another closely on small ones.
"""

import argparse
import csv
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests")]  # run as a script: the gate's equipment lives with the tests

from aot import compile_launch, record_launches  # noqa: E402
from cost_model import LAUNCH_SECONDS, Estimate, estimate  # noqa: E402
from gate import problems  # noqa: E402
from launches import Case, run_backward, run_kernel  # noqa: E402
from peaks import PEAKS  # noqa: E402
from strict_interpreter import strict_interpreter  # noqa: E402
from textbook_backward import textbook_backward  # noqa: E402
from work_counter import LaunchWork, LoopWork, WorkCounter  # noqa: E402

from fastchargpt.kernels.tuning import Config, known_archs, plan_for  # noqa: E402

__all__ = ["COLUMNS", "Row", "count_work", "extended", "own", "rows", "textbook", "to_markdown"]

SEQUENCES = (64, 128, 256, 512, 1024, 2048)
COUNTED = (128, 256, 512)  # where the work of longer sequences is extrapolated from
HEAD_DIMS = (32, 64, 128)
WIDTH, TOKENS = 384, 16384
ENTERS_EVERY_LOOP = 512  # a sequence of several blocks of any size in the tables
BEYOND_SHORT = 1 << 20  # a sequence that no one-launch backward serves
# Block sizes (owned, walked over), warps, stages that the textbook may choose from, by head_dim: at 128 also those that
# the package's own tables take there.
_USUAL = ((64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (32, 32, 4, 2), (64, 32, 4, 1))
TEXTBOOK = {32: _USUAL, 64: _USUAL, 128: (*_USUAL, (64, 64, 8, 2), (64, 16, 4, 2), (128, 32, 8, 2))}


class Row(NamedTuple):
    """One line of the report; its fields are the columns of the CSV."""

    target: str
    gpu: str
    direction: str
    implementation: str
    T: int
    head_dim: int
    batch: int
    heads: int
    launches: int
    matrix_products: float  # in units of one exact causal T x T x D product; 2 are needed forward, 5 backward
    megabytes: float
    megabytes_lower_bound: float
    limiter: str
    peak_percent_overlapped: float
    peak_percent_serial: float
    us_overlapped: float
    us_serial: float
    us_overlapped_with_launches: float
    registers: str
    blocks: str
    tensor_work_repeated: float
    note: str = "estimate"


COLUMNS = Row._fields
Run = Callable[[int, int, int, int, str], None]  # batch, heads, T, head_dim, device: launches what is to be judged


@functools.cache
def textbook(settings: tuple[int, int, int, int]) -> Run:
    """The textbook backward with these settings."""
    own, walk, warps, stages = settings

    def run(batch: int, heads: int, n_ctx: int, head_dim: int, device: str) -> None:
        q, k, v, out, dout = (
            torch.zeros(batch, heads, n_ctx, head_dim, dtype=torch.bfloat16, device=device) for _ in range(5)
        )
        lse = torch.zeros(batch, heads, n_ctx, device=device)
        textbook_backward(q, k, v, out, lse, dout, blocks=(own, walk), num_warps=warps, num_stages=stages)

    return run


@functools.cache
def own(configs: tuple[Config, ...]) -> Run:
    """The package's forward, or its backward in one launch or two."""

    def run(batch: int, heads: int, n_ctx: int, head_dim: int, device: str) -> None:
        case = Case(dtype=torch.bfloat16, head_dim=head_dim, length=n_ctx, batch=batch, heads=heads, kv_heads=heads)
        if configs[0].kernel == "forward":
            run_kernel(configs[0], case, device)
        else:
            run_backward(configs, case, device)

    return run


@functools.cache
def count_work(run: Run, n_ctx: int, head_dim: int, target: str) -> list[LaunchWork]:
    """What one head's launches do, counted in the interpreter; for long sequences extrapolated, exactly."""
    if n_ctx > COUNTED[-1]:
        return extended({length: count_work(run, length, head_dim, target) for length in COUNTED}, n_ctx)
    with strict_interpreter(counter=WorkCounter(), poison=False, target=target) as counter:
        run(1, 1, n_ctx, head_dim, "cpu")
    return counter.launches


def extended(counted: dict[int, list[LaunchWork]], n_ctx: int) -> list[LaunchWork]:
    """The work at n_ctx from that at three shorter lengths, all of them multiples of every block size.

    Trips, products and bytes of causal attention are then polynomials of degree two in the number of blocks, and three
    points give the polynomial.
    """
    weights = {
        x: math.prod((Fraction(n_ctx - other, x - other) for other in counted if other != x), start=Fraction(1))
        for x in counted
    }

    def at(values: Iterable[int]) -> int:
        value = sum((weight * number for weight, number in zip(weights.values(), values, strict=True)), Fraction(0))
        assert value.denominator == 1, "the lengths counted are no multiples of the blocks"
        return int(value)

    found = []
    for works in zip(*counted.values(), strict=True):
        names = ("programs", "loaded", "stored", "unique_loaded", "unique_stored", "exponentials")
        shapes = dict.fromkeys(shape for work in works for shape in work.products)
        loops = list(zip(*(work.loops for work in works), strict=True))
        found.append(
            LaunchWork(
                works[0].kernel,
                **{name: at(getattr(work, name) for work in works) for name in names},
                products=Counter({shape: at(work.products[shape] for work in works) for shape in shapes}),
                loops=[
                    LoopWork(*(at(getattr(x, name) for x in loop) for name in ("trips", "products", "branches")))
                    for loop in loops
                ],
            )
        )
    return found


def bound(
    run: Run, target: str, n_ctx: int, head_dim: int, blocks: str, *, direction: str, implementation: str, longest: int
) -> tuple[Row, list[str]]:
    """The report's row for one way to run one shape, and whatever the compile gate has against it."""
    peak = PEAKS[target]
    batch, heads = TOKENS // n_ctx, WIDTH // head_dim
    with record_launches(target) as launches:
        run(batch, heads, n_ctx, head_dim, "meta")
    reports = [compile_launch(launch, target) for launch in launches]
    works = count_work(run, n_ctx, head_dim, target)
    everywhere = count_work(run, longest, head_dim, target)  # long enough to enter every loop
    estimates: list[Estimate] = []
    for report, work, whole in zip(reports, works, everywhere, strict=True):
        assert report.kernel == work.kernel == whole.kernel
        matrix_loops = [at for at, loop in enumerate(whole.loops) if loop.products]
        estimates.append(estimate(report, work, batch * heads, peak, matrix_loops))
    overlapped = sum(item.overlapped for item in estimates)
    serial = sum(item.serial for item in estimates)
    needed = 2 if direction == "forward" else 5
    triangle = n_ctx * (n_ctx + 1) / 2 * head_dim
    useful = 2 * needed * triangle * batch * heads / peak.tensor_flops
    slowest = max(estimates, key=lambda item: item.overlapped)
    multiplying = [item.tensor_repeated for item in estimates if item.tensor_repeated]
    row = Row(
        target=target,
        gpu=peak.model,
        T=n_ctx,
        head_dim=head_dim,
        batch=batch,
        heads=heads,
        launches=len(launches),
        matrix_products=round(sum(work.multiply_adds for work in works) / triangle, 2),
        megabytes=round(sum(work.unique_loaded + work.unique_stored for work in works) * batch * heads / 1e6, 2),
        megabytes_lower_bound=round(_fewest_bytes(direction, n_ctx, head_dim) * batch * heads / 1e6, 2),
        limiter=slowest.limiter,
        peak_percent_overlapped=round(100 * useful / overlapped, 1),
        peak_percent_serial=round(100 * useful / serial, 1),
        us_overlapped=round(1e6 * overlapped, 1),
        us_serial=round(1e6 * serial, 1),
        us_overlapped_with_launches=round(1e6 * (overlapped + LAUNCH_SECONDS * len(launches)), 1),
        registers=" ".join(str(report.registers) for report in reports),
        blocks=blocks,
        tensor_work_repeated=round(max(multiplying, default=0.0), 2),
        direction=direction,
        implementation=implementation,
    )
    return row, [problem for pair in zip(launches, reports, strict=True) for problem in problems(*pair)]


def _fewest_bytes(direction: str, n_ctx: int, head_dim: int) -> int:
    """Forward: read q, k, v, write out and lse. Backward: read q, k, v and dout, write dq, dk and dv."""
    matrix = 2 * n_ctx * head_dim
    return 4 * matrix + 4 * n_ctx if direction == "forward" else 7 * matrix


def textbook_row(target: str, n_ctx: int, head_dim: int) -> Row:
    """The fastest of the textbook's settings that pass the gate, or of all, marked, if none does."""
    found = []
    for settings in TEXTBOOK[head_dim]:
        if settings[0] > max(n_ctx, 32):
            continue  # more than the sequence
        blocks = "{}x{} w{} s{}".format(*settings)
        row, objections = bound(
            textbook(settings),
            target,
            n_ctx,
            head_dim,
            blocks,
            direction="backward",
            implementation="textbook",
            longest=ENTERS_EVERY_LOOP,
        )
        note = "estimate; spills" if objections else "estimate"
        found.append(row._replace(note=note))
    return min(found, key=lambda row: (row.note, row.us_overlapped, row.us_serial))


def own_rows(target: str, n_ctx: int, head_dim: int) -> Iterable[Row]:
    """The package's forward and backward by its table; where the backward takes one launch, the two-launch one too."""
    plan = plan_for(target, "half", head_dim, n_ctx, False)
    yield _own_row((plan.forward,), "forward", "fastchargpt", target, n_ctx, head_dim)
    yield _own_row(plan.backward, "backward", "fastchargpt", target, n_ctx, head_dim)
    if len(plan.backward) == 1:
        tiled = plan_for(target, "half", head_dim, BEYOND_SHORT, False).backward
        yield _own_row(tiled, "backward", "fastchargpt, two launches", target, n_ctx, head_dim)


def _own_row(
    configs: tuple[Config, ...], direction: str, implementation: str, target: str, n_ctx: int, head_dim: int
) -> Row:
    blocks = " + ".join(map(str, configs))
    longest = n_ctx if configs[0].kernel == "tile" else ENTERS_EVERY_LOOP
    row, objections = bound(
        own(configs),
        target,
        n_ctx,
        head_dim,
        blocks,
        direction=direction,
        implementation=implementation,
        longest=longest,
    )
    return row._replace(note="estimate; fails the gate") if objections else row


def rows(targets: Iterable[str], head_dims: Iterable[int] = HEAD_DIMS) -> Iterable[Row]:
    """All rows of the report, shape by shape."""
    for target in targets:
        for head_dim in head_dims:
            for n_ctx in SEQUENCES:
                yield from own_rows(target, n_ctx, head_dim)
                yield textbook_row(target, n_ctx, head_dim)


def to_markdown(report: Iterable[Row]) -> str:
    """The rows that people compare, as a table."""
    shown = (
        "target", "direction", "implementation", "T", "head_dim", "launches", "matrix_products", "megabytes",
        "megabytes_lower_bound", "limiter", "peak_percent_overlapped", "peak_percent_serial",
        "us_overlapped_with_launches",
    )  # fmt: skip
    lines = ["All figures are ESTIMATES from machine code and byte counts; nothing was run on a GPU.", ""]
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(str(getattr(row, name)) for name in shown) + " |" for row in report]
    return "\n".join(lines)


def write(report: list[Row], path: Path) -> None:
    """Write the rows as CSV, in place of those for the same targets and head_dims; others stay."""
    new = {(row.target, str(row.head_dim)) for row in report}
    lines = [tuple(map(str, row)) for row in report]
    if path.exists():
        with path.open(newline="") as file:
            lines += [
                tuple(row.values()) for row in csv.DictReader(file) if (row["target"], row["head_dim"]) not in new
            ]
    order = [COLUMNS.index(name) for name in ("target", "head_dim", "T", "direction", "implementation")]
    lines.sort(key=lambda line: [int(line[at]) if line[at].isdigit() else line[at] for at in order])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=known_archs(), help="such as sm_90; default: all with a table")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, nargs="*", default=list(HEAD_DIMS))
    parser.add_argument("--csv", type=Path, default=HERE.parent / "results" / "static.csv")
    arguments = parser.parse_args()
    report: list[Row] = []
    for target, head_dim in itertools.product(arguments.targets, arguments.head_dim):
        report += rows([target], [head_dim])
        write(report, arguments.csv)  # each time: a run that is broken off need not start again
    print(to_markdown(report))


if __name__ == "__main__":
    main()
