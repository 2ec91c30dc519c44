"""Fill the launch tables with no GPU: for each kernel the first candidate, best first, that passes the gate.

    python bench/static/make_tables.py sm_90 gfx942     # writes kernels/tuning/sm_90.json, gfx942.json; default: all
    python bench/static/make_tables.py --kernel dq dkdv --head-dim 64 --dtype half   # these anew, others stay
    python bench/static/make_tables.py --mark           # all stay; where each may be used, anew
    python bench/static/make_tables.py --measured bench/results/h200-tuning.json   # its winners, for what it measured

An entry must pass (tests/gate.py) in every precision that it serves, with dropout and without; where only the plain
kernel passes, the entry says so and another one serves dropout; so it is with grouped heads, heads narrower than a tile
and attention without a mask. Where no candidate passes there is no entry, and the
dispatcher takes another kernel or another backend. The order of preference is by the static estimate: larger tiles move
fewer bytes, 4 warps repeat no tensor-core work, and two stages hide loads where registers allow. What a table of
`fastchargpt bench attention --tune` measured goes before that, as far as it passes.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests")]  # run as a script: the gate's equipment lives with the tests

from aot import TARGETS  # noqa: E402
from gate import judge  # noqa: E402
from launches import Case, cases  # noqa: E402

from fastchargpt.bench.tune import Measured  # noqa: E402
from fastchargpt.errors import ConfigError  # noqa: E402
from fastchargpt.kernels import tuning  # noqa: E402
from fastchargpt.kernels.tuning import KERNELS, Config, Entry, load_table, save_table  # noqa: E402

__all__ = ["HEAD_DIMS", "SHIPPED", "choose", "slots"]

TABLES = ROOT / "kernels" / "tuning"
Settings = tuple[int, ...]  # BLOCK_M, BLOCK_N, warps, stages and, where there is one, max_registers
HEAD_DIMS = (64, 128, 256)  # narrower heads take what is for 64; sm_90 has entries for 32, which were measured
# The dtype and head_dims of a target that `bench attention --tune` measured: an estimate does not replace them.
MEASURED: dict[str, tuple[str, tuple[int, ...]]] = {"sm_90": ("half", (32, 64, 128))}
SHIPPED = [name for name in TARGETS if name != "sm_75"]  # there Triton has no tensor cores: SDPA serves

# By kernel and head_dim, best first. Forward and dq own BLOCK_M queries and walk BLOCK_N keys; dkdv and blocks own
# BLOCK_N and walk BLOCK_M; tile holds the whole sequence.
HALF: dict[str, dict[int, list[Settings]]] = {
    "forward": {
        32: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
        64: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
        128: [(64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
        256: [(64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)],
    },
    "decode": {
        32: [(16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)],
        64: [(16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)],
        128: [(16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 1)],
        256: [(16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)],
    },
    "blocks": {
        32: [(32, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        64: [(32, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1)],
        128: [(32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)],
    },
    "dq": {
        32: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
        64: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
        128: [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        256: [(32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)],
    },
    "dkdv": {
        32: [(64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 1)],
        64: [(32, 64, 4, 2), (32, 64, 4, 1), (32, 32, 4, 1)],
        128: [(32, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)],
        256: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)],
    },
}
TILES: dict[int, list[Settings]] = {  # by the longest sequence
    16: [(16, 16, 2, 1), (16, 16, 4, 1)],
    32: [(32, 32, 2, 1), (32, 32, 4, 1)],
    64: [(64, 64, 4, 1), (64, 64, 8, 1)],
    128: [(128, 128, 8, 1)],
}
# Exact fp32 products are ordinary multiply-adds, which keep both operands in registers: tiles must be small.
# At head_dim 128 dq holds four of them and passes as 16 x 16 with 8 warps only; forward and dkdv pass as 32 x 32.
# Nobody has measured that against SDPA's kernels, and no table has it. At 256 dq spills in every shape.
EXACT: dict[str, list[Settings]] = {
    "forward": [(32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    "decode": [(16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)],
    "dq": [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
    "dkdv": [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1), (32, 32, 16, 1), (16, 16, 16, 1)],
}
EXACT_SPARE: list[Settings] = [(16, 16, 4, 1), (16, 16, 8, 1), (16, 16, 16, 1), (16, 32, 8, 1), (32, 32, 16, 1)]
EXACT_TILES: dict[int, list[Settings]] = {16: [(16, 16, 4, 1)], 32: [(32, 32, 4, 1), (32, 32, 8, 1)]}
# What the estimate puts before the lists above. Where warps multiply on their own (HMMA of sm_80, AMD's matrix cores),
# four warps over 128 queries read the least shared memory, which is what bounds dq; where they multiply together (WGMMA
# of sm_90, tensor memory of sm_100), eight over 128 x 64 do, and they hold dropout's registers. sm_86, sm_89 and sm_120
# have a quarter of the tensor cores to the same shared memory: there products bound, and wider diagonals only add some.
# At head_dim 128 the same holds as far as registers go. One stage stands first only where two spill or are estimated
# slower by more than a tenth: what it costs to wait for loads, the estimate does not see.
FIRST: dict[tuple[str, str, int], dict[tuple[str, ...], list[Settings]]] = {
    ("forward", "half", 128): {
        ("sm_80", "sm_100"): [(128, 64, 8, 2)],
        ("gfx942",): [(128, 32, 4, 2)],
    },
    ("forward", "half", 256): {
        ("sm_100",): [(64, 32, 8, 1, 255)],  # as the next one
    },
    ("blocks", "half", 64): {
        ("sm_100",): [(32, 64, 4, 2, 168)],  # without a cap ptxas spills at a ragged T, far below the 255 there are
    },
    ("blocks", "half", 128): {
        ("gfx942",): [(16, 64, 4, 2)],
    },
    ("dq", "half", 64): {
        ("sm_80",): [(128, 32, 4, 2), (64, 32, 4, 2)],
        ("sm_90", "sm_100"): [(128, 64, 8, 2)],
        ("gfx942",): [(128, 32, 4, 2)],
    },
    ("dq", "half", 128): {
        ("sm_80",): [(64, 64, 4, 2), (128, 32, 8, 2)],
        ("sm_100",): [(128, 64, 8, 2)],
        ("gfx942",): [(128, 32, 4, 1)],
    },
    ("dkdv", "half", 64): {
        ("sm_80",): [(32, 64, 4, 2), (32, 128, 8, 2)],
        ("sm_90", "sm_100"): [(64, 128, 8, 2)],
    },
    ("dkdv", "half", 128): {
        ("sm_90",): [(32, 64, 4, 2), (32, 128, 8, 2)],
        ("sm_100",): [(64, 128, 8, 2)],
        ("gfx942",): [(16, 64, 4, 2)],
    },
    ("dkdv", "fp32", 64): {
        ("gfx942",): [(16, 32, 4, 1)],  # in 32 x 32 a window and a soft-cap spill
    },
}
# Where the one-launch backward ends: where two launches are estimated faster by more than a tenth, whether tensor cores
# overlap with everything or with nothing (tuning/README.md has the figures).
BLOCKS_UP_TO = {
    ("sm_80", 64): 256,
    ("sm_100", 64): 256,
    ("gfx942", 64): 256,
    ("sm_80", 128): 128,
    ("sm_100", 128): 0,  # there is none: what does not fit one tile takes two launches
}
BLOCKS_UP_TO_ELSEWHERE = 512


def candidates(target: str, kernel: str, dtype: str, head_dim: int, max_length: int | None) -> list[Settings]:
    if kernel == "tile":
        return (TILES if dtype == "half" else EXACT_TILES)[max_length or 0]
    preferred = [
        settings
        for targets, found in FIRST.get((kernel, dtype, head_dim), {}).items()
        if target in targets
        for settings in found
    ]
    usual = HALF[kernel].get(head_dim, []) if dtype == "half" else EXACT.get(kernel, [])
    return list(dict.fromkeys((*preferred, *usual)))


def slots(target: str, dtypes: Iterable[str], head_dims: Iterable[int]) -> Iterator[tuple[str, str, int, int | None]]:
    """What a target's table may hold: (kernel, dtype, head_dim, longest sequence)."""
    for dtype, head_dim in itertools.product(dtypes, head_dims):
        for kernel in ("forward", "decode", "dq", "dkdv"):
            yield kernel, dtype, head_dim, None
        longest = BLOCKS_UP_TO.get((target, head_dim), BLOCKS_UP_TO_ELSEWHERE)
        if dtype == "half" and head_dim in HALF["blocks"] and longest:
            yield "blocks", dtype, head_dim, longest
        for length in TILES if dtype == "half" else EXACT_TILES:
            if length * head_dim <= 8192:
                yield "tile", dtype, head_dim, length


def _passes(config: Config, wanted: list[Case], target: str) -> bool:
    return not any(judgement.problems for case in wanted for judgement in judge(config, case, target))


def choose(target: str, kernel: str, dtype: str, head_dim: int, max_length: int | None) -> Iterator[Entry]:
    """The first candidate that passes, preferably with dropout; where that costs a better one, that one too."""
    plain: Entry | None = None
    for settings in candidates(target, kernel, dtype, head_dim, max_length):
        config = Config(kernel, *settings)
        keys = {"dtype": dtype, "head_dim": head_dim, "max_length": max_length}
        for dropout in (False, True) if kernel != "decode" else (False,):
            entry = Entry(config=config, dropout=dropout, **keys)
            wanted = [case for case in cases(entry) if case.dropout == dropout and case.plain]
            varied = [case for case in wanted if case.window is not None or case.softcap is not None]
            if not _passes(config, [case for case in wanted if case not in varied], target):
                break
            fits, bare = _passes(config, varied, target), plain.variants if plain and plain.config == config else ""
            variants = "all" if fits and bare in ("", "all") else "no dropout" if bare == "all" else "none"
            entry = dataclasses.replace(entry, variants=variants)
            plain = plain or entry
            if dropout:
                if plain.config != config:
                    yield plain
                yield entry
                return
        if plain and kernel == "decode":
            break
    if plain:
        yield plain


def winners(tuned: dict[str, Any], entries: list[Entry]) -> list[Entry]:
    """The entries, for what was measured the settings that won instead, as far as they pass, and none that is idle."""
    target = tuned["arch"]
    measured = [Measured.from_json(row) for row in tuned["measurements"]]
    won = {(*_slot(entry), entry.dropout): entry for found in measured for entry in found.entries()}
    places = {(entry.dtype, entry.head_dim) for entry in won.values()}
    others = [entry for entry in entries if (entry.dtype, entry.head_dim) not in places]
    found = []
    for entry in won.values():
        wanted = [case for case in cases(dataclasses.replace(entry, variants="none")) if case.plain]
        if _passes(entry.config, wanted, target):
            found.append(entry)
        else:
            print(target, "does not pass:", entry, flush=True)
    # Where no winner for the longest sequences passes, what does serves; what was not measured is left to wider heads.
    needed = {(*_slot(entry), entry.dropout) for entry in won.values() if entry.max_length is None}
    missing = needed - {(*_slot(entry), entry.dropout) for entry in found}
    for slot in sorted({place[:4] for place in missing}):
        found += [entry for entry in choose(target, *slot) if (*slot, entry.dropout) in missing]
    return _without_idle(target, sorted([*others, *found], key=_order))


def _without_idle(target: str, entries: list[Entry]) -> list[Entry]:
    """The entries but those without which every sequence is served by the same settings, from the same head_dim.

    Wider heads' may have no registers for calls that narrower ones have them for (`mark`).
    """
    lengths = sorted({entry.max_length or 2**30 for entry in entries})
    heads = sorted({(entry.dtype, entry.head_dim) for entry in entries})

    def plans(table: list[Entry]) -> list[tuning.Plan | None]:
        tuning.forget()
        with mock.patch.object(tuning, "load_table", return_value=tuple(table)):
            found: list[tuning.Plan | None] = []
            for (dtype, head_dim), length, dropout in itertools.product(heads, lengths, (False, True)):
                try:
                    found.append(tuning.plan_for(target, dtype, head_dim, length, dropout))
                except ConfigError:
                    found.append(None)
            return found

    wanted, before = plans(entries), len(entries) + 1
    while len(entries) < before:  # one may be idle only once another is gone
        before = len(entries)
        for entry in entries:
            rest = [other for other in entries if other is not entry]
            twins = [other for other in rest if (*_slot(other)[:3], other.config) == (*_slot(entry)[:3], entry.config)]
            if twins and plans(rest) == wanted:
                entries = rest
    tuning.forget()
    return entries


def mark(target: str, entries: list[Entry]) -> list[Entry]:
    """The entries, each saying anew where it may be used (`variants`, `calls`), and further ones for the other calls.

    Two launches serve everything, so one-launch kernels get none; where no candidate passes, an entry for wider heads
    serves.
    """
    found = [dataclasses.replace(entry, calls="all") for entry in entries if entry.calls != "other"]
    found = [dataclasses.replace(entry, variants=_variants(entry, target)) for entry in found]
    for at, entry in enumerate(found):
        rare = [case for case in cases(entry, found) if not case.plain]
        found[at] = dataclasses.replace(entry, calls="all" if _passes(entry.config, rare, target) else "plain")
    spare = []
    for kernel, dtype, head_dim in sorted({_slot(entry)[:3] for entry in found if entry.max_length is None}):
        same = [entry for entry in found if _slot(entry) == (kernel, dtype, head_dim, None)]
        more: list[Entry] = []
        for dropout in (True, False) if same[-1].dropout else (False,):
            # what holds dropout holds the rest too, but without it something better may pass
            if more or all(entry.calls == "plain" for entry in same if entry.dropout >= dropout):
                best = _spare(target, kernel, dtype, head_dim, dropout)
                more += [entry for entry in best if entry.config not in [other.config for other in more]]
        spare += more
    return found + spare


def _variants(entry: Entry, target: str) -> str:
    """Where a window and a soft-cap fit."""
    wanted = [case for case in cases(dataclasses.replace(entry, variants="all")) if case.plain]
    varied = [case for case in wanted if case.window is not None or case.softcap is not None]
    if _passes(entry.config, varied, target):
        return "all"
    fits = entry.dropout and _passes(entry.config, [case for case in varied if not case.dropout], target)
    return "no dropout" if fits else "none"


def _spare(target: str, kernel: str, dtype: str, head_dim: int, dropout: bool) -> list[Entry]:
    """The first candidate with which everything passes, or none."""
    further = EXACT_SPARE if dtype == "fp32" and kernel != "decode" else []
    for settings in (*candidates(target, kernel, dtype, head_dim, None), *further):
        config = Config(kernel, *settings)
        entry = Entry(config=config, dtype=dtype, head_dim=head_dim, max_length=None, dropout=dropout)
        bare = [case for case in cases(entry) if case.window is None and case.softcap is None]
        if _passes(config, bare, target):
            return [dataclasses.replace(entry, variants=_variants(entry, target), calls="other")]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=SHIPPED)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="only these; others stay")
    parser.add_argument("--mark", action="store_true", help="only find out where each entry may be used")
    parser.add_argument("--measured", type=Path, help="a table of bench attention --tune, for its architecture")
    parser.add_argument("--dtype", nargs="+", choices=("half", "fp32"), default=("half", "fp32"))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    arguments = parser.parse_args()
    tuned = json.loads(arguments.measured.read_text(encoding="utf-8")) if arguments.measured else None
    if tuned is not None:
        arguments.targets = [tuned["arch"]]
    for target in arguments.targets:
        path = TABLES / f"{target}.json"
        wanted = [
            slot
            for slot in slots(target, arguments.dtype, arguments.head_dim)
            if slot[0] in arguments.kernel and not _measured(target, slot) and not arguments.mark and tuned is None
        ]
        redone = {slot[:3] for slot in wanted}
        entries = [entry for entry in load_table(target) if _slot(entry)[:3] not in redone] if path.exists() else []
        for slot in wanted:
            found = list(choose(target, *slot))
            print(target, *slot, [(*vars(e.config).values(), e.dropout) for e in found], flush=True)
            entries += found
        if tuned is not None:
            entries = winners(tuned, entries)
        facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entries = mark(target, entries)
        print(
            target, "for plain calls only:", *(e.config for e in entries if e.calls == "plain"), sep="\n  ", flush=True
        )
        kept = {name: value for name, value in facts.items() if name == "measured"}
        save_table(path, target, sorted(entries, key=_order), facts=kept)


def _measured(target: str, slot: tuple[str, str, int, int | None]) -> bool:
    dtype, head_dims = MEASURED.get(target, ("", ()))
    return slot[1] == dtype and slot[2] in head_dims


def _slot(entry: Entry) -> tuple[str, str, int, int | None]:
    return entry.config.kernel, entry.dtype, entry.head_dim, entry.max_length


def _order(entry: Entry) -> tuple[object, ...]:
    kernel, dtype, head_dim, longest = _slot(entry)
    return (
        ("half", "fp32").index(dtype),
        head_dim,
        KERNELS.index(kernel),
        longest or 2**31,
        entry.dropout,
        entry.calls == "other",
    )


if __name__ == "__main__":
    main()
