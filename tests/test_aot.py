"""Each rule of the compile gate catches a kernel that breaks it and passes one that does not.

The toy kernels are compiled for real targets; no GPU is needed.
"""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from aot import TARGETS, compile_launch, launch_of, record_launches
from control_flow import Instruction, innermost_loops, shortest_round
from gate import judge, problems
from launches import Case
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from ttir import loops_with_dots, narrow_products

from fastchargpt.kernels.tuning import Config


@triton.jit
def multiply_kernel(
    a_ptr, b_ptr, c_ptr, stride_am, k_len,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """C = A B for one block of rows: a loop over k with a dot in it."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns, inner = tl.arange(0, BLOCK), tl.arange(0, STEP)
    if WIDE:
        rows = rows.to(tl.int64)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, k_len, STEP):
        valid = k + inner < k_len
        a = tl.load(a_ptr + rows[:, None] * stride_am + (k + inner)[None, :], mask=valid[None, :], other=0.0)
        b = tl.load(b_ptr + (k + inner)[:, None] * BLOCK + columns[None, :], mask=valid[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * BLOCK + columns[None, :], acc)


@triton.jit
def three_products_kernel(x_ptr, y_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Three accumulators of 256 columns each live in tensor memory at once."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b, c = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for i in range(steps):
        x = tl.load(x_ptr + i + rows[:, None] * K + inner[None, :])
        y = tl.load(x_ptr + i + inner[:, None] * N + columns[None, :])
        a = tl.dot(x, y, a)
        b = tl.dot(x + x, y, b)
        c = tl.dot(x * x, y, c)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], a * b + c)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


def multiply(target, dtype=torch.float16, block=64, step=32, precision="ieee", wide=True, warps=4, stages=2):
    a, b, c = (torch.empty(256, 256, dtype=kind, device="meta") for kind in (dtype, dtype, torch.float32))
    launch = launch_of(
        target, multiply_kernel, (4,), a, b, c, a.stride(0), 256,
        BLOCK=block, STEP=step, PRECISION=precision, WIDE=wide, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    report = compile_launch(launch, target)
    return report, problems(launch, report)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "sm_75"])
def test_a_good_kernel_passes(target):
    report, found = multiply(target)
    assert found == []
    assert report.registers > 16
    assert 0 < report.shared <= TARGETS[target].shared_limit
    assert len(report.matrix_loops) == 1
    assert report.matrix_loops[0].instructions < report.whole.instructions
    assert report.half_dots == report.loops_with_dots == 1
    assert (report.tensor_memory > 0) == (target == "sm_100")


def test_no_tensor_cores_is_caught():
    """Triton 3.7 multiplies fp16 on sm_75 with ordinary fused multiply-adds."""
    report, found = multiply("sm_75")
    assert any("no tensor cores" in problem for problem in found)
    assert report.whole.count("FFMA") > 100


@pytest.mark.parametrize(("target", "warps"), [("sm_80", 2), ("gfx942", 1)])
def test_spills_are_caught(target, warps):
    report, found = multiply(target, block=128, step=16, warps=warps)
    assert any(problem.startswith("spills") for problem in found)
    assert report.spills > 0
    assert report.stack > 0


def test_too_much_shared_memory_is_caught():
    report, found = multiply("sm_86", block=128, step=128, warps=8, stages=3)
    assert report.shared > TARGETS["sm_86"].shared_limit
    assert any(problem.startswith("shared memory") for problem in found)
    _, found = multiply("sm_90", block=128, step=128, warps=8, stages=3)
    assert not any(problem.startswith("shared memory") for problem in found)


def test_matrix_instructions_that_wait_for_each_other_are_caught():
    """What ptxas makes of two groups of four warps side by side on 64 rows: a wait for each matrix instruction."""
    case = Case(dtype=torch.bfloat16, head_dim=64, length=1024)
    (judgement,) = judge(Config("dkdv", 64, 64, 8, 2), case, "sm_90")
    assert [problem.split(":")[0] for problem in judgement.problems] == ["serialized"]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("config", "waits"),
    [(Config("forward", 64, 64, 4, 3), 1), (Config("dq", 64, 64, 4, 3), 2), (Config("dkdv", 32, 64, 4, 2), 2)],
    ids=lambda value: getattr(value, "kernel", value),
)
def test_on_hopper_a_rounds_last_products_run_on_into_the_next(config, waits, dropout):
    """A round waits for the products that it makes something of, which come first, and for no others."""
    case = Case(dtype=torch.bfloat16, head_dim=64, length=1024, dropout=dropout)
    (judgement,) = judge(config, case, "sm_90")
    (loop,) = judgement.report.matrix_loops
    assert loop.count(r"WARPGROUP\.DEPBAR") == waits
    (narrow,) = judge(config, dataclasses.replace(case, head_dim=52), "sm_90")  # which ptxas would serialize
    (waiting,) = narrow.report.matrix_loops
    assert waiting.count(r"WARPGROUP\.DEPBAR") == waits + 1
    assert waiting.count("FADD|FFMA|FMUL") == loop.count("FADD|FFMA|FMUL")  # nothing is done to the product


@pytest.mark.parametrize(("precision", "has_tf32"), [("ieee", False), ("tf32", True)])
def test_tf32_is_seen(precision, has_tf32):
    report, found = multiply("sm_90", torch.float32, block=32, precision=precision)
    assert report.tf32 == has_tf32
    assert found == []  # an fp32 product needs no tensor cores, and tf32 was asked for


def test_tf32_in_ieee_is_caught():
    a = torch.empty(64, 64, device="meta")
    tf32 = launch_of(
        "sm_90", multiply_kernel, (1,), a, a, a, 64, 64,
        BLOCK=32, STEP=32, PRECISION="tf32", WIDE=True, num_warps=4,
    )  # fmt: skip
    ieee = launch_of(
        "sm_90", multiply_kernel, (1,), a, a, a, 64, 64,
        BLOCK=32, STEP=32, PRECISION="ieee", WIDE=True, num_warps=4,
    )  # fmt: skip
    assert problems(ieee, compile_launch(tf32, "sm_90")) == ["tf32 in the code of a kernel asked for ieee precision"]


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_atomics_are_caught(target):
    x = torch.empty(64, device="meta")
    launch = launch_of(target, atomic_kernel, (1,), x, x, BLOCK=64)
    (problem,) = problems(launch, compile_launch(launch, target))
    assert problem.startswith("atomics: ")


def test_32_bit_offsets_are_caught():
    report, found = multiply("sm_80", wide=False)
    assert len(report.narrow_products) == 1
    assert "arith.muli" in report.narrow_products[0]
    assert any(problem.startswith("32-bit offsets") for problem in found)


def test_tensor_memory_over_512_columns_is_caught():
    x = torch.empty(256, 256, dtype=torch.float16, device="meta")
    launch = launch_of("sm_100", three_products_kernel, (1,), x, x, 8, M=128, N=256, K=32, num_warps=4)
    report = compile_launch(launch, "sm_100")
    assert report.spills == report.stack == 0  # it looks fine, and would only trap
    assert any(problem.startswith("tensor memory") for problem in problems(launch, report))


# -- recording


def test_a_recorded_launch_is_specialised_as_on_a_gpu_and_nothing_runs():
    x = torch.full((64,), 7.0)
    before = JITFunction.run, driver._active
    with record_launches("sm_90") as launches:
        copy_kernel[lambda meta: (triton.cdiv(64, meta["BLOCK"]), 1)](x, x[1:], 1, BLOCK=32, num_warps=8)
    assert before == (JITFunction.run, driver._active)
    (launch,) = launches
    assert launch.name == "copy_kernel"
    assert launch.grid == (2, 1)
    assert launch.options["num_warps"] == 8
    assert launch.constants == {"BLOCK": 32, "n": 1}  # an integer that is 1 becomes a constant
    assert launch.signature["x_ptr"] == "*fp32"
    assert launch.attributes[(0,)] == [["tt.divisibility", 16]]
    assert not launch.attributes[(1,)]  # the second pointer is off by four bytes
    assert torch.equal(x, torch.full((64,), 7.0))


def test_a_wrong_launch_is_refused_while_recording():
    x = torch.empty(64, device="meta")
    with pytest.raises(TypeError, match="BLOCK"):
        launch_of("sm_90", copy_kernel, (1,), x, x, 64)
    with pytest.raises(KeyError, match="num_warp"):
        launch_of("sm_90", copy_kernel, (1,), x, x, 64, BLOCK=32, num_warp=4)


def test_the_key_covers_source_arguments_options_and_target():
    x = torch.empty(64, device="meta")
    base = launch_of("sm_90", copy_kernel, (1,), x, x, 64, BLOCK=32)
    others = [
        launch_of("sm_90", copy_kernel, (1,), x, x, 63, BLOCK=32),
        launch_of("sm_90", copy_kernel, (1,), x, x, 64, BLOCK=64),
        launch_of("sm_90", copy_kernel, (1,), x, x.half(), 64, BLOCK=32),
        launch_of("sm_90", copy_kernel, (1,), x, x, 64, BLOCK=32, num_warps=2),
    ]
    keys = {base.key("sm_90"), base.key("sm_80"), *(launch.key("sm_90") for launch in others)}
    assert len(keys) == 6
    assert launch_of("sm_90", copy_kernel, (7,), x, x, 128, BLOCK=32).key("sm_90") == base.key("sm_90")


def test_reports_are_remembered(monkeypatch):
    report, _ = multiply("sm_90")
    monkeypatch.setattr("aot._compile", None)  # a second compilation would fail
    assert multiply("sm_90")[0] == report


# -- reading the IR

IR = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<f32> loc("x"(#loc)), %stride_m: i32 {tt.divisibility = 16 : i32}, %n: i32) {
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %stride_t = tt.splat %stride_m : i32 -> tensor<64xi32>
    %local = arith.muli %range, %stride_t : tensor<64xi32>
    %wide = arith.extsi %stride_m : i32 to i64
    %wide_pid = arith.extsi %pid : i32 to i64
    %fine = arith.muli %wide_pid, %wide : i64
    NARROW
    %l:2 = scf.for %i = %c0 to %n step %c64 iter_args(%acc = %zero) -> (tensor<64xf32>) : i32 {
      LOOP
      %m = "tt.reduce"(%s) <{axis = 1 : i32}> ({
      ^bb0(%a: f32 loc(#loc), %b: f32):
        tt.reduce.return %a : f32 loc(#loc118)
      }) : (tensor<64x64xf32>) -> tensor<64xf32> loc(#loc118)
      AFTER
    } loc(#loc9)
  } loc(#loc)
}
"""


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("", False),
        ("%bad = arith.muli %pid, %stride_m : i32 loc(#loc4)", True),
        ("%bad = arith.muli %stride_m, %n : i32", True),
        ("%bad = arith.muli %n, %pid : i32", False),
        ("%bad = arith.addi %local, %range : tensor<64xi32>", False),
    ],
)
def test_narrow_products(line, caught):
    ir = IR.replace("NARROW", line)
    assert [text in line for text in narrow_products(ir)] == ([True] if caught else [])
    ir = IR.replace(
        "LOOP", "%s = tt.splat %i : i32 -> tensor<64xi32>\n%bad = arith.muli %s, %stride_t : tensor<64xi32>"
    )
    assert len(narrow_products(ir)) == 1


def test_loops_with_dots():
    dot = "%d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>"
    assert loops_with_dots(IR) == 0
    assert loops_with_dots(IR.replace("NARROW", dot)) == 0
    assert loops_with_dots(IR.replace("LOOP", dot)) == loops_with_dots(IR.replace("AFTER", dot)) == 1
    inner = "scf.for %j = %c0 to %n step %c64 : i32 {\n" + dot + "\n} loc(#loc)"
    assert loops_with_dots(IR.replace("LOOP", inner)) == 1
    assert loops_with_dots(IR.replace("LOOP", inner).replace("AFTER", dot)) == 2


def test_the_interpreter_and_the_gate_share_one_process():
    """Both patch Triton and both restore it, in either order."""
    from strict_interpreter import strict_interpreter

    x, y = torch.randn(40), torch.empty(40)
    for _ in range(2):
        with strict_interpreter():
            copy_kernel[(2,)](x, y, 40, BLOCK=32)
        assert torch.equal(x, y)
        launch = launch_of("sm_80", copy_kernel, (2,), x, y, 40, BLOCK=32)
        assert problems(launch, compile_launch(launch, "sm_80")) == []


# -- reading machine code


def code_of(text):
    """Instructions from words: "jump:3?" may branch to 3, "jump:3" does, "exit" ends, others are plain."""
    code = []
    for word in text.split():
        opcode, _, target = word.partition(":")
        ends = opcode == "exit" or (target and not target.endswith("?"))
        code.append(Instruction(opcode, int(target.rstrip("?")) if target else None, not ends))
    return code


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("a b c exit", []),
        ("a b jump:1? exit", [[1, 2]]),
        ("a b c jump:2? jump:1? exit", [[2, 3]]),  # the inner one only
        ("a jump:1? b jump:3? exit", [[1], [3]]),
        ("a jump:4? b exit c jump:2", []),  # a detour behind the end is no loop
        ("a jump:5? b jump:0? exit c jump:2", [[0, 1, 2, 3, 5, 6]]),  # and belongs to the loop that it leaves
        ("a SYNCS jump:1? " + "b " * 12 + "jump:0? exit", [list(range(16))]),  # waiting is part of the loop around it
        ("a exit jump:2", []),  # never reached
        ("a jump:4 c d b jump:2? exit", [[2, 3, 4, 5]]),  # its end is laid out before its beginning, and runs into it
    ],
)
def test_innermost_loops(text, loops):
    assert [loop.body for loop in innermost_loops(code_of(text))] == loops


@pytest.mark.parametrize(
    ("text", "always"),
    [
        ("a jump:3? HGMMA jump:5? HGMMA c jump:1? exit", [1, 2, 3, 4, 5, 6]),  # one thread asks for all the products
        ("a b c jump:1? exit", [1, 2, 3]),
        ("a b jump:4? mask c jump:1? exit", [1, 2, 4, 5]),
        ("a b jump:6? c jump:1? exit mask mask jump:3", [1, 2, 3, 4]),  # behind the end
        ("a b jump:5? c jump:6 mask d jump:1? exit", [1, 2, 5, 6, 7]),  # the shorter of two ways
    ],
)
def test_the_shortest_way_around_a_loop(text, always):
    code = code_of(text)
    (loop,) = innermost_loops(code)
    assert shortest_round(code, loop, {at for at, step in enumerate(code) if step.opcode == "HGMMA"}) == always
