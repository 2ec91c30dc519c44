"""Hostile inputs for every reader of files: made from a seed and a number, so that any of them can be made again.

`python fuzz.py SEED FIRST COUNT FOLDER` runs some under a limit of memory and time, in a process that may die of it;
`campaign` starts such processes, and goes on behind the input that one of them died of.
"""

import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_readers import Readers

SECONDS_PER_INPUT = 5  # of the process's own: a busy machine may keep it waiting for longer
SECONDS_WAITING = 120  # for whatever makes no progress without computing
MEMORY_BYTES = 1 << 30  # beside what the process has before the first input


def run_one(readers: Readers, seed: int, number: int, name: str = "") -> tuple[str, str]:
    """Make and read one input: the reader's name, and `read`, `refused` or what went wrong.

    The readers take turns, one a number, unless one is named.
    """
    from fastchargpt.errors import FastchargptError

    names = list(readers.cases)
    name = name or names[number % len(names)]
    try:
        readers.cases[name](random.Random(f"{seed}:{number}"))
    except FastchargptError as error:
        said = str(error)
        return name, "refused" if "\n" not in said and len(
            said
        ) < 1500 else f"a sentence of {len(said)} characters: {said[:300]!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    return name, "read"


def work(seed: int, first: int, count: int, folder: Path) -> None:
    """Run some inputs under the limits; the last line printed is the outcome as JSON, findings come line by line."""
    import torch

    torch.set_num_threads(1)
    readers = Readers(folder)
    for number in range(len(readers.cases)):  # imports, and whatever else is made on first use
        run_one(readers, -1, number)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, virtual + MEMORY_BYTES))
    with (folder / "progress").open("r+b") as file:
        progress = mmap.mmap(file.fileno(), 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(first, first + count):
        progress[:] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_INPUT)  # the process says where it is, and dies of it
        faulthandler.dump_traceback_later(SECONDS_WAITING, exit=True)
        start = time.process_time()
        name, outcome = run_one(readers, seed, number)
        slowest = max(slowest, time.process_time() - start)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        if outcome not in ("read", "refused"):
            print(json.dumps({"number": number, "reader": name, "finding": outcome}), flush=True)
            outcome = "finding"
        outcomes[f"{name}: {outcome}"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"outcomes": outcomes, "slowest_s": slowest, "grown_mib": grown}), flush=True)


def campaign(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Run `count` inputs: how many were read and refused, and every finding, the deadly ones included."""
    findings: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    slowest = grown = 0.0
    first, end = 0, count
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FASTCHARGPT_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    while first < end:
        (folder / "progress").write_bytes(first.to_bytes(8, "little"))
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).resolve()),
            str(seed),
            str(first),
            str(end - first),
            str(folder),
        ]
        with (folder / f"outcome-{first}.jsonl").open("w+") as said:  # to be looked at while it grows
            done = subprocess.run(command, stdout=said, stderr=subprocess.PIPE, text=True, env=environment)
            said.seek(0)
            lines = [json.loads(line) for line in said]
        findings += [line for line in lines if "finding" in line]
        if done.returncode == 0:
            outcomes.update(lines[-1]["outcomes"])
            slowest, grown = max(slowest, lines[-1]["slowest_s"]), max(grown, lines[-1]["grown_mib"])
            break
        died = int.from_bytes((folder / "progress").read_bytes(), "little")
        findings.append({"number": died, "finding": f"died with status {done.returncode}: {done.stderr[-1500:]}"})
        print(f"soak: {findings[-1]}", flush=True)
        if len(findings) > 200:
            break
        first = died + 1
    return {"outcomes": dict(sorted(outcomes.items())), "findings": findings, "slowest_s": slowest, "grown_mib": grown}


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
