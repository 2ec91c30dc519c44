"""Results as they were saved: read, checked, compared."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastchargpt.errors import ConfigError

__all__ = ["Change", "Row", "Run", "changes", "load_run", "rivalries"]

# Medians closer than this are one and the same, whatever the bands say: two quiet runs of one commit, one after the
# other, had bands apart and medians up to 13 % apart at 5 rounds, which say little of what differs from run to run.
LEAST_CHANGE, LEAST_CHANGE_QUICK, QUICK_ROUNDS = 0.08, 0.15, 11


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant's result in one contest."""

    subject: str
    contest: str
    contestant: str
    # seconds
    median: float
    p20: float
    p80: float
    # flops_per_s, bytes_per_s, tokens_per_s, peak_bytes, loss, shape, dtype, ... where the contest has them
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the suite."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]
    # contest, contestant, kind (wrong or absent) and reason of those that were not timed
    not_ranked: list[dict[str, str]]

    def contests(self, subject: str) -> dict[str, list[Row]]:
        """The contests of a subject, the fastest contestant of each first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.subject == subject:
                found.setdefault(row.contest, []).append(row)
        return {name: sorted(rows, key=lambda row: row.median) for name, rows in found.items()}

    @property
    def subjects(self) -> list[str]:
        """What the run was about, in its order."""
        return list(dict.fromkeys(row.subject for row in self.rows))


def load_run(path: Path) -> Run:
    """A run as `fastchargpt bench` or pytest-benchmark saved it.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine_info"]["fastchargpt"]
        rows = [_row(entry) for entry in content["benchmarks"]]
        return Run(name=path.stem, machine=machine, rows=rows, not_ranked=content.get("not_ranked", []))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a result of `fastchargpt bench` ({type(error).__name__}: {error})") from None


def _row(entry: dict[str, Any]) -> Row:
    facts, stats = dict(entry["extra_info"]), entry["stats"]
    if "rounds" in stats:
        facts.setdefault("rounds", stats["rounds"])
    return Row(
        subject=facts.pop("subject", _subject(entry)),
        contest=facts.pop("contest", entry["name"].partition("[")[0].removeprefix("test_").replace("_", " ")),
        contestant=facts.pop("contestant", entry.get("param") or entry["name"]),
        median=float(facts.pop("median_s", stats["median"])),
        p20=float(facts.pop("p20_s", stats["q1"])),
        p80=float(facts.pop("p80_s", stats["q3"])),
        facts=facts,
    )


def _subject(entry: dict[str, Any]) -> str:
    """From the file's name, for rows that do not say."""
    return Path(entry["fullname"].partition("::")[0]).stem.removeprefix("test_bench_")


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of a contestant from one run to another."""

    before: Row
    after: Row
    # by how much others' code in the same contest got slower meanwhile, which is the machine's doing
    drift: float = 1.0

    @property
    def ratio(self) -> float:
        """The time after over the time before: above 1 is slower."""
        return self.after.median / self.before.median if self.before.median else math.nan

    @property
    def own(self) -> float:
        """What is left of the ratio without the machine's part."""
        return self.ratio / self.drift

    @property
    def excused(self) -> bool:
        """Whether the drift alone keeps it from being called slower."""
        return self.verdict == "same" and dataclasses.replace(self, drift=1.0).verdict == "slower"

    @property
    def verdict(self) -> Literal["slower", "faster", "same"]:
        """`same` where the middle 60 % of the two runs' samples overlap, or the medians are all but equal.

        The later run is taken without the machine's drift.
        """
        few = min(row.facts.get("rounds", QUICK_ROUNDS) for row in (self.before, self.after)) < QUICK_ROUNDS
        least = LEAST_CHANGE_QUICK if few else LEAST_CHANGE
        if self.after.p20 / self.drift > self.before.p80 and self.own > 1 + least:
            return "slower"
        if self.after.p80 / self.drift < self.before.p20 and self.own < 1 - least:
            return "faster"
        return "same"


def changes(before: Run, after: Run) -> list[Change]:
    """What both runs measured, the slowed-down first."""
    known = {(row.contest, row.contestant): row for row in before.rows}
    both = [(known[key], row) for row in after.rows if (key := (row.contest, row.contestant)) in known]
    moved = [Change(before=old, after=new) for old, new in both]
    found = [dataclasses.replace(change, drift=_drift(change, moved)) for change in moved]
    return sorted(found, key=lambda change: -change.own)


def _drift(change: Change, moved: list[Change]) -> float:
    """The median ratio of the others in the contest whose code is not ours; 1 where there are none."""
    row = change.after
    ratios = [
        other.ratio
        for other in moved
        if other.after.contest == row.contest
        and other.after.contestant != row.contestant
        and other.after.facts.get("side") in ("peer", "reference")
    ]
    return statistics.median(ratios) if ratios else 1.0


def rivalries(run: Run) -> Iterator[tuple[Row, Row]]:
    """Our best and the best peer wherever both compute the same thing, shape by shape."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        match = (row.contest, str(row.facts.get("match", "")), str(row.facts.get("precision", "")))
        groups.setdefault(match, []).append(row)
    for rows in groups.values():
        ours = [row for row in rows if row.facts.get("side") == "ours"]
        peers = [row for row in rows if row.facts.get("side") == "peer"]
        if ours and peers:
            yield min(ours, key=lambda row: row.median), min(peers, key=lambda row: row.median)
