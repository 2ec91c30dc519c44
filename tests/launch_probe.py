"""Launches every kernel through Triton's own launcher, each time twice: as `Launch` does, and as Triton itself would.

`python launch_probe.py FOLDER`, in the environment that fake_cuda.py gives, prints what the driver was handed as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from fake_cuda import Launched, recorded_driver
from flash_cases import Case, inputs, plan_of

from fastchargpt.kernels import flash, launch
from fastchargpt.kernels.tuning import forced

CASES = {
    "tiled": Case(plan="tiled", dtype="bf16", head_dim=32, layout="packed"),
    "tiled, ragged, grouped, fp32": Case(plan="tiled", heads=4, head_dim=20, tq=33, tk=40, scale=-0.3, causal=False),
    "tiled, window and soft-cap": Case(plan="tiled", dtype="fp16", tq=50, tk=50, window=7, softcap=9.0),
    "blocks, dropout": Case(plan="blocks", dtype="bf16", dropout_p=0.2, tq=16, tk=16),
    "tile, gradient of lse": Case(plan="tile", dtype="bf16", lse_gradient=True, tq=5, tk=5),
    "decode": Case(dtype="bf16", tq=1, tk=300, decode=True),
}


def run(case: Case, misaligned: bool) -> None:
    """Forward and backward of a case; misaligned: on tensors that begin where 16 does not divide the address."""
    q, k, v, dout, dlse = inputs(case)
    if misaligned:
        q, k, v, dout = (_shifted(x) for x in (q, k, v, dout))
    q, k, v = (x.requires_grad_(not case.decode) for x in (q, k, v))
    options = {"dropout_p": case.dropout_p, "window": case.window, "softcap": case.softcap}
    seed = torch.zeros(1, dtype=torch.int64) if case.dropout_p else None
    with forced(plan_of(case.plan, case.block_m, case.block_n, decode=case.decode)):
        out, lse = flash.attention(q, k, v, scale=case.scale, causal=case.causal, seed=seed, **options)  # type: ignore[arg-type]
        if not case.decode:
            torch.autograd.backward(
                (out, lse) if case.lse_gradient else out, (dout, dlse) if case.lse_gradient else dout
            )


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, contiguous, one element further into its memory than where 16 bytes begin."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def main(folder: Path) -> None:
    """Run every case three times and once misaligned; print what happened."""
    original = launch.Launch.__call__
    rows: list[dict[str, Any]] = []
    with recorded_driver(folder) as launched:

        def both(self: launch.Launch, *tensors: torch.Tensor) -> None:
            codes = len(self._code)
            original(self, *tensors)
            self.by_triton(*tensors)
            ours, tritons = launched[-2:]
            rows.append(
                {**_differences(ours, tritons), "kernel": ours.kernel, "function": ours.function, "codes": codes}
            )
            assert len(launched) == 2 * len(rows)

        launch.Launch.__call__ = both  # type: ignore[method-assign]
        for name, case in CASES.items():
            for attempt in ("first", "second", "misaligned", "third"):
                before = len(rows)
                changed = dataclasses.replace(case, seed=len(rows))
                run(changed, misaligned=attempt == "misaligned")
                for row in rows[before:]:
                    row.update(case=name, attempt=attempt)
    print(json.dumps(rows))


def _differences(ours: Launched, tritons: Launched) -> dict[str, Any]:
    pairs = zip(Launched._fields, ours, tritons, strict=True)
    return {"differences": {field: [a, b] for field, a, b in pairs if a != b}, "parameters": len(ours.parameters)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
