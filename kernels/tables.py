"""Launch tables as files: the shipped ones beside this file, and the one that a user measured on their own GPU.

A table is JSON, one entry a line: (kernel, dtype, head_dim, max_length, dropout) -> launch settings. tuning/README.md
says what the fields mean. Which entry serves a call is decided in tuning.py.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError

__all__ = [
    "KERNELS",
    "USER_FOLDER",
    "Config",
    "Entry",
    "UserTable",
    "known_archs",
    "load_table",
    "read_table",
    "save_table",
    "user_path",
    "user_table",
]

KERNELS = ("forward", "decode", "tile", "blocks", "dq", "dkdv")
FOLDER = Path(__file__).parent / "tuning"
USER_FOLDER = "FASTCHARGPT_TUNING_DIR"  # names the folder of measured tables; else they lie in the cache


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch settings of one kernel, named in `KERNELS`."""

    kernel: str
    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int  # depth of the software pipeline
    max_registers: int | None = None  # a thread; NVIDIA only. None: as many as the compiler likes
    in_turn: bool = False  # whether one head is begun after another, or many together (`launch.heads_together`)

    def __str__(self) -> str:
        cap = f" r{self.max_registers}" if self.max_registers else ""
        order = ", heads in turn" if self.in_turn else ""
        return f"{self.kernel} {self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}{cap}{order}"

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of a launch: those that decide the machine code."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({"maxnreg": self.max_registers} if self.max_registers else {}),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a table: settings, and what they serve."""

    config: Config
    dtype: str  # "half" (float16 and bfloat16) or "fp32" (ieee and tf32)
    head_dim: int  # the largest it serves
    max_length: int | None  # the longest of Tq and Tk that it serves; None is any
    dropout: bool  # whether it was checked with dropout on
    variants: str = "all"  # where a sliding window and a soft-cap fit the registers: "all", "no dropout" or "none"
    # Which of `launch.is_plain` fit: "all", "plain" or, where those have better settings, "other"; the last may serve
    # plain ones with a window or a soft-cap too, where what serves these has no registers for that.
    calls: str = "all"

    def has_variants(self, dropout: bool) -> bool:
        """Whether a sliding window or a soft-cap may be launched with these settings."""
        return self.variants == "all" or (self.variants == "no dropout" and not dropout)

    def has_calls(self, plain: bool) -> bool:
        """Whether calls that are plain, or those that are not, may be launched with these settings."""
        return self.calls in ("all", "plain" if plain else "other")

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary, as it stands in a table."""
        fields = dataclasses.asdict(self)
        rest = {name: fields[name] for name in ("variants", "calls") if fields[name] != "all"}
        config = {name: value for name, value in fields["config"].items() if value not in (None, False)}
        return {"kernel": config.pop("kernel"), **{k: fields[k] for k in _KEYS}, **config, **rest}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Entry":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: fields that are missing or not known.
            ValueError: a field that no kernel can be launched with; a sentence.
        """
        fields = dict(fields)
        keys = {key: fields.pop(key) for key in _KEYS}
        rest = {name: fields.pop(name) for name in ("variants", "calls") if name in fields}
        entry = cls(config=Config(**fields), **keys, **rest)
        entry._check()
        return entry

    def _check(self) -> None:
        config = self.config
        whole = (config.block_m, config.block_n, config.num_warps, config.num_stages, self.head_dim)
        if not all(type(number) is int for number in whole) or type(self.max_length) not in (int, type(None)):
            raise ValueError("sizes must be whole numbers")
        if config.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; it is {config.kernel!r}")
        if self.dtype not in ("half", "fp32"):
            raise ValueError(f"dtype must be half or fp32; it is {self.dtype!r}")
        if type(self.dropout) is not bool:
            raise ValueError(f"dropout must be true or false; it is {self.dropout!r}")
        if self.variants not in ("all", "no dropout", "none"):
            raise ValueError(f"variants must be 'all', 'no dropout' or 'none'; it is {self.variants!r}")
        if self.calls not in ("all", "plain", "other"):
            raise ValueError(f"calls must be 'all', 'plain' or 'other'; it is {self.calls!r}")
        for name, number, least, most in (
            ("block_m", config.block_m, 16, 256),  # a tensor core takes no fewer than 16
            ("block_n", config.block_n, 16, 256),
            ("num_warps", config.num_warps, 1, 16),
        ):
            if not least <= number <= most or number & (number - 1):
                raise ValueError(f"{name} must be a power of two from {least} to {most}; it is {number}")
        if not 1 <= config.num_stages <= 8 or not 1 <= self.head_dim <= 256:
            raise ValueError("num_stages must be from 1 to 8 and head_dim from 1 to 256")
        cap = config.max_registers
        if cap is not None and not (type(cap) is int and 24 <= cap <= 255):  # 24 is the ABI's least
            raise ValueError(f"max_registers must be a whole number from 24 to 255; it is {cap!r}")
        if type(config.in_turn) is not bool:
            raise ValueError(f"in_turn must be true or false; it is {config.in_turn!r}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be positive or null; it is {self.max_length}")
        if config.kernel == "tile" and not 0 < (self.max_length or 0) <= min(config.block_m, config.block_n):
            raise ValueError("a tile's max_length must be no more than its block_m and block_n")


_KEYS = ("dtype", "head_dim", "max_length", "dropout")


class UserTable(NamedTuple):
    """A table measured on this machine."""

    path: Path
    entries: tuple[Entry, ...]


@functools.lru_cache(maxsize=32)
def load_table(arch: str) -> tuple[Entry, ...]:
    """The shipped entries of an architecture.

    Raises:
        ConfigError: a table that cannot be read.
    """
    return read_table(FOLDER / f"{arch}.json", arch)


def read_table(path: Path, arch: str) -> tuple[Entry, ...]:
    """The entries of a table file.

    Raises:
        ConfigError: it cannot be read, is for another architecture, or holds something that cannot be launched.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["arch"] != arch:
            raise ValueError(f"it is for {table['arch']}, not for {arch}")
        entries = tuple(Entry.from_json(fields) for fields in table["entries"])
        if arch.startswith("gfx") and any(entry.config.max_registers for entry in entries):
            raise ValueError("max_registers is for NVIDIA's GPUs")
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the launch table {path} cannot be read: {type(error).__name__}: {error}") from error


def save_table(
    path: Path,
    arch: str,
    entries: Iterable[Entry],
    *,
    facts: Mapping[str, Any] | None = None,
    lists: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> None:
    """Write a table, one entry a line; whole or not at all, as a running process may be reading it.

    Args:
        facts: further fields, such as what it was measured on.
        lists: further lists of flat dictionaries, one a line, after the entries.
    """
    fields = [f'  "{name}": {json.dumps(value)}' for name, value in {"arch": arch, **(facts or {})}.items()]
    for name, rows in {"entries": [entry.to_json() for entry in entries], **(lists or {})}.items():
        lines = ",\n".join("    " + json.dumps(row) for row in rows)
        fields.append(f'  "{name}": [\n{lines}\n  ]' if lines else f'  "{name}": []')
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(fields) + "\n}\n")
    os.replace(file.name, path)


def known_archs() -> list[str]:
    """The architectures that have a shipped table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _user_folder() -> Path:
    if named := os.environ.get(USER_FOLDER):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return Path(cache) / "fastchargpt" / "tuning"


def user_path(arch: str, gpu: str) -> Path:
    """Where the table measured on the GPU named `gpu`, of this architecture, belongs."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return _user_folder() / (f"{arch}-{name}.json" if name else f"{arch}.json")


@functools.lru_cache(maxsize=32)
def user_table(arch: str, gpu: str) -> UserTable | None:
    """The user's own table for a GPU, read once; None where there is none, or (said in a warning) none that is right.

    Looked for under the GPU's name, then under the architecture's. Where `gpu` is empty (the interpreter) only in a
    folder that the environment names.
    """
    if not gpu and not os.environ.get(USER_FOLDER):
        return None
    try:
        path = next((path for path in (user_path(arch, gpu), user_path(arch, "")) if path.is_file()), None)
    except (OSError, RuntimeError):  # no home, or a folder that may not be looked into
        return None
    if path is None:
        return None
    try:
        return UserTable(path, read_table(path, arch))
    except ConfigError as error:
        warnings.warn(
            f"fastchargpt: {error}; the shipped one serves: delete the file, or measure again with "
            "`fastchargpt bench attention --tune`",
            stacklevel=2,
        )
        return None
