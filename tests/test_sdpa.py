"""torch's fused attention behind our signature, against naive: forward and gradients."""

import pytest
import torch
from oracles import qkv_case, worst_error
from torch.utils._python_dispatch import TorchDispatchMode

from fastchargpt.kernels import naive, sdpa

SHAPES = [
    # heads, kv_heads, tq, tk, head_dim
    (2, 2, 1, 1, 16),
    (2, 2, 5, 5, 8),
    (4, 2, 17, 17, 59),
    (4, 4, 33, 33, 40),
    (4, 1, 1, 19, 16),
    (2, 2, 4, 19, 16),
    (4, 2, 13, 19, 16),
    (6, 3, 19, 7, 80),
    (2, 1, 7, 1, 16),
]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 0), (True, 3), (True, 17)], ids=str)
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sdpa_is_naive(shape: tuple[int, ...], scale: float, causal: bool, window: int | None) -> None:
    heads, kv_heads, tq, tk, head_dim = shape
    qkv, reference = (
        qkv_case(heads=heads, kv_heads=kv_heads, tq=tq, tk=tk, head_dim=head_dim, dtype=dtype, requires_grad=True)
        for dtype in (torch.float32, torch.float64)
    )
    out = sdpa.attention(*qkv, scale=scale, causal=causal, window=window)
    want, _ = naive.attention(*(x.double() for x in reference), scale=scale, causal=causal, window=window)
    assert worst_error(out, want) < 1e-5
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weight).sum(), qkv)
    for got, expected in zip(grads, torch.autograd.grad((want * weight).sum(), reference), strict=True):
        assert worst_error(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sdpa_in_other_precisions_is_as_good_as_plain_torch(dtype: torch.dtype) -> None:
    q, k, v = qkv_case(heads=4, kv_heads=2, tq=9, tk=16, dtype=dtype)
    want, _ = naive.attention(q.double(), k.double(), v.double(), scale=0.25, causal=True)
    plain, _ = naive.attention(q, k, v, scale=0.25, causal=True)
    out = sdpa.attention(q, k, v, scale=0.25, causal=True)
    assert out.dtype == dtype
    assert worst_error(out, want) <= 2 * worst_error(plain, want) + 1e-15


def test_sdpa_reads_any_strides() -> None:
    q, k, v = qkv_case(heads=3, tq=6, head_dim=8)
    want = sdpa.attention(q, k, v, scale=0.3, causal=True)
    strided = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in (q, k, v)]
    assert worst_error(sdpa.attention(*strided, scale=0.3, causal=True), want) < 1e-6


class _Calls(TorchDispatchMode):
    """Every operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 7])
def test_decoding_is_one_fused_operator_and_builds_no_mask(window: int | None) -> None:
    q, k, v = qkv_case(heads=4, tq=1, tk=33)
    with _Calls() as calls:
        sdpa.attention(q, k, v, scale=0.3, causal=True, window=window)
    views = {"slice.Tensor"}
    assert [x for x in calls.names if x not in views] == ["_scaled_dot_product_flash_attention_for_cpu.default"]


@pytest.mark.parametrize(("tq", "tk"), [(8, 8), (8, 6), (6, 8)])
def test_no_square_mask_is_built(tq: int, tk: int) -> None:
    q, k, v = qkv_case(tq=tq, tk=tk)
    with _Calls() as calls:
        sdpa.attention(q, k, v, scale=0.3, causal=True)
    assert not any("tril" in name or "ones" in name for name in calls.names)
