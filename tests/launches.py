"""Runs the package's own host code for one kernel of the tables, on tensors of any device.

The compile gate runs it on meta tensors, to see what would be launched; the static report also in the interpreter, to
count what the kernels do. Tensors lie in memory as the model has them: q, k and v are views of one packed projection.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from fastchargpt.kernels import flash_backward, flash_decode, flash_forward, flash_short
from fastchargpt.kernels.launch import block_d, problem_of
from fastchargpt.kernels.tuning import Config, Entry

__all__ = ["BOTH", "RAGGED", "VARIED", "Case", "cases", "run_backward", "run_kernel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a kernel is launched on."""

    dtype: torch.dtype
    head_dim: int
    length: int
    batch: int = 4
    heads: int = 6
    kv_heads: int = 6
    causal: bool = True
    dropout: bool = False
    tf32: bool = False  # fp32 only: whether torch's matmul precision allows it
    window: int | None = None
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """As `launch.is_plain` has it."""
        return self.causal and self.heads == self.kv_heads and self.head_dim == block_d(self.head_dim)


RAGGED = ("forward", "blocks", "dq", "dkdv")  # they have other code for a sequence that is no multiple of their blocks
VARIED = ("forward", "decode", "dq", "dkdv")  # the kernels that have a sliding window and a soft-cap
# In machine code it counts that they are there: which window and which cap are arguments like any other.
BOTH: dict[str, Any] = {"window": 100, "softcap": 30.0}
UNUSUAL: tuple[dict[str, Any], ...] = ({"causal": False}, {"kv_heads": 2})


def cases(entry: Entry, table: Iterable[Entry] = (), *, thorough: bool = False) -> list[Case]:
    """What an entry has to pass: a causal launch in each precision that it serves; thoroughly, other variants too.

    An entry for dropout serves the plain kernel too, unless its table has another one for that. Unless the entry says
    that it has none, each launch is also made with a window and a soft-cap together, the most that can be asked of it;
    thoroughly, with one alone too. Kernels that tell a ragged sequence from an even one have to pass both. Unless the
    entry is for plain calls only, there are also a launch without a mask, one of grouped heads and one of heads
    that are a little narrower than a tile; thoroughly, of much narrower ones.
    """
    length = min(entry.max_length or 1024, 1024)
    if entry.dtype == "half":
        kinds = [{"dtype": torch.bfloat16}, *([{"dtype": torch.float16}] if thorough else [])]
    else:
        kinds = [{"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True}]
    base = [Case(**kind, head_dim=entry.head_dim, length=length) for kind in kinds]
    twins = [other for other in table if _place(other) == _place(dataclasses.replace(entry, dropout=False))]

    def with_dropout(twin: bool) -> list[Case]:
        dropouts = {False} if not entry.dropout or entry.config.kernel == "decode" else {True, twin}
        return [dataclasses.replace(case, dropout=dropout) for case in base for dropout in sorted(dropouts)]

    found = with_dropout(any(twin.has_calls(plain=True) for twin in twins))
    unusual = [] if entry.calls == "plain" else [*UNUSUAL, {"head_dim": entry.head_dim - 12}]
    unusual += [{"head_dim": entry.head_dim // 2}, {"head_dim": entry.head_dim // 4}] if thorough else []
    rest = with_dropout(any(twin.has_calls(plain=False) for twin in twins))
    rare = [dataclasses.replace(case, **change) for case in rest for change in unusual]
    if entry.config.kernel in VARIED:
        varied = [case for case in found if entry.has_variants(case.dropout)]
        variants = [BOTH, *({name: value} for name, value in BOTH.items() if thorough)]
        found += [dataclasses.replace(case, **variant) for case in varied for variant in variants]
    if entry.config.kernel in RAGGED:
        found += [dataclasses.replace(case, length=case.length - 1) for case in found]
    return found + rare


def _place(entry: Entry) -> tuple[object, ...]:
    """Which launches an entry is for."""
    return entry.config.kernel, entry.dtype, entry.head_dim, entry.max_length, entry.dropout


class _Tensors:
    """q, k, v, out, lse, dout and the gradients of a case."""

    def __init__(self, case: Case, device: str, queries: int) -> None:
        def by_head(heads: int, time: int, width: int) -> torch.Tensor:
            memory = torch.zeros(case.batch, time, width, case.head_dim, dtype=case.dtype, device=device)
            return memory.transpose(1, 2)[:, :heads]

        packed = case.heads + 2 * case.kv_heads
        self.q, self.dq = (by_head(case.heads, queries, packed) for _ in range(2))
        self.k, self.v, self.dk, self.dv = (by_head(case.kv_heads, case.length, packed) for _ in range(4))
        self.out, self.dout = (by_head(case.heads, queries, case.heads) for _ in range(2))
        self.lse = torch.zeros(case.batch, case.heads, queries, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device) if case.dropout else self.q
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
        try:
            self.problem = problem_of(
                self.q,
                self.k,
                scale=case.head_dim**-0.5,
                causal=case.causal,
                dropout_p=0.2 if case.dropout else 0.0,
                window=case.window,
                softcap=case.softcap,
            )
        finally:
            torch.set_float32_matmul_precision(before)


def run_kernel(config: Config, case: Case, device: str) -> None:
    """Launch the kernel that `config` names; "dq" and "dkdv" only exist together, both with this config."""
    if config.kernel in ("dq", "dkdv"):
        run_backward((config, config), case, device)
    elif config.kernel in ("tile", "blocks"):
        run_backward((config,), case, device)
    else:
        decoding = config.kernel == "decode"
        t = _Tensors(case, device, queries=1 if decoding else case.length)
        if decoding:
            flash_decode.forward(t.q, t.k, t.v, t.out, t.lse, t.problem, config, pieces=4)
        else:
            flash_forward.forward(t.q, t.k, t.v, t.out, t.lse, t.seed, t.problem, config)


def run_backward(configs: tuple[Config, ...], case: Case, device: str) -> None:
    """Launch a whole backward: one kernel ("tile" or "blocks"), or two ("dq", "dkdv")."""
    t = _Tensors(case, device, queries=case.length)
    gradients = (t.dq, t.dk, t.dv)
    if len(configs) == 1:
        flash_short.backward(t.dout, None, t.q, t.k, t.v, t.out, t.lse, *gradients, t.seed, t.problem, configs[0])
    else:
        flash_backward.backward(t.dout, None, t.q, t.k, t.v, t.out, t.lse, *gradients, t.seed, t.problem, *configs)
