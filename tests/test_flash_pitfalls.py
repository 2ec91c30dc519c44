"""The 25 known ways for attention kernels to go wrong, one by one, on the strict interpreter and the compiler."""

import math
import warnings

import pytest
import torch
from aot import compile_launch, record_launches
from flash_cases import PLANS, Case, inputs, judge, lay_out, plan_of
from oracles import qkv_case, worst_error
from strict_interpreter import strict_interpreter, with_margins
from torch.utils.checkpoint import checkpoint

from fastchargpt.attention import causal_attention, causal_attention_packed
from fastchargpt.errors import AttentionError
from fastchargpt.kernels import flash, flash_backward, flash_forward, flash_short, naive
from fastchargpt.kernels.launch import problem_of
from fastchargpt.kernels.philox import draw_seed, keep_mask, keep_probability
from fastchargpt.kernels.tuning import forced

every_plan = pytest.mark.parametrize("plan", PLANS)


def blocks_of(plan: str) -> dict[str, int]:
    return {"block_m": 64, "block_n": 64} if plan == "tile" else {}


def run(plan: str, *tensors: torch.Tensor, **options: object) -> torch.Tensor:
    with strict_interpreter(), forced(plan_of(plan, *blocks_of(plan).values())):
        return causal_attention(*tensors, backend="triton", **options)  # type: ignore[call-overload, no-any-return]


@every_plan
@pytest.mark.parametrize("time", [1, 2, 5, 17])
def test_pitfall_01_gradients_of_tiny_sequences(plan: str, time: int) -> None:
    judge(Case(plan=plan, tq=time, tk=time, **blocks_of(plan)))


@every_plan
@pytest.mark.parametrize("causal", [True, False])
def test_pitfall_02_padded_keys_do_not_score_zero(plan: str, causal: bool) -> None:
    case = Case(plan=plan, tq=17, tk=17, causal=causal, scale=1.0, **blocks_of(plan))
    q, k, v, dout, dlse = inputs(case)
    q, k = torch.full_like(q, 2.0) + 0.01 * q, torch.full_like(k, -3.75) + 0.01 * k  # every logit near -120
    judge(case, (q, k, v, dout, dlse))


@every_plan
def test_pitfall_03_nan_beyond_the_sequence_and_the_head(plan: str) -> None:
    judge(Case(plan=plan, tq=19, tk=19, head_dim=20, layout="gaps", gradient_layout="gaps", **blocks_of(plan)))


@every_plan
def test_pitfall_04_outputs_are_all_written_and_nothing_else(plan: str) -> None:
    q, k, v = qkv_case(batch=1, heads=2, kv_heads=1, tq=18, tk=21, head_dim=20)
    problem = problem_of(q, k, scale=0.3, causal=True)
    lse = with_margins(torch.empty(q.shape[:3]), fill=False)
    out, dq, dk, dv = (with_margins(torch.empty_like(x), fill=False) for x in (q, q, k, v))
    launches = plan_of(plan, *blocks_of(plan).values())
    with strict_interpreter():
        flash_forward.forward(q, k, v, out.tensor, lse.tensor, q, problem, launches.forward)
        backward = flash_backward.backward if plan == "tiled" else flash_short.backward
        saved = (q, k, v, out.tensor, lse.tensor)
        backward(q, None, *saved, dq.tensor, dk.tensor, dv.tensor, q, problem, *launches.backward)
    for guarded in (out, lse, dq, dk, dv):
        guarded.assert_intact()
        guarded.assert_written()


@every_plan
def test_pitfall_05_gradient_from_a_cat(plan: str) -> None:
    q, k, v = qkv_case(batch=1, tq=17, requires_grad=True)
    weight = torch.randn(1, 2, 17, 32)

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((torch.cat((q, out), dim=3) * weight).sum(), (q, k, v))

    with strict_interpreter(), forced(plan_of(plan, *blocks_of(plan).values())):
        got = gradients(causal_attention(q, k, v, backend="triton"))
    for x, y in zip(got, gradients(causal_attention(q, k, v, backend="naive")), strict=True):
        assert worst_error(x, y) < 5e-6


@every_plan
def test_pitfall_06_gradient_with_stride_zero(plan: str) -> None:
    judge(Case(plan=plan, gradient_layout="scalar", **blocks_of(plan)))


@every_plan
def test_pitfall_07_gradient_whose_last_stride_is_not_one(plan: str) -> None:
    judge(Case(plan=plan, gradient_layout="columns_first", **blocks_of(plan)))


@pytest.mark.parametrize("plan", ["tiled", "blocks"])
def test_pitfall_08_delta_reads_the_real_strides_of_out_and_its_gradient(plan: str) -> None:
    q, k, v = qkv_case(batch=2, heads=2, tq=17, head_dim=20, requires_grad=True)
    dout = torch.randn(2, 2, 17, 20)
    out, lse = naive.attention(q, k, v, scale=0.3, causal=True)
    want = torch.autograd.grad(out, (q, k, v), dout)
    problem = problem_of(q, k, scale=0.3, causal=True)
    gradients = tuple(torch.full_like(x, float("nan")) for x in (q, k, v))
    backward = flash_backward.backward if plan == "tiled" else flash_short.backward
    stored, given = lay_out(out.detach(), "columns_first"), lay_out(dout, "gaps")
    with strict_interpreter(), torch.no_grad():
        backward(given, None, q, k, v, stored, lse.detach(), *gradients, q, problem, *plan_of(plan).backward)
    for x, y in zip(gradients, want, strict=True):
        assert worst_error(x, y) < 5e-6


@every_plan
def test_pitfall_09_junk_strides_on_dimensions_of_size_one(plan: str) -> None:
    def junk(x: torch.Tensor) -> torch.Tensor:
        return x.as_strided(x.shape, (7_000_000_001, 123_456_789_012, x.stride(2), x.stride(3)))

    case = Case(plan=plan, batch=1, heads=1, kv_heads=1, **blocks_of(plan))
    q, k, v, dout, dlse = inputs(case)
    judge(case, (junk(q), junk(k), junk(v), junk(dout), dlse))


@every_plan
def test_pitfall_10_packed_is_bit_equal_to_contiguous_copies(plan: str) -> None:
    qkv = torch.randn(2, 17, 3 * 2 * 20, requires_grad=True)
    dout = torch.randn(2, 17, 40)
    q, k, v = (x.unflatten(2, (2, 20)).transpose(1, 2).contiguous() for x in qkv.detach().split(40, dim=2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with strict_interpreter(), forced(plan_of(plan, *blocks_of(plan).values())):
        packed = causal_attention_packed(qkv, 2, backend="triton")
        dqkv = torch.autograd.grad(packed, qkv, dout)[0]
        single = causal_attention(q, k, v, backend="triton")
        gradients = torch.autograd.grad(single, (q, k, v), dout.unflatten(2, (2, 20)).transpose(1, 2))
    assert torch.equal(packed, single.transpose(1, 2).flatten(2))
    assert torch.equal(dqkv, torch.cat([x.transpose(1, 2).flatten(2) for x in gradients], dim=2))
    assert packed.is_contiguous()
    assert dqkv.is_contiguous()


def recorded(target: str, plan: str, dtype: torch.dtype, **options: object) -> list:  # type: ignore[type-arg]
    """The launches of a forward and a backward as they would be on `target`."""
    x = torch.zeros(2, 40, 3 * 2 * 64, dtype=dtype, requires_grad=True)
    with record_launches(target) as launches, forced(plan_of(plan, 32, 32)):
        out = flash.attention_packed(x, 2, 2, scale=0.125, **options)  # type: ignore[arg-type]
        out.sum().backward()
    return launches


@pytest.mark.parametrize("plan", ["tiled", "blocks", "tile"])
def test_pitfall_11_offsets_are_64_bit(plan: str) -> None:
    if plan == "tile":
        q, k, v = qkv_case(heads=2, tq=30, head_dim=64, dtype=torch.bfloat16, requires_grad=True)
        with record_launches("sm_90") as launches, forced(plan_of(plan, 32, 32)):
            flash.attention(q, k, v, scale=0.1, causal=True)[0].sum().backward()
    else:
        launches = recorded("sm_90", plan, torch.bfloat16)
    for launch in launches:
        assert compile_launch(launch, "sm_90").narrow_products == []


def test_pitfall_12_more_than_65535_heads() -> None:
    q = torch.zeros(1, 1, 1, 16).expand(70_000, 1, 1, 16).requires_grad_()
    for plan in PLANS:
        with record_launches("sm_90") as launches, forced(plan_of(plan)):
            flash.attention(q, q, q, scale=0.25, causal=True)[0].sum().backward()
        for launch in launches:
            assert launch.grid[0] == 70_000  # the first axis holds 2**31 - 1, the others 65535


@every_plan
def test_pitfall_13_backward_without_causality(plan: str) -> None:
    judge(Case(plan=plan, causal=False, tq=19, tk=23, **blocks_of(plan)))


@every_plan
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_pitfall_14_scale_zero_or_negative(plan: str, scale: float) -> None:
    judge(Case(plan=plan, scale=scale, lse_gradient=True, **blocks_of(plan)))


@every_plan
def test_pitfall_15_huge_logits(plan: str) -> None:
    case = Case(plan=plan, scale=1.0, **blocks_of(plan))
    q, k, v, dout, _ = inputs(case)
    q, k = (1000.0 * x.round() for x in (q, k))  # logits of some 1e6, exact in fp32
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = run(plan, q, k, v, scale=1.0)
    want = causal_attention(q, k, v, scale=1.0, backend="naive")
    assert worst_error(out, want) < 1e-5
    # Backward rounds the log-sum-exp to fp32: at 1e7 a probability is known to within a factor of exp(0.5).
    with strict_interpreter(), forced(plan_of(plan, *blocks_of(plan).values())):
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert all(x.isfinite().all() for x in gradients)
    assert worst_error(gradients[2], torch.autograd.grad(want, v, dout)[0]) < 0.7 * float(dout.abs().sum(2).max())


@every_plan
def test_pitfall_16_first_key_block_fully_masked(plan: str) -> None:
    judge(Case(plan=plan, tq=40, tk=5, lse_gradient=True, **blocks_of(plan)))


@every_plan
@pytest.mark.parametrize(("tq", "tk"), [(5, 40), (33, 17), (1, 33), (17, 1)])
def test_pitfall_17_more_queries_or_more_keys(plan: str, tq: int, tk: int) -> None:
    judge(Case(plan=plan, tq=tq, tk=tk, heads=2, kv_heads=1, **blocks_of(plan)))


@pytest.mark.parametrize("target", ["sm_80"])
@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True)])
def test_pitfall_18_tf32_only_where_it_is_asked_for(target: str, precision: str, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        launches = recorded(target, "tiled", torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert compile_launch(launches[0], target).tf32 is tf32


@every_plan
def test_pitfall_19_bfloat16(plan: str) -> None:
    judge(Case(plan=plan, dtype="bf16", head_dim=32, tq=21, tk=21, **blocks_of(plan)))


@every_plan
@pytest.mark.parametrize("head_dim", [8, 40, 59, 80, 100, 256])
def test_pitfall_20_any_head_dim(plan: str, head_dim: int) -> None:
    judge(Case(plan=plan, head_dim=head_dim, heads=1, kv_heads=1, **blocks_of(plan)))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 16), (16, 32), (64, 64)])
def test_pitfall_21_one_dropout_mask_for_every_block_size_forward_and_backward(block_m: int, block_n: int) -> None:
    # With equal scores, v the identity and one row of gradient, out and dv are the mask itself.
    time, p = 32, 0.4
    q, k, v = torch.zeros(2, 1, time, 32), torch.zeros(2, 1, time, 32), torch.eye(32).repeat(2, 1, 1, 1)
    seed = torch.tensor([-987654321098765])
    mask = keep_mask(seed, 2, 1, time, time, p)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for plan in PLANS if block_m == 64 else ("tiled", "blocks"):
        with strict_interpreter(), forced(plan_of(plan, block_m, block_n)):
            out, _ = flash.attention(q, k, v, scale=1.0, causal=False, dropout_p=p, seed=seed)
            assert torch.equal(out != 0, mask)
            dout = torch.zeros_like(out)
            dout[:, :, 21] = 1.0
            dv = torch.autograd.grad(out, v, dout)[0]
            assert torch.equal(dv[..., 0] != 0, mask[:, :, 21])


def test_pitfall_22_the_seed_follows_torch() -> None:
    q, k, v = qkv_case(batch=1, tq=8, requires_grad=True)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return causal_attention(*tensors, dropout_p=0.5, backend="naive")

    torch.manual_seed(3)
    first, second = attend(q, k, v), attend(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(attend(q, k, v), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again = checkpoint(attend, q, k, v, use_reentrant=False)
    assert torch.equal(again, first)
    for x, y in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (first, again)), strict=True):
        assert torch.equal(x, y)
    assert draw_seed(torch.device("meta")).device.type == "meta"  # drawn where it is used


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_pitfall_23_dropout_is_unbiased(p: float) -> None:
    keep = keep_mask(torch.tensor([2024]), 4, 4, 128, 128, p)
    sigma = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(float(keep.double().mean()) - keep_probability(p)) < 4 * sigma
    assert abs(keep_probability(p) - (1 - p)) <= 2**-17  # what survivors are divided by is what is kept
    for dim in range(4):  # and no batch, head, row or column is special
        others = [d for d in range(4) if d != dim]
        rates = keep.double().mean(others)
        spread = math.sqrt(p * (1 - p) / (keep.numel() / keep.shape[dim]))
        assert float((rates - keep_probability(p)).abs().max()) < 5 * spread


@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_pitfall_24_small_shared_memory_and_no_atomics(target: str) -> None:
    # The compile gate asks this of every entry of every table; here it is asked of the shortest sequences.
    from fastchargpt.kernels.tuning import plan_for

    x = torch.zeros(1, 60, 3 * 64, dtype=torch.bfloat16, requires_grad=True)
    with record_launches(target) as launches, forced(plan_for(target, "half", 64, 60, False)):
        flash.attention_packed(x, 1, 1, scale=0.1).sum().backward()
    assert len(launches) == 2
    for launch in launches:
        report = compile_launch(launch, target)
        assert report.shared <= 99 * 1024
        assert report.atomics == []


def test_pitfall_25_operators_are_registered_in_full() -> None:
    q, k, v = qkv_case(batch=1, heads=2, kv_heads=1, tq=6, requires_grad=True)
    packed = torch.randn(1, 6, 3 * 16, requires_grad=True)
    seed = torch.tensor([5])
    with strict_interpreter(poison=False), forced(plan_of("blocks")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        torch.library.opcheck(torch.ops.fastchargpt.attention_forward, (q, k, v, seed, 0.3, True, 0.2, None, None))
        torch.library.opcheck(
            torch.ops.fastchargpt.attention_packed_forward, (packed, None, 1, 1, 0.3, 0.0, None, None)
        )


@pytest.mark.parametrize("packed", [False, True])
def test_pitfall_25_fake_strides_are_the_real_ones(packed: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = qkv_case(batch=2, heads=4, kv_heads=2, tq=5, head_dim=20)
    tensors = (torch.randn(2, 5, 8 * 20),) if packed else (q, k, v)
    options = (None, 4, 2, 0.3, 0.0, 2, 9.0) if packed else (None, 0.3, True, 0.0, 2, 9.0)
    name = "attention_packed_forward" if packed else "attention_forward"
    forward = getattr(torch.ops.fastchargpt, name)
    backward = getattr(torch.ops.fastchargpt, name.replace("forward", "backward"))
    with strict_interpreter(), forced(plan_of("tiled")):
        real = forward(*tensors, *options)
        gradients = backward(real[0], None, *tensors, *real, *options)
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) for x in tensors)
        fake = forward(*fakes, *options)
        fake_gradients = backward(fake[0], None, *fakes, *fake, *options)
    if packed:
        gradients, fake_gradients = (gradients,), (fake_gradients,)
    for x, y in zip((*real, *gradients), (*fake, *fake_gradients), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@every_plan
def test_pitfall_25_the_log_sum_exp_has_a_gradient(plan: str) -> None:
    judge(Case(plan=plan, lse_gradient=True, heads=2, kv_heads=1, **blocks_of(plan)))


@pytest.mark.parametrize("packed", [False, True])
def test_pitfall_25_compiles_whole_forward_and_backward(packed: bool) -> None:
    tensors = qkv_case(batch=1, tq=6, requires_grad=True)
    if packed:
        tensors = (torch.randn(1, 6, 3 * 32, requires_grad=True),)  # type: ignore[assignment]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        if packed:
            return causal_attention_packed(*tensors, 2, dropout_p=0.2, backend="triton")
        return causal_attention(*tensors, dropout_p=0.2, backend="triton")

    with strict_interpreter(), forced(plan_of("blocks")):
        torch.manual_seed(0)
        want = attend(*tensors)
        torch.manual_seed(0)
        got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
        assert torch.equal(got, want)
        for x, y in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (got, want)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("packed", [False, True])
def test_pitfall_25_double_backward_is_refused_in_words(packed: bool) -> None:
    qkv = torch.randn(1, 6, 3 * 32, requires_grad=True)
    q, k, v = qkv_case(batch=1, tq=6, requires_grad=True)
    with strict_interpreter(), forced(plan_of("blocks")):
        if packed:
            out, leaf = causal_attention_packed(qkv, 2, backend="triton"), qkv
        else:
            out, leaf = causal_attention(q, k, v, backend="triton"), q
        first = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)[0]
        with pytest.raises(AttentionError, match="no second derivative"):
            first.sum().backward()
