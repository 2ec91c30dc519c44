"""The same oracle on real hardware, and races: one shape many times, bit for bit the same."""

from typing import Any

import pytest
import torch
from oracles import worst_error

from fastchargpt.attention import causal_attention, causal_attention_packed, explain_attention
from fastchargpt.kernels import naive
from fastchargpt.kernels.tuning import serves_variants, widest_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU is here"),
]

SHAPES = [
    # batch, heads, kv_heads, tq, tk, head_dim
    (2, 3, 3, 1, 1, 64),
    (3, 4, 4, 64, 64, 32),
    (3, 6, 2, 255, 255, 64),
    (2, 4, 4, 256, 256, 59),
    (2, 4, 4, 513, 513, 128),
    (1, 2, 2, 1100, 1100, 64),
    (2, 8, 2, 1, 777, 64),
    (2, 4, 4, 100, 333, 64),
    (2, 4, 4, 333, 100, 64),
]


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype, **options):  # type: ignore[no-untyped-def]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = causal_attention(q, k, v, return_lse=True, **options)
    return (out, lse, *torch.autograd.grad(out, (q, k, v), dout.to(dtype)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, dropout_p: float) -> None:
    judge(shape, dtype, causal=causal, dropout_p=dropout_p)


@pytest.mark.parametrize("variant", [{"window": 70}, {"softcap": 3.0}, {"window": 200, "softcap": 30.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_and_soft_caps_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, variant: dict[str, Any]) -> None:
    judge(shape, dtype, causal=True, dropout_p=0.0, **variant)


def judge(shape: tuple[int, ...], dtype: torch.dtype, *, causal: bool, dropout_p: float, **variant: Any) -> None:
    """Within twice the error of plain PyTorch in the same precision."""
    batch, heads, kv_heads, tq, tk, head_dim = shape
    widest = widest_head("cuda", 0, dtype, dropout_p > 0.0)
    if variant and not serves_variants("cuda", 0, dtype, head_dim, dropout_p > 0.0):
        pytest.skip("this GPU's launch table has no settings for a window or a soft-cap here, and auto goes elsewhere")
    if head_dim > widest:
        pytest.skip(f"this GPU's launch table ends at head_dim {widest} in {dtype}, and auto takes SDPA beyond")
    torch.manual_seed(0)
    q = torch.randn(batch, heads, tq, head_dim, device="cuda").to(dtype)
    k, v = (torch.randn(batch, kv_heads, tk, head_dim, device="cuda").to(dtype) for _ in range(2))
    dout = torch.randn_like(q)
    results = []
    for backend, precision in (("triton", dtype), ("naive", torch.float64), ("naive", dtype)):
        torch.manual_seed(1)  # the same dropout mask for all three
        options = {"causal": causal, "dropout_p": dropout_p, "backend": backend, **variant}
        results.append(gradients(q, k, v, dout, precision, **options))
    largest = max(float(x.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max()) for x in results[1])
    rounding = (torch.finfo(dtype).eps + 1e-6) * largest
    for got, want, plain in zip(*results, strict=True):
        assert worst_error(got, want) <= 2 * worst_error(plain, want) + rounding


@pytest.mark.parametrize("time", [48, 256, 700])
def test_200_repeats_are_bit_equal(time: int) -> None:
    qkv = torch.randn(8, time, 3 * 6 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(8, time, 6 * 64, device="cuda", dtype=torch.bfloat16)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        out = causal_attention_packed(qkv, 6, dropout_p=0.1, backend="triton")
        return out, torch.autograd.grad(out, qkv, dout)[0]

    first = once()
    for _ in range(199):
        for x, y in zip(once(), first, strict=True):
            assert torch.equal(x, y)


def test_dropout_in_a_cuda_graph_is_new_at_every_replay() -> None:
    q = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    causal_attention(q, q, q, dropout_p=0.5, backend="triton")  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = causal_attention(q, q, q, dropout_p=0.5, backend="triton")
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_compiles_whole_on_a_gpu() -> None:
    qkv = torch.randn(2, 100, 3 * 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(lambda x: causal_attention_packed(x, 2), fullgraph=True)
    out = compiled(qkv)
    out.sum().backward()
    q, k, v = (x.unflatten(2, (2, 64)).transpose(1, 2).double() for x in qkv.detach().split(128, dim=2))
    want = naive.attention(q, k, v, scale=64**-0.5, causal=True)[0].transpose(1, 2).flatten(2)
    assert worst_error(out, want) < 0.05


def test_auto_takes_triton() -> None:
    q = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float16)
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        assert "no tensor cores" in explain_attention(q, q, q)
    else:
        assert explain_attention(q, q, q).startswith("triton")
