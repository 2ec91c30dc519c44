"""Which kernel runs with which blocks, warps and stages: read from the tables beside this file, nothing measured here.

A table, tuning/<arch>.json, holds entries (kernel, dtype, head_dim, max_length, dropout) -> launch settings. An entry
serves any head_dim up to its own and any sequence up to its max_length (null: any). tuning/README.md says how the
entries were chosen, and why the one-launch kernels end where they end.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

__all__ = [
    "KERNELS",
    "Config",
    "Entry",
    "Plan",
    "arch_of",
    "forced",
    "known_archs",
    "load_table",
    "plan",
    "save_table",
    "widest_head",
]

KERNELS = ("forward", "decode", "tile", "blocks", "dq", "dkdv")
FOLDER = Path(__file__).parent / "tuning"
USER_FOLDER = "FASTCHARGPT_TUNING_DIR"  # tables found there come first
INTERPRETER_ARCH = "sm_80"  # whose table the interpreter reads


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch settings of one kernel, named in `KERNELS`."""

    kernel: str
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int  # depth of the software pipeline

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a table: settings, and what they serve."""

    config: Config
    dtype: str  # "half" (float16 and bfloat16) or "fp32" (ieee and tf32)
    head_dim: int  # the largest it serves
    max_length: int | None  # the longest of Tq and Tk that it serves; None is any
    dropout: bool  # whether it was checked with dropout on

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary, as it stands in a table."""
        fields = dataclasses.asdict(self)
        return {"kernel": fields["config"].pop("kernel"), **{k: fields[k] for k in _KEYS}, **fields["config"]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Entry":
        """The inverse of `to_json`; raises KeyError or TypeError for fields that are missing or not known."""
        fields = dict(fields)
        keys = {key: fields.pop(key) for key in _KEYS}
        return cls(config=Config(**fields), **keys)


_KEYS = ("dtype", "head_dim", "max_length", "dropout")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The launches that attention takes: forward (and decode), and backward in one launch or two (dq, dkdv)."""

    forward: Config
    backward: tuple[Config, ...]
    decode: Config | None = None


_forced: list[Plan] = []


@contextlib.contextmanager
def forced(forced_plan: Plan) -> Iterator[None]:
    """Within this scope every call takes `forced_plan`, whatever the tables say: for tests and for tuning."""
    _forced.append(forced_plan)
    try:
        yield
    finally:
        _forced.pop()


def plan(device: torch.device, dtype: torch.dtype, head_dim: int, length: int, *, dropout: bool) -> Plan:
    """The launches for sequences of at most `length` queries and keys on `device`."""
    if _forced:
        return _forced[-1]
    return plan_for(arch_of(device), "fp32" if dtype == torch.float32 else "half", head_dim, length, dropout)


def widest_head(device_type: str, index: int, dtype: torch.dtype, dropout: bool) -> int:
    """The largest head_dim that the device's table serves in `dtype` at every length; 0 is none."""
    if _forced:
        return 256
    kind = "fp32" if dtype == torch.float32 else "half"
    entries = load_table(arch_of(torch.device(device_type, index)))
    served = [
        max(
            (e.head_dim for e in entries if e.config.kernel == kernel and e.dtype == kind and e.dropout >= dropout),
            default=0,
        )
        for kernel in ("forward", "dq", "dkdv")
    ]
    return min(served)


# torch.compile calls it while tracing and keeps the answer, as availability.triton_problem.
widest_head._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def plan_for(arch: str, dtype: str, head_dim: int, length: int, dropout: bool) -> Plan:
    """As `plan`, by the names that the tables use."""
    entries = load_table(arch)

    def find(kernel: str) -> Config | None:
        fitting = [
            entry
            for entry in entries
            if entry.config.kernel == kernel
            and entry.dtype == dtype
            and entry.head_dim >= head_dim
            and (entry.max_length is None or entry.max_length >= length)
            and entry.dropout >= dropout  # what holds dropout's registers holds the plain kernel's too
        ]
        best = min(fitting, key=lambda e: (e.head_dim, e.max_length or 2**31, e.dropout), default=None)
        return best.config if best else None

    def need(kernel: str) -> Config:
        config = find(kernel)
        if config is None:
            raise ConfigError(f"the launch table of {arch} has no {kernel!r} entry for {dtype}, head_dim {head_dim}")
        return config

    one_launch = find("tile") or find("blocks")
    return Plan(need("forward"), (one_launch,) if one_launch else (need("dq"), need("dkdv")), find("decode"))


@functools.lru_cache(maxsize=32)
def load_table(arch: str) -> tuple[Entry, ...]:
    """The entries of an architecture's table.

    Raises:
        ConfigError: a table that cannot be read.
    """
    folders = [Path(folder) for folder in (os.environ.get(USER_FOLDER),) if folder]
    path = next((f / f"{arch}.json" for f in folders if (f / f"{arch}.json").exists()), FOLDER / f"{arch}.json")
    try:
        return tuple(Entry.from_json(fields) for fields in json.loads(path.read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the launch table {path} cannot be read: {type(error).__name__}: {error}") from error


def save_table(path: Path, arch: str, entries: list[Entry]) -> None:
    """Write a table, one entry a line."""
    lines = ",\n".join("    " + json.dumps(entry.to_json()) for entry in entries)
    path.write_text(f'{{\n  "arch": "{arch}",\n  "entries": [\n{lines}\n  ]\n}}\n')


def known_archs() -> list[str]:
    """The architectures that have a shipped table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@functools.lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """The table that serves a device: its own, or that of its nearest older relative."""
    if device.type != "cuda":
        return INTERPRETER_ARCH
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in known_archs() else "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    known = [int(arch.removeprefix("sm_")) for arch in known_archs() if arch.startswith("sm_")]
    return f"sm_{max(c for c in known if c <= capability)}"
