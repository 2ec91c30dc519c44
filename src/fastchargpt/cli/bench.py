"""`fastchargpt bench`: run the benchmark suite, draw its report, compare two runs."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastchargpt.cli.arguments import PlainParser
from fastchargpt.errors import BackendUnavailableError, ConfigError, nearest

__all__ = ["run"]

SUBJECTS = ("attention", "training", "generation", "tokenizers", "batches", "samplers")
USAGE = """fastchargpt bench [SUBJECT ...] [--quick] [--device D] [--peer nanogpt=PATH] [--only WORDS] [--out FILE.json]
       fastchargpt bench attention --tune [--head-dim D ...] [--dtype half|fp32 ...] [--again] [--out FILE.json]
       fastchargpt bench speedrun [CORPUS ...] [--peer nanogpt=PATH] [--rounds N] [--seeds N] [--out FILE.json]
       fastchargpt bench report A.json [B.json] [--out report.html]
       fastchargpt bench compare A.json B.json"""


def run(argv: Sequence[str]) -> int:
    """Do what the words say; the exit status: that of the suite, and of a comparison 1 where something got slower.

    Raises:
        ConfigError: the words are not understood, or a file is no result.
        BackendUnavailableError: pytest-benchmark is missing, or the device is not there or not one that can be tuned.
    """
    words = list(argv)
    if words[:1] == ["report"]:
        return _report(words[1:])
    if words[:1] == ["compare"]:
        return _compare(words[1:])
    if words[:1] == ["speedrun"]:
        return _speedrun(words[1:])
    if "--tune" in words:
        return _tune(words)
    return _suite(words)


def _suite(words: Sequence[str]) -> int:
    parser = _parser("bench")
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)}; all unless named")
    parser.add_argument("--quick", action="store_true", help="fewer shapes: under 3 minutes on 2 CPU cores")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="nanogpt or lecture: a checkout"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="a checkpoint to generate with, in place of models trained here"
    )
    parser.add_argument("--seconds", type=float, help="time for one contest (default: 3, or 0.5 with --quick)")
    parser.add_argument(
        "--only", metavar="WORDS", help="contests whose names hold these, as pytest's -k: 'bf16 and backward'"
    )
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="the results (default: %(default)s)")
    options = parser.parse_args(words)
    for subject in options.subjects:
        if subject not in SUBJECTS:
            known = ("report", "compare", "speedrun", *SUBJECTS)
            raise ConfigError(
                f"there is no benchmark of {subject!r}{nearest(subject, known)}; there are {', '.join(SUBJECTS)}"
            )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"the benchmarks need {' and '.join(missing)}: pip install 'fastchargpt[bench]'")
    import fastchargpt.bench
    from fastchargpt.bench.settings import settings_from

    # mistakes end here, in one sentence
    settings_from(
        device=options.device, quick=options.quick, peers=options.peer, model=options.model, seconds=options.seconds
    )
    folder = Path(fastchargpt.bench.__path__[0])
    files = [str(folder / f"test_bench_{subject}.py") for subject in options.subjects or SUBJECTS]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [f"--rootdir={folder}", "--benchmark-columns=median,rounds", "--benchmark-sort=mean"]
    command += [
        f"--benchmark-json={options.out}",
        f"--device={options.device}",
        *(["--quick"] if options.quick else []),
    ]
    command += [*(f"--peer={peer}" for peer in options.peer)]
    command += [f"--{name}={value}" for name in ("model", "seconds") if (value := getattr(options, name)) is not None]
    command += [*(["-k", options.only] if options.only else []), *files]
    with tempfile.TemporaryDirectory() as storage:  # pytest-benchmark makes its folder even where nothing goes into it
        status = subprocess.run([*command, f"--benchmark-storage={Path(storage).as_uri()}"]).returncode
    if options.out.is_file():
        print(f"saved {options.out}; `fastchargpt bench report {options.out}` makes a page of it")
    return status


def _tune(words: Sequence[str]) -> int:
    parser = _parser("bench attention --tune")
    parser.add_argument("subject", choices=["attention"], help="what is tuned")
    parser.add_argument("--tune", action="store_true", help="measure launch settings and write a table of them")
    parser.add_argument("--device", default="auto", help="cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 32], help="default: 64 128 32")
    parser.add_argument("--dtype", choices=["half", "fp32"], nargs="+", default=["half", "fp32"], help="default: both")
    parser.add_argument("--quick", action="store_true", help="half precision and head_dim 64 without dropout only")
    parser.add_argument("--again", action="store_true", help="forget what the table holds already")
    parser.add_argument("--out", type=Path, help="the table (default: where the kernels look for it)")
    options = parser.parse_args(words)
    from fastchargpt.bench.tune_command import run_tune

    return run_tune(
        options.device,
        dtypes=["half"] if options.quick else options.dtype,
        head_dims=[64] if options.quick else options.head_dim,
        dropout=(False,) if options.quick else (False, True),
        again=options.again,
        out=options.out,
    )


def _speedrun(words: Sequence[str]) -> int:
    parser = _parser("bench speedrun")
    parser.add_argument(
        "corpora", nargs="*", metavar="CORPUS", help="shakespeare, pydoc or stdlib (default: shakespeare)"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="nanogpt: a checkout")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each contestant; 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=0, help="measure each ingredient of the recipe over so many (default: not at all)"
    )
    parser.add_argument("--out", type=Path, default=Path("speedrun.json"), help="the results (default: %(default)s)")
    options = parser.parse_args(words)
    if options.rounds < 0 or options.seeds < 0:
        raise ConfigError("--rounds and --seeds must not be negative")
    from fastchargpt.bench.ingredients import leave_one_out
    from fastchargpt.bench.settings import describe_run, settings_from
    from fastchargpt.bench.speedrun import check_corpus, compile_seconds, entrants, get_corpus, time_to_loss
    from fastchargpt.bench.speedrun_report import ingredients_table, race_table, write

    names = list(dict.fromkeys(options.corpora or ["shakespeare"]))
    for name in names:
        check_corpus(name)
    settings = settings_from(device="cpu", quick=False, peers=options.peer)
    machine = describe_run(settings)
    with tempfile.TemporaryDirectory() as place:
        machine["compile_seconds"] = compile_seconds(Path(place))
    races, ingredients = {}, {}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            corpus, data = get_corpus(name, Path(place))
            contestants = entrants(data, corpus, settings.peers.get("nanogpt"), Path(place))
            if options.rounds:
                races[name] = time_to_loss(contestants, options.rounds)
                print(race_table(name, races[name]), flush=True)
            if options.seeds:
                ingredients[name] = list(leave_one_out(corpus, range(1, options.seeds + 1)))
                print(ingredients_table(name, ingredients[name]), flush=True)
    for path in write(options.out, machine, races, ingredients):
        print(f"wrote {path}")
    return 0


def _report(words: Sequence[str]) -> int:
    parser = _parser("bench report")
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="FILE.json", help="one result, or two: before and after"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    options = parser.parse_args(words)
    if len(options.results) > 2:
        raise ConfigError(f"a report takes one or two results, not {len(options.results)}")
    if options.out.suffix != ".html":
        raise ConfigError(f"--out must end in .html, and it is {str(options.out)!r}")
    from fastchargpt.bench.report import write_report

    for path in write_report(options.results, options.out):
        print(f"wrote {path}")
    return 0


def _compare(words: Sequence[str]) -> int:
    parser = _parser("bench compare")
    parser.add_argument("before", type=Path, metavar="A.json", help="the run to compare with, of the same machine")
    parser.add_argument("after", type=Path, metavar="B.json", help="the newer run")
    options = parser.parse_args(words)
    from fastchargpt.bench.runs import changes, load_run

    before, after = load_run(options.before), load_run(options.after)
    for name in ("device", "torch", "threads", "quick"):
        if before.machine.get(name) != after.machine.get(name):
            print(f"note: {name} differs: {before.machine.get(name)} and {after.machine.get(name)}")
    found = changes(before, after)
    if not found:
        raise ConfigError("the two results have no contestant in common")
    for change in found:
        clock = f" ({change.ratio:.2f}x by the clock, others' code {change.drift:.2f}x)" if change.drift != 1.0 else ""
        what = f"{change.own:.2f}x  {change.after.contest}: {change.after.contestant}{clock}"
        if change.verdict != "same":
            print(f"{change.verdict} {what}")
        elif change.excused:
            print(f"the machine's doing {what}")
    slower = sum(change.verdict == "slower" for change in found)
    faster = sum(change.verdict == "faster" for change in found)
    print(f"{len(found)} compared: {slower} slower, {faster} faster, {len(found) - slower - faster} within noise")
    return 1 if slower else 0


def _parser(command: str) -> argparse.ArgumentParser:
    return PlainParser(prog=f"fastchargpt {command}", usage=USAGE, description="Run and read the benchmarks.")
