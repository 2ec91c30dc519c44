"""How a contest becomes rows of pytest-benchmark: what the race measured is replayed to it, sample by sample."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler that counts memory is not to talk

from fastchargpt.bench.contest import Contestant, Result, hold
from fastchargpt.bench.settings import Settings, Start, describe_run, settings_from, source_commit
from fastchargpt.errors import FastchargptError

Entrants = Mapping[str, Callable[[], Contestant]]


class Rank(Protocol):
    """What the `rank` fixture offers: `rank(contest, name, entrants)`."""

    def __call__(
        self,
        contest: str,
        name: str,
        entrants: Callable[[], Entrants],
        *,
        lead: int = 0,
        rounds: int | None = None,
        **facts: Any,
    ) -> None: ...


class Replay:
    """A clock that goes on by a measured duration at each call of `play`, and stands still otherwise."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def time(self) -> float:
        return self.now

    def play(self) -> None:
        self.now += self.samples.pop(0)


REPLAY = Replay()
SETTINGS = pytest.StashKey[Settings]()
START = pytest.StashKey[Start]()
NOT_RANKED = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastchargpt")
    group.addoption("--quick", action="store_true", help="fewer shapes: under 3 minutes on 2 CPU cores")
    group.addoption("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    group.addoption(
        "--peer", action="append", default=[], help="nanogpt=PATH or lecture=PATH: a checkout to compare with"
    )
    group.addoption("--seconds", type=float, help="time for one contest (default: 3, or 0.5 with --quick)")
    group.addoption("--model", help="a checkpoint to generate with, in place of models trained on the spot")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs a kernel on a real GPU; skipped where there is none")
    config.stash[NOT_RANKED] = []
    config.stash[START] = Start()
    try:
        config.stash[SETTINGS] = settings_from(
            device=config.getoption("--device"),
            quick=config.getoption("--quick"),
            peers=config.getoption("--peer"),
            model=config.getoption("--model"),
            seconds=config.getoption("--seconds"),
        )
    except FastchargptError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "rank" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY.time))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # the machine's name is nobody's business, nor are three hundred CPU flags
    machine_info["fastchargpt"] = describe_run(config.stash[SETTINGS], config.stash[START])


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {"id": source_commit()}  # of the suite; pytest-benchmark's own would be that of the working directory


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["not_ranked"] = config.stash[NOT_RANKED]
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # thousands of samples; the quantiles are in extra_info
        row.pop("params", None)  # whole texts and configs; `param` names them
        row.pop("options", None)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    """What this run was asked to do."""
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(scope="session")
def contests() -> dict[str, dict[str, Result]]:
    """The contests held so far."""
    return {}


@pytest.fixture
def rank(
    benchmark: Any,
    settings: Settings,
    contests: dict[str, dict[str, Result]],
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
) -> Rank:
    """Report one contestant of a contest, which is held when its first contestant is asked for.

    Only those that this run asks for take part: `--only` may leave some out, and they are not even built.
    """
    asked = {item.callspec.params.get("contestant") for item in request.session.items if hasattr(item, "callspec")}

    def report(
        contest: str,
        name: str,
        entrants: Callable[[], Entrants],
        *,
        lead: int = 0,
        rounds: int | None = None,
        **facts: Any,
    ) -> None:
        if contest not in contests:
            building = {key: build for key, build in entrants().items() if key in asked}
            contests[contest] = hold(
                building, settings.device, seconds=settings.seconds, rounds=rounds or settings.rounds, lead=lead
            )
        result = contests[contest][name]
        if result.timing is None:
            why = result.wrong or result.absent or ""
            kind = "wrong" if result.wrong else "absent"
            pytestconfig.stash[NOT_RANKED].append({"contest": contest, "contestant": name, "kind": kind, "reason": why})
            if result.wrong:
                pytest.fail(f"{name} is wrong and not ranked: {why}", pytrace=False)
            pytest.skip(f"{name}: {why}")
        timing = result.timing
        benchmark.group = contest
        benchmark.extra_info.update(_figures(result, facts), contestant=name, contest=contest)
        REPLAY.samples = list(timing.seconds)
        benchmark.pedantic(REPLAY.play, rounds=len(timing.seconds))

    return report


def _figures(result: Result, facts: Mapping[str, Any]) -> dict[str, Any]:
    timing = result.timing
    assert timing is not None
    figures = {**facts, **result.facts}
    figures |= {"median_s": timing.median, "p20_s": timing.p20, "p80_s": timing.p80, "rounds": len(timing.seconds)}
    if result.peak_bytes is not None:
        figures["peak_bytes"] = result.peak_bytes
    for name, unit in (("flops", "flops_per_s"), ("bytes", "bytes_per_s"), ("tokens", "tokens_per_s")):
        if name in figures:
            figures[unit] = figures[name] / timing.median
    if "floor_s" in figures:
        figures["floor_share"] = figures["floor_s"] / timing.median
    if "roof_flops" in figures and "flops_per_s" in figures:
        figures["roof_share"] = figures["flops_per_s"] / figures["roof_flops"]
    return figures
