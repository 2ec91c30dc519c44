"""Which kernel runs with which blocks, warps and stages: read from tables (tables.py), nothing measured here.

An entry serves any head_dim up to its own and any sequence up to its max_length (null: any). A table that the user has
measured on this GPU (`fastchargpt bench attention --tune`) comes before the shipped one, but for variants (a sliding
window, a soft-cap): they were not measured, and not every setting has the registers for them ("variants"), nor for
grouped heads, heads that are no power of two wide or attention without a mask ("calls").
tuning/README.md says how the shipped entries were chosen, and why the one-launch kernels end where they end.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import ConfigError
from .launch import Problem
from .tables import KERNELS, Config, Entry, UserTable, known_archs, load_table, save_table, user_table

__all__ = [
    "KERNELS",
    "Config",
    "Entry",
    "Plan",
    "arch_of",
    "forced",
    "forget",
    "gpu_of",
    "known_archs",
    "load_table",
    "origin",
    "plan",
    "plan_for",
    "save_table",
    "serves_variants",
    "widest_head",
]

INTERPRETER_ARCH = "sm_80"  # whose table the interpreter reads
NO_LIMIT = 2**62  # of an entry without a max_length


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


def plan(problem: Problem) -> Plan:
    """The launches for a problem. The one-launch backwards have neither a sliding window nor a soft-cap."""
    return _forced[-1] if _forced else _chosen(problem).plan


def plan_for(
    arch: str, dtype: str, head_dim: int, length: int, dropout: bool, variant: bool = False, plain: bool = True
) -> Plan:
    """As `plan`, by the names that the tables use, and by the shipped table alone.

    `variant` and `plain` are a problem's `is_variant` and `is_plain`.
    """
    return _choose(arch, None, dtype, head_dim, length, dropout, variant, plain).plan


def origin(problem: Problem) -> str:
    """Where the settings that `plan` gives come from, in words."""
    if _forced:
        return "settings forced by the caller"
    path = _chosen(problem).path
    return "settings as shipped" if path is None else f"settings measured on this machine, from {path}"


def widest_head(device_type: str, index: int, dtype: torch.dtype, dropout: bool, plain: bool = True) -> int:
    """The largest head_dim that the device's tables serve in `dtype` at every length; 0 is none."""
    if _forced:
        return 256
    device = torch.device(device_type, index)
    return _widest_head(arch_of(device), gpu_of(device), _kind(dtype), dropout, plain)


@functools.lru_cache(maxsize=64)
def _widest_head(arch: str, gpu: str, dtype: str, dropout: bool, plain: bool) -> int:
    own = user_table(arch, gpu)
    entries = (*(own.entries if own else ()), *load_table(arch))
    served = [
        max(
            (
                e.head_dim
                for e in entries
                if (e.config.kernel, e.dtype, e.max_length) == (kernel, dtype, None)
                and e.dropout >= dropout
                and e.has_calls(plain)
            ),
            default=0,
        )
        for kernel in ("forward", "dq", "dkdv")
    ]
    return min(served)


def serves_variants(
    device_type: str, index: int, dtype: torch.dtype, head_dim: int, dropout: bool, plain: bool = True
) -> bool:
    """Whether the device has settings, for any length, with which a sliding window and a soft-cap spill nothing."""
    if _forced:
        return True
    try:
        arch = arch_of(torch.device(device_type, index))
        _choose(arch, None, _kind(dtype), head_dim, NO_LIMIT, dropout, True, plain)
    except ConfigError:
        return False
    return True


# torch.compile calls them while tracing and keeps the answers, as availability.triton_problem.
widest_head._dynamo_marked_constant = True  # type: ignore[attr-defined]
serves_variants._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Read the tables anew: one of them has been written."""
    for cached in (_choose, _widest_head, load_table, user_table):
        cached.cache_clear()


@dataclasses.dataclass(frozen=True)
class _Choice:
    plan: Plan
    path: Path | None  # of the user's table, where any of the settings are from there


def _chosen(problem: Problem) -> _Choice:
    return _choose(
        arch_of(problem.device),
        gpu_of(problem.device),
        _kind(problem.dtype),
        problem.q_shape[3],
        problem.length,
        problem.dropout_p > 0.0,
        problem.is_variant,
        problem.is_plain,
    )


@functools.lru_cache(maxsize=1024)
def _choose(
    arch: str, gpu: str | None, dtype: str, head_dim: int, length: int, dropout: bool, variant: bool, plain: bool
) -> _Choice:
    """The nearest entries that serve; `gpu` None looks at the shipped table alone."""
    own: UserTable | None = None if gpu is None or variant else user_table(arch, gpu)
    measured = own.entries if own else ()
    serving = [
        (_distance(entry, shipped), entry)
        for entries, shipped in ((measured, False), (load_table(arch), True))
        for entry in entries
        if entry.dtype == dtype
        and entry.head_dim >= head_dim
        and (entry.max_length is None or entry.max_length >= length)
        and entry.dropout >= dropout  # what holds dropout's registers holds the plain kernel's too
        and (variant or not (plain and entry.calls == "other"))  # which holds a variant of plain calls too, if any
    ]
    # Settings that spill do so for narrower heads too, whatever an entry for wider ones says: the narrowest decides.
    narrowest: dict[Config, tuple[int, bool]] = {}
    for _, entry in serving:
        calls = entry.has_calls(plain) or (variant and entry.calls == "other")
        fits = calls and (not variant or entry.has_variants(dropout))
        found = (entry.head_dim, not fits)
        code = dataclasses.replace(entry.config, in_turn=False)  # which order does not change
        narrowest[code] = min(narrowest.get(code, found), found)
    serving = [item for item in serving if not narrowest[dataclasses.replace(item[1].config, in_turn=False)][1]]

    def find(kernel: str) -> tuple[tuple[int, ...], Entry] | None:
        return min((item for item in serving if item[1].config.kernel == kernel), key=lambda i: i[0], default=None)

    def need(kernel: str) -> tuple[tuple[int, ...], Entry]:
        found = find(kernel)
        if found is None:
            raise ConfigError(f"the launch table of {arch} has no {kernel!r} entry for {dtype}, head_dim {head_dim}")
        return found

    forward, decode = need("forward"), find("decode")
    # One launch where its entry is as near as the pair's: by its max_length a table says where which is faster.
    ways = [[found] for found in (find("tile"), find("blocks")) if found and not variant]
    ways += [[need("dq"), need("dkdv")]]
    backward = min(ways, key=lambda way: max(distance for distance, _ in way))
    chosen = [forward, *backward, *([decode] if decode else [])]
    configs = tuple(entry.config for _, entry in backward)
    launches = Plan(forward[1].config, configs, decode[1].config if decode else None)
    return _Choice(launches, own.path if own and any(not distance[1] for distance, _ in chosen) else None)


def _distance(entry: Entry, shipped: bool) -> tuple[int, ...]:
    """What is compared first to last: the nearest head_dim, the measured table, the nearest length, no idle dropout."""
    return entry.head_dim, int(shipped), entry.max_length or NO_LIMIT, int(entry.dropout)


def _kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> str:
    """The name of a GPU, as its driver gives it; empty for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


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
