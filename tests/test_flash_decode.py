"""Decoding kernels: a few queries against a cache, the keys split over programs."""

import pytest
import torch
from aot import record_launches
from flash_cases import Case, judge, plan_of
from oracles import qkv_case, worst_error
from strict_interpreter import strict_interpreter

from fastchargpt.kernels import flash, flash_decode, naive
from fastchargpt.kernels.launch import problem_of
from fastchargpt.kernels.tuning import forced


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tq", "tk", "head_dim"),
    [(2, 2, 1, 70, 16), (4, 1, 3, 50, 20), (6, 2, 1, 33, 59), (2, 1, 5, 129, 8), (4, 2, 8, 20, 32)],
)
def test_decode(dtype: str, heads: int, kv_heads: int, tq: int, tk: int, head_dim: int) -> None:
    case = Case(dtype=dtype, heads=heads, kv_heads=kv_heads, tq=tq, tk=tk, head_dim=head_dim, decode=True)
    with record_launches("sm_90") as launches, forced(plan_of("tiled", decode=True)):
        q, k, v = qkv_case(batch=1, heads=heads, kv_heads=kv_heads, tq=tq, tk=tk, head_dim=head_dim)
        flash.attention(q, k, v, scale=0.25, causal=True)
    assert [launch.name for launch in launches] == ["decode_split_kernel", "decode_merge_kernel"]
    judge(case)


@pytest.mark.parametrize(("scale", "causal", "layout"), [(0.0, True, "gaps"), (-0.4, False, "columns_first")])
def test_decode_options(scale: float, causal: bool, layout: str) -> None:
    judge(Case(tq=2, tk=50, scale=scale, causal=causal, layout=layout, lse_gradient=True, decode=True))


def test_queries_before_the_first_key_see_nothing() -> None:
    q, k, v = qkv_case(batch=1, heads=1, tq=8, tk=40)
    k, v = k[:, :, :3], v[:, :, :3]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    problem = problem_of(q, k, scale=0.3, causal=True)
    with strict_interpreter():
        flash_decode.forward(q, k, v, out, lse, problem, plan_of("tiled", decode=True).decode, 1)  # type: ignore[arg-type]
    want_out, want_lse = naive.attention(q, k, v, scale=0.3, causal=True)
    assert worst_error(out, want_out) < 1e-6
    assert worst_error(lse, want_lse) < 1e-6


def test_a_single_sequence_fills_the_chip_and_a_large_batch_is_not_split() -> None:
    def pieces(batch: int, tq: int, tk: int) -> int:
        return flash_decode.splits((batch, 8, tq, 64), (batch, 8, tk, 64), processors=132, block_n=64)

    assert pieces(1, 1, 8192) * 8 >= 132
    assert pieces(64, 1, 8192) == 1
    assert pieces(1, 1, 64) == 1  # one block of keys
    assert pieces(1, flash_decode.MAX_ROWS + 1, 8192) == 1  # more rows than a tile: the tiled kernel's
