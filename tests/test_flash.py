"""The operators around the kernels: dispatch, autocast, FLOPs, describe, launches and copies."""

from typing import Any

import pytest
import torch
from aot import compile_launch, record_launches
from flash_cases import Case, judge, plan_of
from gate import launches_of
from launches import Case as LaunchCase
from launches import run_kernel
from oracles import notebook_head, qkv_case, worst_error
from strict_interpreter import strict_interpreter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastchargpt.attention import causal_attention, causal_attention_packed, explain_attention
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.kernels import flash, naive
from fastchargpt.kernels.tuning import Config, forced


@pytest.mark.parametrize(
    ("scale", "printed"),
    [
        (1.0, [0.6764, -0.5477, -0.2478, 0.3143]),
        (32**-0.5, [0.4103, -0.0919, -0.1171, -0.0358]),
        (None, [0.4397, -0.1423, -0.1316, 0.0029]),
    ],
)
def test_the_notebook_head_on_triton(scale: float | None, printed: list[float]) -> None:
    with strict_interpreter():
        out = causal_attention(*notebook_head(), scale=scale, backend="triton")
    assert worst_error(out[0, 0, 1, :4], torch.tensor(printed)) < 6e-5
    assert worst_error(out[0, 0, 0, :3], torch.tensor([-0.1571, 0.8801, 0.1615])) < 6e-5


def test_triton_on_a_cpu_is_refused_outside_the_interpreter() -> None:
    q, k, v = qkv_case()
    with pytest.raises(BackendUnavailableError, match="Triton compiles for GPUs only"):
        causal_attention(q, k, v, backend="triton")


def test_explain_names_the_kernels() -> None:
    q, k, v = qkv_case(tq=40)
    with strict_interpreter(), forced(plan_of("blocks", decode=True)):
        assert "forward tiled 16x16; backward blocks 16x16, 1 launch" in explain_attention(q, k, v, backend="triton")
        assert "split over the keys" in explain_attention(q[:, :, :1], k, v, backend="triton")


def test_a_training_step_is_two_launches_and_copies_nothing() -> None:
    qkv = torch.zeros(2, 40, 3 * 2 * 32, dtype=torch.bfloat16, requires_grad=True)
    with record_launches("sm_90") as launches, forced(plan_of("blocks")), torch.profiler.profile() as profile:
        causal_attention_packed_on_triton(qkv).backward(torch.zeros(2, 40, 64, dtype=torch.bfloat16))
    assert [launch.name for launch in launches] == ["attention_forward_kernel", "backward_blocks_kernel"]
    names = {event.name for event in profile.events()}
    assert not names & {"aten::copy_", "aten::contiguous", "aten::cat", "aten::clone"}, names


def causal_attention_packed_on_triton(qkv: torch.Tensor) -> torch.Tensor:
    return flash.attention_packed(qkv, 2, 2, scale=0.2)


def test_autocast_casts_the_inputs() -> None:
    q, k, v = qkv_case(batch=1, requires_grad=True)
    with strict_interpreter(), forced(plan_of("blocks")):
        with torch.autocast("cpu", torch.bfloat16):
            out = causal_attention(q, k, v, backend="triton")
        assert out.dtype == torch.bfloat16
        gradient = torch.autograd.grad(out.sum(), q)[0]
    assert gradient.dtype == torch.float32


def test_flops_are_counted_as_for_sdpa() -> None:
    q, k, v = qkv_case(heads=2, tq=8, head_dim=16, requires_grad=True)
    qkv = torch.randn(2, 8, 3 * 32, requires_grad=True)
    with strict_interpreter(), forced(plan_of("blocks")):
        counts = []
        for attend in (
            lambda: causal_attention(q, k, v, backend="triton"),
            lambda: causal_attention_packed(qkv, 2, backend="triton"),
        ):
            with FlopCounterMode(display=False) as counter:
                attend().sum().backward()
            counts.append(counter.get_total_flops())
    product = 2 * 2 * 2 * 8 * 8 * 16  # 2 flops, batch, heads, Tq, Tk, D
    assert counts == [7 * product, 7 * product]  # two products forward, five backward


def test_dropout_is_redrawn_by_activation_checkpointing() -> None:
    q, k, v = qkv_case(batch=1, tq=8, requires_grad=True)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return causal_attention(*tensors, dropout_p=0.5, backend="triton")

    with strict_interpreter(), forced(plan_of("tiled")):
        torch.manual_seed(3)
        once = attend(q, k, v)
        gradients = torch.autograd.grad(once.sum(), (q, k, v))
        torch.manual_seed(3)
        again = checkpoint(attend, q, k, v, use_reentrant=False)
        assert torch.equal(once, again)
        for x, y in zip(gradients, torch.autograd.grad(again.sum(), (q, k, v)), strict=True):
            assert torch.equal(x, y)


def test_strides_that_nothing_is_read_by_may_be_anything() -> None:
    q, k, v = (torch.randn(24, 16).as_strided((1, 1, 24, 16), (7, 1, 16, 1)) for _ in range(3))
    with strict_interpreter(), forced(plan_of("tiled")):
        out, _ = flash.attention(q, k, v, scale=0.25, causal=True)
    expected, _ = naive.attention(*(x.double() for x in (q, k, v)), scale=0.25, causal=True)
    assert float((out - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(("head_dim", "bits"), [(52, 64), (64, 128), (120, 128)])
def test_heads_of_any_width_are_loaded_several_elements_at_once(head_dim: int, bits: int) -> None:
    config = Config("forward", 64, 32, 4, 2)
    (launch,) = launches_of(config, LaunchCase(dtype=torch.bfloat16, head_dim=head_dim, length=256), "sm_80")
    loads = {code for code in compile_launch(launch, "sm_80").opcodes if code.startswith("LDG") and "." in code}
    assert loads
    assert all(f".{bits}" in code for code in loads), loads


@pytest.mark.parametrize(("target", "overlaps"), [("sm_80", False), ("sm_90", True), ("sm_100", True)])
def test_the_second_launch_of_a_backward_waits_for_the_first(target: str, overlaps: bool) -> None:
    """Where it may begin before that ends: what the first kept for it is not there earlier."""
    case = LaunchCase(dtype=torch.bfloat16, head_dim=64, length=256)
    with record_launches(target) as launches:
        run_kernel(Config("dkdv", 32, 64, 4, 1), case, "meta")
    first, second = (compile_launch(found, target) for found in launches)
    assert [("PREEXIT" in code.opcodes, "ACQBULK" in code.opcodes) for code in (first, second)] == (
        [(True, False), (False, True)] if overlaps else [(False, False)] * 2
    )


@pytest.mark.parametrize(
    "kinds", [{}, {"window": 7}, {"dropout_p": 0.2}, {"heads": 4, "layout": "gaps", "head_dim": 20}, {"tk": 9}]
)
@pytest.mark.parametrize("in_turn", [False, True])
def test_heads_in_turn_or_together_are_right(in_turn: bool, kinds: dict[str, Any]) -> None:
    """In turn a program first asks for its first keys, all of which have to be there."""
    judge(Case(**{"dtype": "bf16", "batch": 3, "tq": 37, "tk": 43, "lse_gradient": True, "in_turn": in_turn, **kinds}))
