"""Compile every entry of every launch table for its target, judge it, and keep the verdicts: bench/results/gate.csv.

    python bench/static/gate_report.py              # what is not recorded yet, with the sources as they are now
    python bench/static/gate_report.py --all        # everything again
    python bench/static/gate_report.py --thorough   # fp16, far narrower heads, a window or a cap alone; not recorded
    python bench/static/gate_report.py --thorough sm_90 --head-dim 64 --dtype half      # hours in all: a part of it

tests/test_compile_gate.py compiles a part of this on every run and checks that the record covers the rest: a record
counts as long as the kernel's source, its settings and Triton's version, all in its key, are the same.
"""

import argparse
import csv
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests")]  # run as a script: the gate's equipment lives with the tests

from aot import TARGETS, Loop  # noqa: E402
from gate import judge, launches_of  # noqa: E402
from launches import Case, cases, run_kernel  # noqa: E402
from strict_interpreter import strict_interpreter  # noqa: E402
from work_counter import WorkCounter  # noqa: E402

from fastchargpt.kernels.launch import block_d  # noqa: E402
from fastchargpt.kernels.tuning import Config, Entry, known_archs, load_table  # noqa: E402

__all__ = ["RECORD", "Row", "everything", "key_of", "read_record", "to_markdown", "variant_of"]

SHOWN = ("target", "kernel", "dtype", "head_dim", "max_length", "dropout", "variant", "verdict")  # while it runs
RECORD = HERE.parent / "results" / "gate.csv"
COUNTED_LENGTH = 256  # sequence for which products and bytes are counted, where the entry serves it


class Row(NamedTuple):
    """One entry in one case; its fields are the columns of the CSV."""

    key: str
    target: str
    kernel: str
    dtype: str
    head_dim: int
    max_length: str
    dropout: bool
    variant: str  # what `variant_of` says
    block_m: int
    block_n: int
    warps: int
    stages: int
    max_registers: int | str  # where the settings have one
    launches: int
    registers: str
    spills: str
    stack: str
    shared: str
    shared_limit: int
    tensor_memory: str
    instructions: str
    instructions_per_tile: str  # of each loop with products in it, "+" those for a mask; none if the kernel is one tile
    matrix_instructions_per_tile: str
    length: int  # of the sequence that the next three are counted for, where attention is plain
    matrix_products: float | str  # in units of one exact causal T x T x D product
    bytes_per_head: int | str  # each address once
    bytes_lower_bound: int | str
    verdict: str


def variant_of(case: Case) -> str:
    """What a case has besides plain attention, in words.

    Ragged: T is no multiple of the block. Grouped: heads share keys. Narrow: heads are not as wide as a tile.
    """
    found = {name: getattr(case, name) is not None for name in ("window", "softcap")} | {
        "ragged": case.length % 2,
        "unmasked": not case.causal,
        "grouped": case.kv_heads < case.heads,
        "narrow": case.head_dim < block_d(case.head_dim),
    }
    return " ".join(name for name, there in found.items() if there)


def key_of(config: Config, case: Case, target: str) -> str:
    """Names the machine code of an entry in a case."""
    return "+".join(launch.key(target)[:16] for launch in launches_of(config, case, target))


def read_record(path: Path = RECORD) -> dict[str, str]:
    """Verdicts by key."""
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["key"]: row["verdict"] for row in csv.DictReader(file)}


def write_record(rows: list[Row], path: Path = RECORD) -> None:
    """Write the record, sorted by target and kernel."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted({tuple(map(str, row)) for row in rows}, key=lambda fields: fields[1:]))


@functools.cache
def _work(config: Config, head_dim: int, dtype: object, length: int) -> tuple[float, int, int]:
    """Products, bytes moved and the fewest bytes possible, for one head."""
    case = Case(dtype=dtype, head_dim=head_dim, length=length, batch=1, heads=1, kv_heads=1)
    with strict_interpreter(counter=WorkCounter(), poison=False) as counter:
        run_kernel(config, case, "cpu")
    works = counter.launches
    if config.kernel in ("dq", "dkdv"):
        works = [work for work in works if f"_{config.kernel}_" in work.kernel]
    queries = 1 if config.kernel == "decode" else length
    area = length if config.kernel == "decode" else length * (length + 1) / 2
    products = sum(work.multiply_adds for work in works) / (area * head_dim)
    moved = sum(work.unique_loaded + work.unique_stored for work in works)
    q, k, size = queries * head_dim, length * head_dim, case.dtype.itemsize
    fewest = {
        "forward": (2 * q + 2 * k) * size + 4 * queries,
        "decode": (2 * q + 2 * k) * size + 4 * queries,
        "tile": (3 * q + 4 * k) * size,
        "blocks": (3 * q + 4 * k) * size,
        "dq": (3 * q + 2 * k) * size,
        "dkdv": (2 * q + 4 * k) * size,
    }[config.kernel]
    return round(products, 2), moved, fewest


def _reach(entry: Entry) -> str:
    return str(entry.max_length or "any")


def judge_entry(arguments: tuple[str, Entry, Case], *, counted: bool = True) -> Row:
    """Compile and judge one entry in one case; `counted`: count its products and bytes too, in the interpreter."""
    target, entry, case = arguments
    config = entry.config
    judgements = judge(config, case, target)
    reports = [judgement.report for judgement in judgements if judgement.report]
    problems = [problem for judgement in judgements for problem in judgement.problems]
    loops = [loop for report in reports for loop in report.matrix_loops]
    length = min(entry.max_length or COUNTED_LENGTH, COUNTED_LENGTH)
    work = _work(config, case.head_dim, case.dtype, length) if counted and case.plain else ("", "", "")
    products, moved, fewest = work

    def each(field: str) -> str:
        return " ".join(str(getattr(report, field)) for report in reports)

    return Row(
        key=key_of(config, case, target),
        target=target,
        kernel=config.kernel,
        dtype=str(case.dtype).removeprefix("torch.") + (" tf32" if case.tf32 else ""),
        head_dim=case.head_dim,
        max_length=_reach(entry),
        dropout=case.dropout,
        variant=variant_of(case),
        block_m=config.block_m,
        block_n=config.block_n,
        warps=config.num_warps,
        stages=config.num_stages,
        max_registers=config.max_registers or "",
        launches=len(judgements),
        registers=each("registers"),
        spills=each("spills"),
        stack=each("stack"),
        shared=each("shared"),
        shared_limit=TARGETS[target].shared_limit,
        tensor_memory=each("tensor_memory"),
        instructions=" ".join(str(report.whole.instructions) for report in reports),
        instructions_per_tile=" ".join(map(_per_tile, loops)),
        matrix_instructions_per_tile=" ".join(str(loop.matrix_instructions) for loop in loops),
        length=length,
        matrix_products=products,
        bytes_per_head=moved,
        bytes_lower_bound=fewest,
        verdict="; ".join(problems) or "ok",
    )


def _per_tile(loop: Loop) -> str:
    """A round's instructions; those that only some blocks need, behind a branch, apart: "298+69"."""
    skippable = sum(loop.skippable.values())
    return f"{loop.always.instructions}+{skippable}" if skippable else str(loop.instructions)


def everything(*, thorough: bool) -> Iterator[tuple[str, Entry, Case]]:
    """Every entry of every table, in every case that it has to pass."""
    for target in known_archs():
        for entry in load_table(target):
            for case in cases(entry, load_table(target), thorough=thorough):
                yield target, entry, case


def to_markdown(rows: list[Row]) -> str:
    """The verdicts as a table."""
    shown = [name for name in Row._fields if name not in ("key", "stack", "shared_limit", "instructions")]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    return "\n".join(lines + ["| " + " | ".join(str(getattr(row, name)) for name in shown) + " |" for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="with --thorough: only these, such as sm_90")
    parser.add_argument("--head-dim", type=int, nargs="+", help="with --thorough: only entries of these")
    parser.add_argument("--dtype", choices=("half", "fp32"), help="with --thorough: only entries of this")
    parser.add_argument("--all", action="store_true", help="judge recorded entries again")
    parser.add_argument("--thorough", action="store_true", help="more variants; prints failures, records nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    todo = list(everything(thorough=arguments.thorough))
    if arguments.thorough:
        todo = [
            (target, entry, case)
            for target, entry, case in todo
            if target in (arguments.targets or [target])
            and entry.head_dim in (arguments.head_dim or [entry.head_dim])
            and entry.dtype == (arguments.dtype or entry.dtype)
        ]
    elif arguments.targets or arguments.head_dim or arguments.dtype:
        parser.error("the record is of everything: targets, --head-dim and --dtype go with --thorough")
    kept: list[Row] = []
    if not arguments.all and not arguments.thorough and RECORD.exists():
        with RECORD.open() as file:
            table = csv.DictReader(file)
            same = tuple(table.fieldnames or ()) == Row._fields  # else it was written with other columns
            recorded = {(row["key"], row["max_length"]): Row(**row) for row in table} if same else {}
        keys = [(key_of(entry.config, case, target), _reach(entry)) for target, entry, case in todo]
        kept = [recorded[key] for key in keys if key in recorded]
        todo = [item for item, key in zip(todo, keys, strict=True) if key not in recorded]
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for row in pool.imap(functools.partial(judge_entry, counted=not arguments.thorough), todo):
            rows.append(row)
            print(*(getattr(row, name) for name in SHOWN), flush=True)
            if not arguments.thorough:
                write_record(kept + rows)  # each time: a run that is broken off need not start again
    if not arguments.thorough:
        write_record(kept + rows)  # where there was nothing to judge, there may still be less to record
    failed = [row for row in rows if row.verdict != "ok"]
    print(to_markdown(kept + rows))
    print(f"{len(rows)} judged, {len(kept)} kept, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
