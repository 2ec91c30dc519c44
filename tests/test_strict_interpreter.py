"""The strict interpreter catches each kind of planted bug, and lets clean kernels through with the right result."""

import pytest
import torch
import triton
import triton.language as tl
from strict_interpreter import OutOfBoundsError, RaceError, StrictError, strict_interpreter
from strict_toys import (
    assembly_kernel,
    atomic_kernel,
    bf16_arithmetic_kernel,
    bf16_sum_kernel,
    copy_rows_kernel,
    dot_kernel,
    lanes_race_kernel,
    launch,
    load_before_start_kernel,
    missing_other_copy_kernel,
    missing_other_kernel,
    neighbour_kernel,
    order_kernel,
    prefetch_kernel,
    race_kernel,
    scale_kernel,
    softmax_kernel,
    store_out_of_bounds_kernel,
    which_gpu_kernel,
)
from triton.runtime.jit import JITFunction

# -- clean kernels pass, with the right numbers


@pytest.mark.parametrize("n", [1, 31, 64, 100])
def test_clean_kernel_with_a_helper(n):
    x, y = torch.randn(n), torch.empty(n)
    launch(scale_kernel, (triton.cdiv(n, 32),), x, y, n, 0.1, BLOCK=32)
    torch.testing.assert_close(y, x * 2 * torch.tensor(0.1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_in_every_dtype(dtype):
    x = torch.randn(5, 23).to(dtype)
    y = torch.empty_like(x)
    launch(softmax_kernel, (5,), x, y, 23, BLOCK=32)
    torch.testing.assert_close(
        y, x.double().softmax(1).to(dtype), rtol=1.6e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
    )


def test_callable_grid_and_option_arguments():
    x, y = torch.randn(40), torch.empty(40)
    launch(scale_kernel, lambda meta: (triton.cdiv(40, meta["BLOCK"]),), x, y, 40, 1.0, BLOCK=16, num_warps=4)
    assert torch.equal(y, 2 * x)


def test_bf16_dot_multiplies_values():
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    c = torch.empty(16, 16)
    launch(dot_kernel, (1,), a, b, c, N=16, K=32, PRECISION="ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_bf16_arithmetic_rounds_like_torch():
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    z = torch.empty_like(x)
    launch(bf16_arithmetic_kernel, (1,), x, y, z, BLOCK=256)
    assert torch.equal(z, torch.where(x < y, x * y + x, -(x - y).abs()))


def test_fp32_to_bf16_rounds_to_nearest_even_and_keeps_nan():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, float("inf"), -float("inf"), 3.4e38, float("nan")])
    x = torch.cat([x, torch.randn(57)])
    y = torch.empty(64, dtype=torch.bfloat16)
    launch(scale_kernel, (1,), x, y, 64, 0.5, BLOCK=64)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert y[6].isnan()


def test_tf32_drops_bits_and_ieee_keeps_them():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    exact = a.double() @ b.double()
    error = {}
    for precision in ("ieee", "tf32", "tf32x3"):
        c = torch.empty(32, 32)
        launch(dot_kernel, (1,), a, b, c, N=32, K=32, PRECISION=precision)
        error[precision] = (c.double() - exact).abs().max().item()
    assert error["ieee"] < 1e-5 < 1e-3 < error["tf32"] < 5e-2
    assert error["tf32x3"] < 2e-5


def test_default_dot_precision_of_fp32_is_tf32_as_on_a_gpu():
    a, b, c, d = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16), torch.empty(16, 16)
    launch(dot_kernel, (1,), a, b, c, N=16, K=16, PRECISION=None)
    launch(dot_kernel, (1,), a, b, d, N=16, K=16, PRECISION="tf32")
    assert torch.equal(c, d)


def test_same_kernel_object_compiles_outside_the_scope():
    x, y = torch.randn(4), torch.empty(4)
    before = tl.load, tl.core.load, tl.sum, tl.tensor.__add__, JITFunction.run, JITFunction.__call__, triton.jit
    launch(scale_kernel, (1,), x, y, 4, 1.0, BLOCK=4)
    assert before == (
        tl.load,
        tl.core.load,
        tl.sum,
        tl.tensor.__add__,
        JITFunction.run,
        JITFunction.__call__,
        triton.jit,
    )
    assert triton.compiler.code_generator.CodeGenerator.builtin_namespace["min"] is tl.core.builtin_min
    assert not triton.knobs.runtime.interpret
    source = triton.compiler.ASTSource(
        softmax_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 32}
    )
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
    assert "ex2.approx" in compiled.asm["ptx"]


def test_scope_is_left_clean_after_an_error():
    with pytest.raises(RaceError):
        launch(race_kernel, (2,), torch.empty(4), BLOCK=4)
    test_same_kernel_object_compiles_outside_the_scope()
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_decorated_inside_the_scope_still_compile_outside():
    with strict_interpreter():
        assert triton.knobs.runtime.interpret
        assert isinstance(triton.jit(race_kernel.fn), JITFunction)
        assert isinstance(triton.jit(do_not_specialize=["n"])(race_kernel.fn), JITFunction)


# -- every planted bug is caught


def test_store_past_the_end():
    with pytest.raises(OutOfBoundsError, match=r"store out of bounds in 12 lane.* storage of y_ptr"):
        launch(store_out_of_bounds_kernel, (2,), torch.empty(20), 20, BLOCK=16)


def test_load_past_the_end():
    x, y = torch.randn(20), torch.empty(64)
    with pytest.raises(OutOfBoundsError, match="load out of bounds"):
        launch(copy_rows_kernel, (1,), x, y, 0, 0, WIDTH=32)


def test_load_before_the_start_although_the_memory_is_ours():
    buffer = torch.randn(64)
    with pytest.raises(OutOfBoundsError, match="load out of bounds in 1 lane"):
        launch(load_before_start_kernel, (1,), buffer[8:24], torch.empty(16), BLOCK=16)


def test_prefetch_past_the_end():
    x = torch.randn(20)
    launch(prefetch_kernel, (1,), x, 20, BLOCK=32)
    with pytest.raises(OutOfBoundsError, match="prefetch out of bounds in 1 lane"):
        launch(prefetch_kernel, (1,), x, 21, BLOCK=32)


def test_assembly_that_is_not_modelled_is_refused():
    with pytest.raises(StrictError, match="this assembly is not modelled here: shl"):
        launch(assembly_kernel, (1,), torch.empty(16, dtype=torch.int32), BLOCK=16)


def test_load_between_the_rows_of_a_view():
    buffer = torch.randn(4, 48)
    y = torch.empty(4, 32)
    launch(copy_rows_kernel, (4,), buffer[:, :32], y, 48, 32, WIDTH=32)
    assert torch.equal(y, buffer[:, :32])
    with pytest.raises(OutOfBoundsError, match="load out of bounds in 16 lane"):
        launch(copy_rows_kernel, (4,), buffer[:, :16], y, 48, 32, WIDTH=32)


@pytest.mark.parametrize("stride", [0, 1])
def test_broadcast_and_overlapping_views_are_fine(stride):
    x = torch.randn(64).as_strided((4, 16), (stride, 1))
    y = torch.empty(4, 16)
    launch(copy_rows_kernel, (4,), x, y, stride, 16, WIDTH=16)
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_load_without_other_is_poison(dtype):
    y = torch.zeros(1)
    with strict_interpreter():
        if dtype == torch.float32:
            missing_other_kernel[(1,)](torch.ones(16), y, 10, BLOCK=16)
        else:
            masked = torch.ones(16, dtype=dtype), torch.empty(16, dtype=dtype)
            missing_other_copy_kernel[(1,)](*masked, 10, BLOCK=16)
            y = masked[1].float().sum()
    assert y.isnan().all()


def test_masked_load_of_integers_is_poison():
    x, y = torch.zeros(16, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    launch(missing_other_copy_kernel, (1,), x, y, 10, BLOCK=16)
    assert (y[10:] == torch.iinfo(torch.int32).max).all()


def test_write_race_between_programs():
    with pytest.raises(RaceError, match=r"stores where program number \d stored, at element 0 of the storage of y_ptr"):
        launch(race_kernel, (2,), torch.empty(8), BLOCK=8)


def test_lanes_of_one_store_that_disagree():
    with pytest.raises(RaceError, match="two lanes"):
        launch(lanes_race_kernel, (1,), torch.empty(8), BLOCK=16)


@pytest.mark.parametrize("seed", range(5))
def test_dependence_on_program_order(seed):
    with pytest.raises(RaceError, match=r"loads what program|stores where program"):
        launch(neighbour_kernel, (4,), torch.zeros(4), 4, seed=seed)


def test_programs_run_in_an_order_drawn_from_the_seed(capsys):
    orders = []
    for seed in (0, 0, 1):
        launch(order_kernel, (2, 3, 2), torch.empty(1), seed=seed)
        orders.append(capsys.readouterr().out.splitlines())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert len({line.split(")")[0] for line in orders[0]}) == 12


def test_dot_with_a_small_k_is_refused():
    a, b, c = torch.randn(16, 8), torch.randn(8, 16), torch.empty(16, 16)
    with pytest.raises(AssertionError, match="K >= 16"):
        launch(dot_kernel, (1,), a, b, c, N=16, K=8, PRECISION="ieee")


def test_bf16_reduction_is_refused():
    with pytest.raises(StrictError, match="bf16 reduction"):
        launch(bf16_sum_kernel, (1,), torch.ones(8).bfloat16(), torch.empty(1), BLOCK=8)


def test_atomics_are_refused():
    with pytest.raises(StrictError, match="atomic_kernel: atomics"):
        launch(atomic_kernel, (1,), torch.zeros(1))


def test_unknown_launch_option_is_refused():
    with pytest.raises(StrictError, match="num_warp"):
        launch(race_kernel, (1,), torch.empty(8), BLOCK=8, num_warp=4)


def test_missing_argument_is_refused():
    with pytest.raises(TypeError, match="BLOCK"):
        launch(race_kernel, (1,), torch.empty(8))


def test_kernels_find_the_target_that_the_scope_names():
    for target, found in (("sm_80", 0), ("sm_90", 90), (None, 0)):
        y = torch.empty(1, dtype=torch.int32)
        with strict_interpreter(target=target):
            which_gpu_kernel[(1,)](y)
        assert int(y) == found


def test_scopes_do_not_nest():
    with strict_interpreter(), pytest.raises(StrictError, match="nest"), strict_interpreter():
        pass
