"""Attention: every backend that is here, forward, backward and both, against sequence length and head size."""

from typing import Any

import pytest
import torch

from fastchargpt.bench.attention import CONTESTANTS, PASSES, entrants, shapes
from fastchargpt.bench.settings import Settings, settings_from

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = settings_from(device=config.getoption("--device"), quick=config.getoption("--quick"), peers=[])
    gpu = chosen.device.type == "cuda"
    # fp16 has no products on a CPU, and bf16 without AMX is emulated there
    dtypes = list(DTYPES) if gpu and not chosen.quick else ["bf16"] if gpu else ["fp32"]
    passes = ["both"] if chosen.quick else list(PASSES)
    cases = [(s, d, p) for d in dtypes for p in passes for s in shapes(chosen.device, quick=chosen.quick)]
    metafunc.parametrize(
        ("shape", "dtype", "what"), cases, ids=[f"{d}-{p}-{str(s).replace(' ', '-')}" for s, d, p in cases]
    )
    metafunc.parametrize("contestant", list(CONTESTANTS))


def test_attention(rank: Any, settings: Settings, contestant: str, shape: Any, dtype: str, what: Any) -> None:
    rank(
        f"attention {what} {dtype} {shape}",
        contestant,
        lambda: entrants(shape, what, DTYPES[dtype], settings.device),
        subject="attention",
        what=what,
        dtype=dtype,
        time=shape.time,
        head_dim=shape.head_dim,
        batch=shape.batch,
        heads=shape.heads,
    )
