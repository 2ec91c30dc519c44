"""`fastchargpt bench attention --tune`: a launch table for the GPU at hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastchargpt import __version__
from fastchargpt.bench.tune import Rig, Session, summary, tune
from fastchargpt.bench.tune_space import BUCKETS, Place, places
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels import tuning
from fastchargpt.kernels.availability import triton_problem, triton_version
from fastchargpt.kernels.tables import USER_FOLDER, user_path
from fastchargpt.precision import choose_device

__all__ = ["run_tune"]


def run_tune(
    device_name: str,
    *,
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    dropout: Sequence[bool] = (False, True),
    buckets: Sequence[int | None] = BUCKETS,
    again: bool = False,
    out: Path | None = None,
    rig: Rig | None = None,
) -> int:
    """Measure and write the table, printing how far it is; the exit status, 130 where it was stopped.

    Args:
        device_name: auto, cuda or cuda:N.
        dtypes: "half", "fp32".
        head_dims: each from 8 to 256.
        dropout: whether the settings with dropout on are measured too.
        buckets: the longest sequences of the entries; None is any.
        again: measure what the table holds already.
        out: the table; None is where the kernels look for it.
        rig: what measures, in place of the GPU: for tests.

    Raises:
        BackendUnavailableError: there is no GPU that the Triton kernels serve.
        ConfigError: a head_dim that no shipped table serves, or a file that cannot be gone on from or written.
    """
    device = choose_device(device_name)
    ahead = rig is None
    if rig is None:
        _refuse_what_cannot_be_timed(device)
        from fastchargpt.bench.tune_launches import GpuRig

        rig = GpuRig(device)
    arch, gpu = tuning.arch_of(device), tuning.gpu_of(device)
    wanted = [place for place in places(dtypes, head_dims, buckets=buckets, dropout=dropout) if _served(arch, place)]
    if not wanted:
        raise ConfigError(
            f"the table of {arch} has no entries for {', '.join(dtypes)} and head_dim {', '.join(map(str, head_dims))} "
            "to start from, so there is nothing to tune: --head-dim takes sizes from 8 to 256"
        )
    path = out or user_path(arch, gpu)
    session = Session(path, arch, _facts(gpu), again=again)
    if session.set_aside:
        print(session.set_aside)
    print(f"tuning {gpu or arch}: {len(wanted)} places, into {path}", flush=True)
    if ahead:
        from fastchargpt.bench.tune_compile import compile_ahead

        try:
            compile_ahead([place for place in wanted if session.lacks(place)], arch, device, _say)
        except KeyboardInterrupt:
            _say("stopped while compiling: nothing new has been measured; the same command goes on")
            return 130
    try:
        finished = tune(session, wanted, rig, _say)
    except OSError as error:
        raise ConfigError(
            f"the table {path} cannot be written: {error.strerror or error}; --out names another"
        ) from error
    tuning.forget()
    if session.measured:
        print(summary(session))
        print(f"wrote {path}")
        if path.resolve() not in {user_path(arch, name).resolve() for name in {gpu, ""}}:
            print(f"the kernels will read it as {user_path(arch, gpu)}, or in a folder that {USER_FOLDER} names")
    return 0 if finished else 130


def _say(line: str) -> None:
    print(line, flush=True)


def _refuse_what_cannot_be_timed(device: torch.device) -> None:
    problem = triton_problem(device.type, device.index or 0)
    if device.type != "cuda":
        problem = problem or "what Triton's interpreter takes on a CPU says nothing"
    if problem:
        raise BackendUnavailableError(f"--tune needs a GPU that the Triton kernels serve, and there is none: {problem}")


def _served(arch: str, place: Place) -> bool:
    try:
        tuning.plan_for(arch, place.dtype, place.head_dim, place.length, place.dropout)
    except ConfigError:
        return False
    return place.head_dim >= 8


def _facts(gpu: str) -> dict[str, Any]:
    """What the figures depend on: with another of these a table is measured anew."""
    return {"gpu": gpu, "triton": triton_version(), "torch": torch.__version__, "fastchargpt": __version__}
