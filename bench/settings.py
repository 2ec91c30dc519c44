"""What a run of the suite is asked to do, and the facts that its results are labelled with."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastchargpt import __version__
from fastchargpt.errors import ConfigError
from fastchargpt.machine import cpu_name, first_line, memory_bytes, nvidia_driver, processor_seconds
from fastchargpt.precision import choose_device
from fastchargpt.roofline import measure_roof

__all__ = ["PEERS", "Settings", "Start", "describe_run", "parse_peers", "settings_from", "source_commit"]

PEERS = ("nanogpt", "lecture")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured, where, and against whom."""

    device: torch.device
    # fewer shapes and contestants, shorter races: under 3 minutes on 2 CPU cores
    quick: bool = False
    # name -> the peer's checkout
    peers: Mapping[str, Path] = field(default_factory=dict)
    # a checkpoint to generate with, in place of models trained here
    model: Path | None = None
    # time for one contest; None is 3, and 0.5 where it is quick
    patience: float | None = None

    @property
    def seconds(self) -> float:
        """Time for one contest."""
        return self.patience if self.patience is not None else 0.5 if self.quick else 3.0

    @property
    def rounds(self) -> int:
        """Timed calls of each contestant at least, however long they take."""
        return 5 if self.quick else 11


def parse_peers(words: list[str]) -> dict[str, Path]:
    """`nanogpt=PATH` and `lecture=PATH` as a mapping.

    Raises:
        ConfigError: another form, an unknown peer, or no checkout at the path.
    """
    peers: dict[str, Path] = {}
    for word in words:
        name, equals, where = word.partition("=")
        if name not in PEERS or not equals:
            raise ConfigError(f"--peer takes nanogpt=PATH or lecture=PATH, not {word!r}")
        path = Path(where).expanduser()
        needed = path / {"nanogpt": "model.py", "lecture": "gpt.py"}[name]
        if not needed.is_file():
            raise ConfigError(f"--peer {name} needs a checkout with {needed.name} in it, and {where!r} has none")
        peers[name] = path
    return peers


@dataclass(frozen=True)
class Start:
    """When a run began, by the clock and by the processors' own; `others` is what else they did since."""

    at: float = field(default_factory=time.perf_counter)
    worked: tuple[float, float] | None = field(default_factory=processor_seconds)

    def others(self) -> float | None:
        """How many processors other work has kept busy on average; None where the system does not say."""
        now = processor_seconds()
        if now is None or self.worked is None:
            return None
        all_of_it, own = now[0] - self.worked[0], now[1] - self.worked[1]
        return max(0.0, all_of_it - own) / (time.perf_counter() - self.at)


def describe_run(settings: Settings, start: Start | None = None) -> dict[str, Any]:
    """Device, versions, commit and settings, without the name of the machine or its user."""
    device = settings.device
    facts: dict[str, Any] = {
        "device": f"{cpu_name()}, {os.cpu_count()} cores" if device.type == "cpu" else str(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "memory_bytes": memory_bytes(),
        "fastchargpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": source_commit(),
        "quick": settings.quick,
        "peers": {name: _commit(path) for name, path in settings.peers.items()},
        "roof": {name: vars(measure_roof(device, dtype)) for name, dtype in _roof_dtypes(device).items()},
        "others": None if start is None else start.others(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["driver"] = nvidia_driver()
        facts["cuda"] = torch.version.cuda
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        facts["clocks"] = first_line(["nvidia-smi", query, "--format=csv,noheader", f"--id={device.index or 0}"])
    return facts


def _roof_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    return {"bf16": torch.bfloat16, "fp32": torch.float32} if device.type == "cuda" else {"fp32": torch.float32}


def source_commit() -> str:
    """The commit of this checkout, with a + where it has been changed since; empty where it is not a checkout."""
    here = Path(__file__).resolve().parent
    commit = _commit(here)
    changes = (
        subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True) if commit else None
    )
    return commit + ("+" if changes and changes.stdout.strip() else "")


def _commit(folder: Path) -> str:
    return first_line(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])


def settings_from(
    *, device: str, quick: bool, peers: list[str], model: str | None = None, seconds: float | None = None
) -> Settings:
    """The settings that the command line's words mean."""
    if seconds is not None and not 0.0 <= seconds < math.inf:
        raise ConfigError(f"--seconds is the time for one contest and must not be negative, and it is {seconds:g}")
    folder = None if model is None else Path(model).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--model needs a run's out dir or a checkpoint's folder, and {model!r} is none")
    return Settings(device=choose_device(device), quick=quick, peers=parse_peers(peers), model=folder, patience=seconds)
