"""Sliding windows and soft-caps in the Triton kernels: exact, sparing what is not seen, free where not asked for."""

import dataclasses
import functools
import warnings
from typing import Any

import pytest
import torch
from aot import Launch, record_launches
from flash_cases import Case, judge, plan_of
from launches import VARIED
from oracles import qkv_case, worst_error
from strict_interpreter import strict_interpreter
from torch.utils.flop_counter import FlopCounterMode
from work_counter import WorkCounter

from fastchargpt.attention import causal_attention, causal_attention_packed, explain_attention
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.kernels import flash, tuning
from fastchargpt.kernels.launch import problem_of
from fastchargpt.kernels.tuning import Config, Entry, forced, known_archs, load_table, plan_for, serves_variants

BOTH = {"window": 9, "softcap": 1.5}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 0},
        {"window": 1, "block_m": 32},
        {"window": 15, "tq": 50, "tk": 50, "lse_gradient": True},
        {"window": 16, "tq": 33, "tk": 50, "block_n": 32},
        {"window": 20, "tq": 50, "tk": 33, "heads": 2, "kv_heads": 1},
        {"window": 40, "tq": 60, "tk": 60, "dropout_p": 0.3},
        {"window": 3, "tq": 5, "tk": 60},
        {"window": 3, "tq": 5, "tk": 60, "dropout_p": 0.3},  # its mask counts the keys that nobody sees
        {"window": 30, "tq": 20, "tk": 64, "softcap": 2.0, "scale": -0.4},
        {"softcap": 0.5, "causal": False, "lse_gradient": True},
        {"softcap": 50.0, "scale": 1.0},
        {"softcap": 1000.0, "dropout_p": 0.2},  # a cap that does nothing: whatever tanh loses near 0 would show
        {"softcap": 2.0, "scale": 0.0},
    ],
    ids=str,
)
def test_windows_and_soft_caps(changes: dict[str, Any], dtype: str) -> None:
    judge(Case(**{"heads": 1, "kv_heads": 1, "dtype": dtype, **changes}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"window": 20, "tq": 3},
        {"window": 2, "tq": 8, "heads": 2},
        {"tq": 2, "softcap": 1.0},
        {"window": 35, "softcap": 9.0},
    ],
    ids=str,
)
def test_decoding(changes: dict[str, Any], dtype: str) -> None:
    judge(Case(**{"heads": 1, "kv_heads": 1, "tq": 1, "tk": 90, "dtype": dtype, "decode": True, **changes}))


def test_capped_scores_beyond_every_exponential() -> None:
    q, k, v = (1000.0 * x.round() for x in qkv_case(batch=1, tq=17))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with strict_interpreter(), forced(plan_of("tiled")):
        out = causal_attention(q, k, v, scale=1.0, softcap=20.0, backend="triton")
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert worst_error(out, causal_attention(q, k, v, scale=1.0, softcap=20.0, backend="naive")) < 0.01
    assert all(x.isfinite().all() for x in gradients)


def pairs_of_blocks(tq: int, tk: int, window: int, block_m: int, block_n: int) -> int:
    """Pairs of a block of queries and one of keys between which anything is seen."""
    return sum(
        any(
            row + tk - tq - window <= key <= row + tk - tq
            for row in range(m, min(m + block_m, tq))
            for key in range(n, min(n + block_n, tk))
        )
        for m in range(0, tq, block_m)
        for n in range(0, tk, block_n)
    )


@pytest.mark.parametrize("window", [0, 5, 16, 40, 100])
@pytest.mark.parametrize(("tq", "tk"), [(128, 128), (96, 128), (48, 128), (128, 80)])
def test_only_blocks_in_the_window_are_computed(tq: int, tk: int, window: int) -> None:
    q, k, v = qkv_case(batch=1, heads=1, tq=tq, tk=tk, requires_grad=True)
    plan = plan_of("tiled", 16, 32)
    with strict_interpreter(counter=WorkCounter()) as counter, forced(plan):
        out = causal_attention(
            q, k, v, window=window, dropout_p=0.1, backend="triton"
        )  # with dropout no key is cut off
        out.sum().backward()
    assert counter is not None
    products = {work.kernel: sum(work.products.values()) for work in counter.launches}
    pairs = pairs_of_blocks(tq, tk, window, 16, 32)
    assert products == {
        "attention_forward_kernel": 2 * pairs,
        "backward_dq_kernel": 3 * pairs,
        "backward_dkdv_kernel": 4 * pairs,
    }


def launches_of(time: int, plan: tuning.Plan | None = None, **options: Any) -> list[Launch]:
    qkv = torch.zeros(1, time, 3 * 64, dtype=torch.bfloat16, requires_grad=True)
    with record_launches("sm_80") as launches, forced(plan or plan_for("sm_80", "half", 64, time, False)):
        flash.attention_packed(qkv, 1, 1, scale=0.1, **options).sum().backward()
    return launches


def test_the_plain_launch_has_neither_argument() -> None:
    for launch in launches_of(600):
        assert launch.signature["window"] == launch.signature["softcap"] == "constexpr"
        assert launch.constants["window"] is None
        assert launch.constants["softcap"] is None
    for window in (1, 16):
        for launch in launches_of(600, window=window, softcap=1.0):  # one binary for all windows and caps
            assert launch.signature["window"] == "i32"
            assert launch.signature["softcap"] == "fp32"
            assert not [path for path in launch.attributes if launch.kernel.arg_names[path[0]] == "window"]


def test_a_window_that_hides_nothing_is_the_plain_launch() -> None:
    plain = [launch.key("sm_80") for launch in launches_of(100)]
    assert [launch.key("sm_80") for launch in launches_of(100, window=99)] == plain
    tiled = plan_for("sm_80", "half", 64, 100, False, True)
    assert [launch.key("sm_80") for launch in launches_of(100, tiled, window=98)] != plain


def test_one_query_reads_its_window_and_runs_the_plain_kernel() -> None:
    q, k, v = qkv_case(batch=1, heads=1, tq=1, tk=100)
    with record_launches("sm_90") as launches, forced(plan_of("tiled", decode=True)):
        flash.attention(q, k, v, scale=0.1, causal=True, window=40)
    split = launches[0]
    assert split.constants["window"] is None
    assert split.grid[0] == 3  # 41 keys in blocks of 16
    with strict_interpreter(counter=WorkCounter()) as counter, forced(plan_of("tiled", decode=True)):
        flash.attention(q, k, v, scale=0.1, causal=True, window=40)
    assert counter is not None
    assert counter.launches[0].unique_loaded == (1 + 2 * 41) * 16 * 4


@pytest.mark.parametrize("arch", known_archs())
def test_short_sequences_take_two_launches(arch: str) -> None:
    for length in (16, 100, 5000):
        kernels = [config.kernel for config in plan_for(arch, "half", 64, length, False, True).backward]
        assert kernels == ["dq", "dkdv"]


def test_an_entry_that_has_no_variants_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(kernel: str, block_n: int, head_dim: int, variants: str) -> Entry:
        config = Config(kernel, 32, block_n, 4, 1)
        options = {"dtype": "half", "max_length": None, "dropout": True}
        return Entry(config=config, head_dim=head_dim, variants=variants, **options)

    ways = ((32, 32, "none"), (64, 64, "all"), (128, 96, "no dropout"), (256, 128, "none"))
    table = tuple(entry(kernel, *way) for kernel in VARIED for way in ways)
    # settings that an entry has not for variants serve no narrower head from another entry either
    table += (dataclasses.replace(table[0], head_dim=48, variants="all"),)
    monkeypatch.setattr(tuning, "load_table", functools.lru_cache(lambda arch: table))
    tuning.forget()
    try:
        assert plan_for("x", "half", 16, 99, False).forward.block_n == 32
        assert plan_for("x", "half", 16, 99, False, True).forward.block_n == 64
        assert serves_variants("cpu", 0, torch.bfloat16, 64, True)
        assert serves_variants("cpu", 0, torch.bfloat16, 65, False)
        assert not serves_variants("cpu", 0, torch.bfloat16, 65, True)
        assert not serves_variants("cpu", 0, torch.bfloat16, 97, False)
        assert not serves_variants("cpu", 0, torch.float32, 16, False)
        q, k, v = qkv_case(head_dim=100, dtype=torch.bfloat16)
        with (
            strict_interpreter(),
            pytest.raises(BackendUnavailableError, match="with a window or a soft-cap and without"),
        ):
            causal_attention(q, k, v, softcap=1.0, backend="triton")
    finally:
        tuning.forget()
    assert [Entry.from_json(x.to_json()) for x in table] == list(table)


def test_one_launch_kernels_refuse_what_they_do_not_have() -> None:
    q, k, v = qkv_case(batch=1)
    problem = problem_of(q, k, scale=1.0, causal=True, window=2)
    from fastchargpt.kernels import flash_short

    with pytest.raises(AssertionError, match="neither window nor soft-cap"):
        flash_short.backward(q, None, q, k, v, q, q, q, k, v, q, problem, plan_of("tile").backward[0])


def test_flops_of_a_window() -> None:
    q, k, v = qkv_case(heads=2, tq=8, tk=12, head_dim=16, requires_grad=True)
    qkv = torch.randn(2, 12, 3 * 32, requires_grad=True)
    counts = []
    with strict_interpreter(), forced(plan_of("tiled")):
        for attend in (
            lambda: causal_attention(q, k, v, window=4, backend="triton"),
            lambda: causal_attention_packed(qkv, 2, window=4, backend="triton"),
        ):
            with FlopCounterMode(display=False) as counter:
                attend().sum().backward()
            counts.append(counter.get_total_flops())
    keys = 5  # that a query sees at most
    assert counts == [7 * 2 * 2 * 2 * 8 * keys * 16, 7 * 2 * 2 * 2 * 12 * keys * 16]


def test_packed_is_unpacked() -> None:
    qkv = torch.randn(1, 40, 3 * 2 * 16, requires_grad=True)
    dout = torch.randn(1, 40, 32)
    results = []
    for backend in ("triton", "naive"):
        with strict_interpreter(), forced(plan_of("tiled")):
            out = causal_attention_packed(qkv, 2, **BOTH, backend=backend)
            results.append((out, torch.autograd.grad(out, qkv, dout)[0]))
    for got, want in zip(*results, strict=True):
        assert worst_error(got, want) < 5e-6


def test_operators_are_registered_in_full() -> None:
    q, k, v = qkv_case(batch=1, heads=2, kv_heads=1, tq=6, requires_grad=True)
    packed = torch.randn(1, 6, 3 * 16, requires_grad=True)
    with strict_interpreter(poison=False), forced(plan_of("tiled")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        torch.library.opcheck(torch.ops.fastchargpt.attention_forward, (q, k, v, None, 0.3, True, 0.0, 2, 5.0))
        torch.library.opcheck(torch.ops.fastchargpt.attention_packed_forward, (packed, None, 1, 1, 0.3, 0.0, 2, 5.0))


def test_compiles_whole_forward_and_backward() -> None:
    qkv = torch.randn(1, 20, 3 * 32, requires_grad=True)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return causal_attention_packed(x, 2, **BOTH, backend="triton")

    with strict_interpreter(), forced(plan_of("tiled")):
        want, got = attend(qkv), torch.compile(attend, fullgraph=True, backend="aot_eager")(qkv)
        assert torch.equal(got, want)
        for x, y in zip(*(torch.autograd.grad(out.sum(), qkv) for out in (got, want)), strict=True):
            assert torch.equal(x, y)


def test_explain_says_what_becomes_of_them() -> None:
    q, k, v = qkv_case(tq=40)
    with strict_interpreter(), forced(plan_of("tiled")):
        text = explain_attention(q, k, v, **BOTH, backend="triton")
        assert "; window 9: blocks of keys outside it are skipped; scores capped at 1.5; " in text
        assert "it hides none" in explain_attention(q, k, v, window=39, backend="triton")


@pytest.mark.parametrize("dtype", ["half", "fp32"])
@pytest.mark.parametrize("arch", known_archs())
def test_every_table_serves_windows_and_soft_caps(arch: str, dtype: str) -> None:
    """At every head_dim that it serves without them, but for dropout in fp32 and beside the widest heads on gfx942."""
    entries = [e for e in load_table(arch) if e.dtype == dtype]
    for head_dim in sorted({e.head_dim for e in entries}):
        for dropout in (False, True) if dtype == "half" else (False,):
            plan_for(arch, dtype, head_dim, 1000, dropout)
            if (arch, head_dim, dropout) != ("gfx942", 256, True):  # no registers for all three: SDPA, with the reason
                plan_for(arch, dtype, head_dim, 1000, dropout, True)
