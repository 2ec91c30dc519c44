"""`compile=auto`: steps are timed as they are, and compiled where what is left of the run earns the compile time back.

What compiling costs and gains is taken from an earlier run of the same model on the same machine, else from a
measurement elsewhere, and the line that reports the decision says which. Both are then measured in this run and
remembered; where a compiled step turns out no faster, the run goes back.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastchargpt.config import GPTConfig
from fastchargpt.machine import cpu_name
from fastchargpt.step import TrainStep

__all__ = ["AutoCompile", "CompileCost", "CostFile", "cost_key"]

# Steps whose time is known before anything is concluded from it.
TIMED_STEPS = 5
# Measurements kept in a file of them, the newest.
KEPT = 200


@dataclass(frozen=True, kw_only=True)
class CompileCost:
    """What compiling a step costs and gains."""

    # seconds until the first compiled step
    seconds: float
    # time of a compiled step, as a share of an uncompiled one's
    share: float
    # where the figures come from, a clause for the log
    source: str


ELSEWHERE = {
    # seconds with nothing compiled earlier on disk (0.4 to 0.8 with it); the shares were 0.77 for the modern family,
    # 0.92 for nanogpt's and 1.01 for the modern with dropout
    "cpu": CompileCost(seconds=22.0, share=0.92, source="as measured on two AVX-512 cores at the CPU demo's shape"),
    "cuda": CompileCost(
        # with a cold cache, beside other work; nanogpt's family with dropout, both as a CUDA graph
        seconds=30.0,
        share=0.76,
        source="as measured on an H200 at shakespeare-char's shape",
    ),
}


def cost_key(model: GPTConfig, device: torch.device, *facts: object) -> str:
    """A name for a kind of step on this machine, under which its cost is remembered."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()} x {torch.get_num_threads()}"
    what = json.dumps([dataclasses.asdict(model), torch.__version__, *map(str, facts)], sort_keys=True)
    return f"{name}: {hashlib.sha256(what.encode()).hexdigest()[:16]}"


class CostFile:
    """Costs that were measured on this machine, in one small JSON file; what it cannot hold is measured again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def find(self, key: str) -> CompileCost | None:
        """The cost of a kind of step; None where it was not measured here, or the entry is damaged."""
        entry = self._read().get(key)
        if not isinstance(entry, list) or len(entry) != 2:
            return None
        if not all(type(value) is float and math.isfinite(value) and value > 0.0 for value in entry):
            return None
        return CompileCost(seconds=entry[0], share=entry[1], source="as measured in an earlier run here")

    def keep(self, key: str, cost: CompileCost) -> None:
        """Remember a cost. A folder that cannot be written to only means that the next run measures again."""
        entries = {name: entry for name, entry in self._read().items() if name != key}
        entries = dict([*entries.items(), (key, [cost.seconds, cost.share])][-KEPT:])
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(entries), encoding="utf-8")
            temporary.replace(self._path)


class AutoCompile:
    """Decides for a run whether its step is compiled, from the times that the run reads anyway.

    Args:
        step: the step, not compiled yet.
        last: the number of steps in the run.
        log: takes the lines that say what was decided, and from which figures.
        costs: what is known of this machine.
        key: of this kind of step.
    """

    def __init__(self, step: TrainStep, *, last: int, log: Callable[[str], None], costs: CostFile, key: str) -> None:
        self._step, self._last, self._log, self._costs, self._key = step, last, log, costs, key
        self._times: list[tuple[int, float]] = []  # steps, and seconds for each of them
        self._skip = True  # the first times hold what is done once: compiling, and making a CUDA graph
        self._plain: float | None = None  # seconds of a step that is not compiled, once known
        self.decided = False

    def note(self, steps: int, seconds: float) -> None:
        """Take in the time of the steps since it was last read.

        Args:
            steps: their number.
            seconds: for each of them.
        """
        if self.decided:
            return
        if self._skip:
            self._skip = not self._step.settled
            return
        self._times.append((steps, seconds))
        if sum(steps for steps, _ in self._times) < TIMED_STEPS:
            return
        typical = statistics.median([seconds for steps, seconds in self._times for _ in range(steps)])
        self._times, self._skip = [], True
        if self._plain is None:
            self._plain = typical
            self._decide(typical)
        else:
            self._judge(self._plain, typical)

    def resume(self) -> None:
        """The run was compiled when it was interrupted: it stays so."""
        self.decided = True
        self._step.compile()

    def _decide(self, plain: float) -> None:
        cost = self._costs.find(self._key) or ELSEWHERE[self._step.device.type]
        left = self._last - self._step.iteration
        gain = left * plain * (1.0 - cost.share)
        figures = (
            f"{left:,} steps of {plain * 1e3:.3g} ms are left, compiling takes {cost.seconds:.3g} s and a step then "
            f"{cost.share:.2f} of its time ({cost.source})"
        )
        if gain <= cost.seconds:
            self.decided = True
            self._log(f"compile off: it would save {max(gain, 0.0):.3g} s; {figures}")
            return
        self._log(f"compile on from step {self._step.iteration}: it saves {gain:.3g} s; {figures}")
        self._step.compile()

    def _judge(self, plain: float, compiled: float) -> None:
        self.decided = True
        seconds = self._step.compile_seconds
        if seconds is None:  # the steps went on without a compiled one, which an error in it would have ended
            return
        self._costs.keep(self._key, CompileCost(seconds=seconds, share=compiled / plain, source=""))
        told = f"a step takes {compiled * 1e3:.3g} ms compiled and {plain * 1e3:.3g} ms as it is"
        if compiled < plain:
            self._log(f"compiled in {seconds:.3g} s: {told}")
        else:
            self._step.compile(False)
            self._log(f"compile off again from step {self._step.iteration}: {told}")
