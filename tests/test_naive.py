"""The naive backend against the definition, one score at a time, and against the notebook's printed numbers."""

from typing import Any

import pytest
import torch
from oracles import attention_by_definition, notebook_head, qkv_case, worst_error

from fastchargpt.kernels import naive
from fastchargpt.kernels.philox import keep_mask, keep_probability

SHAPES = [
    # heads, kv_heads, tq, tk, head_dim
    (2, 2, 1, 1, 8),
    (2, 2, 5, 5, 16),
    (4, 2, 7, 7, 5),
    (6, 2, 1, 9, 8),
    (4, 1, 3, 8, 12),
    (2, 2, 7, 4, 8),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.35, 1.0, 0.0, -0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive_is_the_definition(shape: tuple[int, ...], scale: float, causal: bool) -> None:
    heads, kv_heads, tq, tk, head_dim = shape
    q, k, v = qkv_case(heads=heads, kv_heads=kv_heads, tq=tq, tk=tk, head_dim=head_dim, dtype=torch.float64)
    out, lse = naive.attention(q, k, v, scale=scale, causal=causal)
    want_out, want_lse = attention_by_definition(q, k, v, scale=scale, causal=causal)
    assert worst_error(out, want_out) < 1e-14
    assert worst_error(lse, want_lse) < 1e-14


@pytest.mark.parametrize("window", [None, 0, 2, 50])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_and_soft_caps_are_the_definition(
    shape: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    heads, kv_heads, tq, tk, head_dim = shape
    q, k, v = qkv_case(heads=heads, kv_heads=kv_heads, tq=tq, tk=tk, head_dim=head_dim, dtype=torch.float64)
    out, lse = naive.attention(q, k, v, scale=0.7, causal=True, window=window, softcap=softcap)
    want_out, want_lse = attention_by_definition(q, k, v, scale=0.7, causal=True, window=window, softcap=softcap)
    assert worst_error(out, want_out) < 1e-14
    assert worst_error(lse, want_lse) < 1e-14


@pytest.mark.parametrize("options", [{}, {"window": 1, "softcap": 0.8}], ids=["plain", "window-softcap"])
@pytest.mark.parametrize("shape", [(4, 2, 4, 6, 3), (2, 1, 6, 4, 3)], ids=str)
def test_naive_gradients_are_those_of_finite_differences(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    heads, kv_heads, tq, tk, head_dim = shape
    q, k, v = qkv_case(
        heads=heads,
        kv_heads=kv_heads,
        tq=tq,
        tk=tk,
        head_dim=head_dim,
        batch=1,
        dtype=torch.float64,
        requires_grad=True,
    )
    seed = torch.tensor([7])

    def run(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = naive.attention(*qkv, scale=0.5, causal=True, dropout_p=0.25, seed=seed, **options)
        return out, lse[:, :, max(0, tq - tk) :]

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_dropout_drops_what_the_mask_says_and_rescales_by_what_is_really_kept() -> None:
    q, k, v = qkv_case(heads=4, kv_heads=2, tq=6, tk=9, dtype=torch.float64)
    seed = torch.tensor([123456789012345])
    out, lse = naive.attention(q, k, v, scale=0.3, causal=True, dropout_p=0.4, seed=seed)
    keep = keep_mask(seed, 2, 4, 6, 9, 0.4).double() / keep_probability(0.4)
    want_out, want_lse = attention_by_definition(q, k, v, scale=0.3, causal=True, keep=keep)
    assert worst_error(out, want_out) < 1e-14
    assert worst_error(lse, want_lse) < 1e-14


@pytest.mark.parametrize(
    ("scale", "row", "printed"),
    [
        (1.0, 1, [0.6764, -0.5477, -0.2478, 0.3143]),  # what the notebook prints
        (32**-0.5, 1, [0.4103, -0.0919, -0.1171, -0.0358]),  # what its code says
        (16**-0.5, 1, [0.4397, -0.1423, -0.1316, 0.0029]),  # head_size**-0.5
        (1.0, 0, [-0.1571, 0.8801, 0.1615]),
    ],
)
def test_the_notebook_head(scale: float, row: int, printed: list[float]) -> None:
    out = naive.attention(*notebook_head(), scale=scale, causal=True)[0][0, 0, row, : len(printed)]
    assert worst_error(out, torch.tensor(printed)) < 6e-5


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out, lse = naive.attention(x, x, x, scale=1.0, causal=True)
    assert out.shape == shape
    assert lse.shape == shape[:3]
    out.sum().backward()


def test_queries_without_any_key_give_zero_and_no_nan_gradient() -> None:
    q = torch.randn(2, 2, 3, 8, requires_grad=True)
    none = torch.randn(2, 2, 0, 8)
    out, lse = naive.attention(q, none, none, scale=1.0, causal=False)
    out.sum().backward()
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert q.grad is None or (q.grad == 0).all()
