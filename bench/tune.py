"""Launch settings measured on the GPU at hand: every candidate checked, then timed in turns; the fastest make a table.

A place is what an entry of a table is for: a dtype, a head_dim, a longest sequence, with dropout or without. In each
place the forward's candidates race each other, then those for dq and for dk/dv (each beside the best so far of the
other), then the best pair of them, the one-launch candidates and the shipped launches; and last the winner with its
heads begun together and in turn. The table is written after each place, so that a run that is stopped goes on where it
stopped.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastchargpt.bench.tune_space import Place, candidates
from fastchargpt.errors import ConfigError
from fastchargpt.kernels.tables import Config, Entry, read_table, save_table
from fastchargpt.kernels.tuning import Plan, plan_for

__all__ = ["BrokenDevice", "Measured", "Rig", "Session", "measure", "summary", "tune"]

WORTH = 0.99  # of the shipped settings' time: a candidate must be faster by more than noise to replace them
BEYOND = 2**30  # a sequence that no one-launch backward of a shipped table serves


class BrokenDevice(Exception):
    """After a candidate the device computes no more in this process; the message says why."""

    # which machine code is suspected: not to be tried again
    suspects: Sequence[tuple[Any, ...]] = ()


class Rig(Protocol):
    """What runs the candidates: `tune_launches.GpuRig`, or a test's stand-in."""

    def problem(self, place: Place, plan: Plan, what: str) -> str | None:
        """Why a plan cannot be used for `what` ("forward", "backward" or "decode"), as half a sentence; it is run."""

    def race(self, place: Place, plans: Mapping[str, Plan], what: str) -> Mapping[str, float]:
        """Median seconds of each plan, timed in turns."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The winner of one race, and the shipped settings' time in the same race."""

    place: Place
    what: str
    configs: tuple[Config, ...]
    seconds: float
    shipped: tuple[Config, ...]
    shipped_seconds: float | None  # None: they do not run here

    @property
    def ratio(self) -> float | None:
        """Times faster than the shipped settings."""
        return self.shipped_seconds / self.seconds if self.shipped_seconds else None

    def entries(self) -> Iterator[Entry]:
        """As lines of a table."""
        for config in self.configs:
            yield Entry(config=config, **dataclasses.asdict(self.place))

    def __str__(self) -> str:
        mine, theirs = (" + ".join(map(str, configs)) for configs in (self.configs, self.shipped))
        if self.ratio is None or self.shipped_seconds is None:
            return f"{mine}, {1e6 * self.seconds:.1f} us; the shipped {theirs} does not run here"
        if mine == theirs:
            return f"{mine}, {1e6 * self.seconds:.1f} us: the shipped settings"
        before = f"shipped {theirs}, {1e6 * self.shipped_seconds:.1f} us"
        return f"{mine}, {1e6 * self.seconds:.1f} us; {before}: {self.ratio:.2f}x"

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary, for the table's list of measurements."""
        return {
            **dataclasses.asdict(self.place),
            "what": self.what,
            "settings": [dataclasses.astuple(config) for config in self.configs],
            "us": round(1e6 * self.seconds, 2),
            "shipped": [dataclasses.astuple(config) for config in self.shipped],
            "shipped_us": None if self.shipped_seconds is None else round(1e6 * self.shipped_seconds, 2),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Measured":
        """The inverse of `to_json`."""
        place = Place(*(row[field.name] for field in dataclasses.fields(Place)))
        configs, shipped = (tuple(Config(*settings) for settings in row[key]) for key in ("settings", "shipped"))
        theirs = None if row["shipped_us"] is None else row["shipped_us"] / 1e6
        return cls(place, row["what"], configs, row["us"] / 1e6, shipped, theirs)


class Skipped(NamedTuple):
    """A candidate that took no part."""

    place: Place
    settings: str
    reason: str


class _Trial:
    """The races of one place."""

    def __init__(self, rig: Rig, place: Place, arch: str, known: Mapping[tuple[Any, ...], str]) -> None:
        self.rig, self.place, self._known = rig, place, known
        self.shipped = plan_for(arch, place.dtype, place.head_dim, place.length, place.dropout)
        self._pair = plan_for(arch, place.dtype, place.head_dim, BEYOND, place.dropout).backward
        self.skipped: list[Skipped] = []
        self._sound: set[Config] = set()

    def forward(self) -> Measured:
        shipped = self.shipped.forward
        found = self._hold("forward", self._forwards((c,) for c in self._with(shipped, "forward")), (shipped,))
        return self._hold("forward", self._forwards(self._orders(found)), (shipped,), found.configs)

    def decode(self) -> Measured | None:
        shipped = self.shipped.decode
        if shipped is None or self.place.dropout or self.place.max_length is not None:
            return None
        plans = {config: dataclasses.replace(self.shipped, decode=config) for config in self._with(shipped, "decode")}
        return self._hold("decode", {(config,): plan for config, plan in plans.items()}, (shipped,))

    def backward(self) -> Measured:
        first, second = self._pair
        dq = self._hold("backward", self._backwards((c, second) for c in self._with(first, "dq")), self._pair)
        best = self._backwards((dq.configs[0], c) for c in self._with(second, "dkdv"))
        pair = self._hold("backward", best, (dq.configs[0], second))
        rest = [self.shipped.backward, pair.configs]
        if self.place.max_length is not None:
            rest += [(c,) for kernel in ("tile", "blocks") for c in candidates(kernel, self.place)]
        found = self._hold("backward", self._backwards(rest), self.shipped.backward)
        return self._hold("backward", self._backwards(self._orders(found)), self.shipped.backward, found.configs)

    def _with(self, shipped: Config, kernel: str) -> list[Config]:
        return list(dict.fromkeys((shipped, *candidates(kernel, self.place))))

    def _orders(self, found: Measured) -> Iterator[tuple[Config, ...]]:
        """The winner of a race with heads in turn and together, which is the same machine code, and the shipped."""
        yield from itertools.product(*map(self._either_order, found.configs))
        yield found.shipped

    def _either_order(self, config: Config) -> list[Config]:
        owned = config.block_m if config.kernel in ("forward", "dq") else config.block_n  # of the rows or keys
        if self.place.length <= owned:  # a head is one block: there is no order
            return [config]
        return [config, dataclasses.replace(config, in_turn=not config.in_turn)]

    def _forwards(self, ways: Iterable[tuple[Config, ...]]) -> dict[tuple[Config, ...], Plan]:
        return {way: dataclasses.replace(self.shipped, forward=way[0]) for way in ways}

    def _backwards(self, ways: Iterable[tuple[Config, ...]]) -> dict[tuple[Config, ...], Plan]:
        return {way: dataclasses.replace(self.shipped, backward=way) for way in ways}

    def _hold(
        self,
        what: str,
        plans: Mapping[tuple[Config, ...], Plan],
        shipped: tuple[Config, ...],
        before: tuple[Config, ...] = (),
    ) -> Measured:
        """Check every candidate, race those that are right; what won before and the shipped must be clearly beaten."""
        ready: dict[tuple[Config, ...], Plan] = {}
        for configs, plan in plans.items():
            if reason := self._reason(what, configs, plan):
                note = Skipped(self.place, " + ".join(map(str, configs)), reason)
                if note not in self.skipped:
                    self.skipped.append(note)
            else:
                ready[configs] = plan
        if not ready:
            raise ConfigError(f"no settings run for {self.place}, not even the shipped ones: {self.skipped[-1].reason}")
        names = {str(number): configs for number, configs in enumerate(ready)}
        times = self.rig.race(self.place, {name: ready[configs] for name, configs in names.items()}, what)
        by_configs = {configs: times[name] for name, configs in names.items()}
        best = min(by_configs, key=lambda configs: by_configs[configs])
        theirs = by_configs.get(shipped)
        for kept in (before, shipped):
            if kept in by_configs and by_configs[best] > WORTH * by_configs[kept]:
                best = kept
        return Measured(self.place, what, best, by_configs[best], shipped, theirs)

    def _reason(self, what: str, configs: tuple[Config, ...], plan: Plan) -> str | None:
        if reason := next((self._known[key] for c in configs if (key := _code_of(self.place, c)) in self._known), None):
            return reason
        try:
            reason = self.rig.problem(self.place, plan, what)
        except BrokenDevice as error:
            error.suspects = [_code_of(self.place, config) for config in configs if config not in self._sound]
            raise
        if reason is None:
            self._sound.update(configs)
        return reason


def _code_of(place: Place, config: Config) -> tuple[Any, ...]:
    """Which machine code: a candidate that broke the device once is not tried again at another length."""
    return place.dtype, place.head_dim, place.dropout, *dataclasses.astuple(config)


def measure(
    rig: Rig, place: Place, arch: str, broken: Mapping[tuple[Any, ...], str] | None = None
) -> tuple[list[Measured], list[Skipped]]:
    """Race every candidate of a place: the winners, and who was skipped and why.

    Raises:
        BrokenDevice: a candidate took the device down with it.
        ConfigError: not even the shipped settings run.
    """
    trial = _Trial(rig, place, arch, broken or {})
    found = [trial.forward(), trial.backward(), trial.decode()]
    return [measured for measured in found if measured], trial.skipped


class Session:
    """A table that grows: what has been measured so far, kept in its file."""

    def __init__(self, path: Path, arch: str, facts: Mapping[str, Any], *, again: bool = False) -> None:
        """Take up what the file holds, unless `again`; it counts only if it was measured with the same `facts`.

        Raises:
            ConfigError: the file is there and is no measured table of this architecture.
        """
        self.path, self.arch, self.facts = path, arch, dict(facts)
        self.measured: dict[tuple[Place, str], Measured] = {}
        self.broken: dict[tuple[Any, ...], str] = {}
        self.set_aside = ""  # what of the file was not taken up
        if not path.exists() or again:
            return
        read_table(path, arch)
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            differs = [name for name, value in self.facts.items() if table.get(name) != value]
            if differs:
                self.set_aside = f"{path} was measured with another {' and '.join(differs)}, and is measured anew"
                return
            for measured in map(Measured.from_json, table["measurements"]):
                self.measured[measured.place, measured.what] = measured
            self.broken = {tuple(row["candidate"]): row["reason"] for row in table.get("broken", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} is no table that a measurement can go on from ({type(error).__name__}: {error}): "
                "--again measures anew, --out names another file"
            ) from error

    def lacks(self, place: Place) -> bool:
        """Whether a place has yet to be measured."""
        return (place, "backward") not in self.measured

    def add(self, found: Iterable[Measured]) -> None:
        """Keep these, and write the file."""
        self.measured |= {(measured.place, measured.what): measured for measured in found}
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {_slot(entry): entry for measured in self.measured.values() for entry in measured.entries()}
        broken = [{"candidate": list(key), "reason": reason} for key, reason in self.broken.items()]
        lists = {"measurements": [measured.to_json() for measured in self.measured.values()], "broken": broken}
        save_table(self.path, self.arch, entries.values(), facts=self.facts, lists=lists)


def _slot(entry: Entry) -> tuple[Any, ...]:
    return entry.config.kernel, entry.dtype, entry.head_dim, entry.max_length, entry.dropout


def tune(session: Session, places: Sequence[Place], rig: Rig, say: Callable[[str], None]) -> bool:
    """Measure the places that the session lacks, saying what comes out; False where it was stopped before the end.

    Ctrl-C stops it; what is measured is kept. So does a candidate that takes the device down, which is never tried
    again.
    """
    todo = [place for place in places if session.lacks(place)]
    if len(todo) < len(places):
        say(f"{len(places) - len(todo)} of {len(places)} places are measured already, in {session.path}")
    told: set[tuple[str, str]] = set()
    for number, place in enumerate(todo, len(places) - len(todo) + 1):
        try:
            found, skipped = measure(rig, place, session.arch, session.broken)
        except KeyboardInterrupt:
            say(f"stopped: {number - 1} of {len(places)} places are kept in {session.path}; the same command goes on")
            return False
        except BrokenDevice as error:
            session.broken |= {suspect: str(error) for suspect in error.suspects}
            session.save()
            say(f"stopped: {error}; {number - 1} of {len(places)} places are kept, the same command goes on without it")
            return False
        session.add(found)
        for measured in found:
            say(f"[{number}/{len(places)}] {place}: {measured.what} {measured}")
        for _, settings, reason in skipped:
            if (settings, reason) not in told:
                told.add((settings, reason))
                say(f"    skipped {settings}: {reason}")
    return True


def summary(session: Session) -> str:
    """What was measured, place by place, as a table with the ratio against the shipped settings."""
    lines = ["| place | pass | settings | us | shipped | us | ratio |", "|---|---|---|---|---|---|---|"]
    for measured in session.measured.values():
        mine, theirs = (" + ".join(map(str, configs)) for configs in (measured.configs, measured.shipped))
        before = "does not run" if measured.shipped_seconds is None else f"{1e6 * measured.shipped_seconds:.1f}"
        ratio = "" if measured.ratio is None else f"{measured.ratio:.2f}x"
        lines.append(
            f"| {measured.place} | {measured.what} | {mine} | {1e6 * measured.seconds:.1f} "
            f"| {'the same' if mine == theirs else theirs} | {before} | {ratio} |"
        )
    return "\n".join(lines)
