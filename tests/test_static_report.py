"""The static speed estimate: its arithmetic on known instructions, its yardstick's gradients, its labels."""

import csv
import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from aot import Loop, Report
from cost_model import estimate
from oracles import worst_error
from peaks import PEAKS
from static_report import COLUMNS, HERE, Row, count_work, extended, own, textbook, to_markdown
from strict_interpreter import strict_interpreter
from textbook_backward import textbook_backward
from work_counter import LaunchWork, LoopWork

from fastchargpt.kernels.tuning import Config, known_archs


def report_of(target="sm_80", warps=4, loops=(), **rest):
    """A report that holds these instructions, the loops' among them."""
    opcodes = Counter(rest)
    for loop in loops:
        opcodes.update(loop)
    return Report(
        kernel="k", target=target, registers=64, stack=0, spills=0, shared=0, tensor_memory=0, warps=warps,
        opcodes=dict(opcodes), loops=[Loop(dict(loop)) for loop in loops], half_dots=1, loops_with_dots=len(loops),
        slow_dots=0, tf32=False, atomics=[], narrow_products=[],
    )  # fmt: skip


def test_tensor_cycles_of_a_loop():
    """64 x 64 x 64 by 4 warps on an A100 (1024 multiply-adds a clock): 32 HMMA a warp, 256 cycles a trip."""
    report = report_of(loops=[{"HMMA.16816.F32.BF16": 32}])
    work = LaunchWork("k", programs=108, products=Counter({(64, 64, 64): 108 * 10}), loops=[LoopWork(1080, 1080)])
    found = estimate(report, work, heads=1, peak=PEAKS["sm_80"], matrix_loops=[0])
    assert found.loops_matched
    assert found.tensor_repeated == pytest.approx(1.0)
    assert found.seconds["tensor"] == pytest.approx(10 * 256 / 1.41e9)
    assert found.limiter == "tensor"
    assert found.overlapped == found.seconds["tensor"]


@pytest.mark.parametrize(
    ("target", "opcode", "warps", "times"),
    [
        ("sm_90", "HGMMA.64x64x16.F32.BF16", 4, 4),
        ("sm_100", "UTCHMMA", 4, 4),
        ("gfx942", "v_mfma_f32_32x32x8_bf16", 4, 8),
        ("sm_80", "HMMA.16816.F32", 8, 16),
    ],
)
def test_every_targets_matrix_instruction(target, opcode, warps, times):
    """As many as one 64 x 64 x 64 product takes: no work is repeated (sm_100 works on 128 rows whatever is asked)."""
    report = report_of(target, warps, loops=[{opcode: times}])
    work = LaunchWork("k", programs=1, products=Counter({(64, 64, 64): 1}), loops=[LoopWork(1, 1)])
    found = estimate(report, work, heads=1, peak=PEAKS[target], matrix_loops=[0])
    assert found.tensor_repeated == pytest.approx(2.0 if target == "sm_100" else 1.0)


def test_other_units_and_dram():
    report = report_of(**{"MUFU.EX2": 32, "LDS.128": 8, "FFMA": 16, "LOP3.LUT": 16, "SHFL.BFLY": 4, "UMOV": 100})
    work = LaunchWork("k", programs=2, loaded=6400, stored=0, unique_loaded=1000, unique_stored=24)
    peak = PEAKS["sm_80"]
    found = estimate(report, work, heads=3, peak=peak, matrix_loops=[])
    clock = peak.clock  # six programs on six multiprocessors: each does one
    assert found.seconds["special"] == pytest.approx(32 * 128 / 16 / clock)
    assert found.seconds["shared"] == pytest.approx(8 * 128 * 16 / 128 / clock)
    assert found.seconds["fp32"] == pytest.approx(16 * 128 / 64 / clock)
    assert found.seconds["alu"] == pytest.approx(16 * 128 / 64 / clock)
    assert found.seconds["memory"] == pytest.approx(12 * 128 / 32 / clock)
    assert found.seconds["issue"] == pytest.approx(176 * 4 / 4 / clock)
    assert found.seconds["fill"] == pytest.approx(6400 / 64 / 2 / clock)
    assert found.seconds["dram"] == pytest.approx(3 * 1024 / peak.dram)
    assert found.limiter == "special"
    assert found.serial >= found.overlapped


def test_loops_that_the_compiler_merged_count_on_average():
    report = report_of(loops=[{"HMMA.16816.F32": 32}])
    work = LaunchWork(
        "k", programs=1, products=Counter({(64, 64, 64): 4}), loops=[LoopWork(1, 1), LoopWork(0, 0), LoopWork(3, 3)]
    )
    found = estimate(report, work, heads=1, peak=PEAKS["sm_80"], matrix_loops=[0, 2])
    assert not found.loops_matched
    assert found.tensor_repeated == pytest.approx(1.0)


def test_what_a_branch_may_skip_counts_as_often_as_it_is_taken():
    report = report_of(loops=[{"HMMA.16816.F32": 32, "FFMA": 100, "FSEL": 64}])
    report = dataclasses.replace(report, loops=[Loop(report.loops[0].opcodes, skippable={"FSEL": 64})])
    work = LaunchWork("k", programs=1, products=Counter({(64, 64, 64): 8}), loops=[LoopWork(8, 8, branches=2)])
    found = estimate(report, work, heads=1, peak=PEAKS["sm_80"], matrix_loops=[0])
    assert found.seconds["fp32"] == pytest.approx(8 * 100 * 128 / 64 / 1.41e9)
    assert found.seconds["alu"] == pytest.approx(2 * 64 * 128 / 64 / 1.41e9)


def test_iterations_that_the_pipeline_peeled_are_not_counted_twice():
    loop = {"HMMA.16816.F32": 32, "FFMA": 100}
    report = report_of(loops=[loop], **{"HMMA.16816.F32": 32, "FFMA": 100, "MOV": 7})
    work = LaunchWork("k", programs=1, products=Counter({(64, 64, 64): 4}), loops=[LoopWork(4, 4)])
    found = estimate(report, work, heads=1, peak=PEAKS["sm_80"], matrix_loops=[0])
    assert found.tensor_repeated == pytest.approx(1.0)
    assert found.seconds["fp32"] == pytest.approx(4 * 100 * 128 / 64 / 1.41e9)
    work.products[16, 16, 16] = 1  # now a product stands outside, and the matrix instructions there are its own
    assert estimate(report, work, 1, PEAKS["sm_80"], [0]).seconds["fp32"] > found.seconds["fp32"]


def test_peaks_agree_with_the_published_tflops():
    published = {"sm_80": 312, "sm_86": 71, "sm_89": 165.2, "sm_90": 989.4, "sm_100": 2250, "sm_120": 209.5}
    for target, tflops in (published | {"gfx942": 1307.4}).items():
        assert PEAKS[target].tensor_flops == pytest.approx(tflops * 1e12, rel=0.01)
        assert str(tflops) in PEAKS[target].source or f"{tflops / 1000:.2f} P" in PEAKS[target].source


@pytest.mark.parametrize(("n_ctx", "blocks"), [(50, (32, 16)), (64, (32, 32))])
def test_the_textbook_backward_is_right(n_ctx, blocks):
    """A yardstick that computed something else would be worth nothing."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, n_ctx, 32) for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].mT * 32**-0.5
    scores = scores.masked_fill(torch.ones(n_ctx, n_ctx).triu(1).bool(), float("-inf"))
    out = scores.softmax(-1) @ exact[2]
    out.backward(dout.double())
    for target in ("sm_80", "sm_90"):  # with two loops, and with one
        with strict_interpreter(target=target):
            found = textbook_backward(q, k, v, out.detach().float(), scores.logsumexp(-1).float(), dout, blocks=blocks)
        for gradient, x in zip(found, exact, strict=True):
            assert worst_error(gradient, x.grad) < 2e-2  # tf32 products


@pytest.mark.parametrize("run", [textbook((32, 16, 4, 1)), own((Config("forward", 32, 16, 4, 1),))])
def test_the_work_of_long_sequences_is_extrapolated_exactly(run):
    for target in ("sm_80", "sm_90"):
        counted = {length: count_work(run, length, 16, target) for length in (32, 64, 96)}
        assert extended(counted, 192) == count_work(run, 192, 16, target)


def test_every_figure_is_labelled_an_estimate():
    row = Row(*(["x"] * (len(COLUMNS) - 1)))
    assert row.note == "estimate"
    assert "ESTIMATES" in to_markdown([row]).splitlines()[0]
    path = HERE.parent / "results" / "static.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert all(row["note"].startswith("estimate") for row in rows)
    assert {row["implementation"] for row in rows} >= {"fastchargpt", "textbook"}
    shapes = {(row["head_dim"], row["T"]) for row in rows}
    assert set(itertools.product(["32", "64", "128"], ["64", "128", "256", "512", "1024", "2048"])) <= shapes
    assert {row["target"] for row in rows} == set(known_archs())


def test_reports_carry_what_the_estimate_reads():
    assert {field.name for field in dataclasses.fields(Report)} >= {"warps", "loops", "opcodes", "target"}
