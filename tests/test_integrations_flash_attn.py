"""flash-attention's shape of call against the definition, one score at a time, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastchargpt.errors import AttentionError
from fastchargpt.integrations.flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_with_kvcache

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, 0), (3, 1), (0, -1), (-1, 2), (100, 100), (2, 7)]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """flash-attn's own words: query i sees keys i + Tk - Tq - left to i + Tk - Tq + right; no key gives 0."""
    (batch, tq, heads, width), (tk, kv_heads) = q.shape, k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    left = math.inf if window[0] == -1 else window[0]
    right = 0 if causal else math.inf if window[1] == -1 else window[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(tq):
                place = i + tk - tq
                seen = [j for j in range(tk) if place - left <= j <= place + right]
                if seen:
                    kept_k, kept_v = (x[b, seen, h // (heads // kv_heads)] for x in (k, v))
                    scores = scale * kept_k @ q[b, i, h]
                    scores = softcap * (scores / softcap).tanh() if softcap else scores
                    out[b, i, h] = scores.softmax(0) @ kept_v
    return out


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk", "kv_heads"), [(6, 6, 4), (3, 7, 2), (7, 4, 1), (1, 5, 2)])
def test_func(tq: int, tk: int, kv_heads: int, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = (tensor(2, t, h, 8, seed=s) for t, h, s in ((tq, 4, 1), (tk, kv_heads, 2), (tk, kv_heads, 3)))
    expected = definition(q, k, v, causal=causal, window=window, scale=0.3)
    found = flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal, window_size=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tq", "tk", "kv_heads"), [(6, 6, 4), (3, 7, 2), (7, 4, 1), (1, 5, 2)])
def test_a_soft_cap_under_every_kind_of_mask(
    tq: int, tk: int, kv_heads: int, causal: bool, window: tuple[int, int]
) -> None:
    inputs = [tensor(2, t, h, 8, seed=s) for t, h, s in ((tq, 4, 1), (tk, kv_heads, 2), (tk, kv_heads, 3))]
    inputs = [x.requires_grad_() for x in inputs]
    options = {"causal": causal, "softcap": 0.7}
    results = []
    for out in (
        flash_attn_func(*inputs, **options, window_size=window),
        definition(*inputs, **options, window=window),
    ):
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_packed_and_cached_soft_caps() -> None:
    qkv = tensor(2, 5, 3, 2, 8)
    expected = definition(*qkv.unbind(2), causal=True, window=(2, -1), softcap=0.7)
    found = flash_attn_qkvpacked_func(qkv, causal=True, window_size=(2, -1), softcap=0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    k_cache, v_cache, q = tensor(2, 6, 2, 8), tensor(2, 6, 2, 8, seed=1), tensor(2, 2, 2, 8, seed=2)
    for held in ([6, 6], [5, 2]):
        seqlens = torch.tensor(held, dtype=torch.int32)
        found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=True, softcap=0.7)
        for row, end in enumerate(held):
            seen = slice(row, row + 1), slice(0, end)
            expected = definition(q[row : row + 1], k_cache[seen], v_cache[seen], causal=True, softcap=0.7)
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-12)


def test_a_window_to_the_left_and_a_soft_cap_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastchargpt.integrations.flash_attn as module

    calls: list[dict[str, Any]] = []

    def record(name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(k), original(*a, **k))[1])

    record("causal_attention")
    record("causal_attention_packed")
    q = tensor(1, 6, 2, 8)
    flash_attn_func(q, q, q, causal=True, window_size=(2, -1), softcap=0.7)
    flash_attn_qkvpacked_func(tensor(1, 6, 3, 2, 8), causal=True, window_size=(2, 2), softcap=0.7)
    flash_attn_with_kvcache(q[:, :1], q, q, causal=False, window_size=(2, -1), softcap=0.7)
    assert [(call["window"], call["softcap"]) for call in calls] == [(2, 0.7)] * 3


@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
@pytest.mark.parametrize("scale", [None, 0.0, -0.5])
def test_gradients_and_scales(window: tuple[int, int], scale: float | None) -> None:
    inputs = [tensor(1, t, 2, 4, seed=t).requires_grad_() for t in (5, 6, 7)]
    q, k, v = inputs[0], inputs[1], inputs[2][:, :6]
    found = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=window)
    expected = definition(q, k, v, causal=True, window=window, scale=scale)
    weight = tensor(*found.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_qkvpacked(causal: bool, window: tuple[int, int], contiguous: bool) -> None:
    qkv = tensor(2, 5, 3, 2, 8)
    qkv = qkv if contiguous else qkv.transpose(0, 1).contiguous().transpose(0, 1)
    expected = definition(*qkv.unbind(2), causal=causal, window=window)
    found = flash_attn_qkvpacked_func(qkv, causal=causal, window_size=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [(-1, -1), (2, 0)])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("lengths", [4, [4, 4], [4, 0], [0, 0]])
def test_kvcache(lengths: int | list[int], new: int, window: tuple[int, int]) -> None:
    held = [lengths] * 2 if isinstance(lengths, int) else lengths
    k_cache, v_cache, k, v = (
        tensor(2, 8, 2, 8),
        tensor(2, 8, 2, 8, seed=1),
        tensor(2, new, 2, 8, seed=2),
        tensor(2, new, 2, 8),
    )
    q = tensor(2, new, 4, 8, seed=5)
    wanted = [(k_cache.clone(), k), (v_cache.clone(), v)]
    for cache, fresh in wanted:
        for row, start in enumerate(held):
            cache[row, start : start + new] = fresh[row]
    seqlens = lengths if isinstance(lengths, int) else torch.tensor(lengths, dtype=torch.int32)
    found = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=True, window_size=window)
    for got, (cache, _) in zip((k_cache, v_cache), wanted, strict=True):
        assert torch.equal(got, cache)  # written in place, and nowhere else
    for row, start in enumerate(held):
        seen = slice(row, row + 1), slice(0, start + new)
        expected = definition(q[row : row + 1], k_cache[seen], v_cache[seen], causal=True, window=window)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-12)


def test_kvcache_without_new_keys() -> None:
    k_cache, v_cache, q = tensor(2, 6, 2, 8), tensor(2, 6, 2, 8, seed=1), tensor(2, 2, 2, 8, seed=2)
    for seqlens, end in ((None, 6), (3, 3)):
        found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=True)
        expected = definition(q, k_cache[:, :end], v_cache[:, :end], causal=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [(-1, -1), (2, 1)])
def test_kvcache_rows_of_different_lengths_seen_both_ways(window: tuple[int, int]) -> None:
    k_cache, v_cache, q = tensor(2, 6, 2, 8), tensor(2, 6, 2, 8, seed=1), tensor(2, 2, 2, 8, seed=2)
    seqlens = torch.tensor([5, 2], dtype=torch.int32)
    found = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, causal=False, window_size=window)
    for row, end in enumerate((5, 2)):
        seen = slice(row, row + 1), slice(0, end)
        expected = definition(q[row : row + 1], k_cache[seen], v_cache[seen], causal=False, window=window)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-12)


def test_decoding_equals_one_pass() -> None:
    # how a project written for flash-attn decodes: prefill, then token by token
    q, k, v = (tensor(2, 9, 2, 8, seed=s) for s in range(3))
    whole = flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    k_cache, v_cache, held = torch.zeros(2, 16, 2, 8).double(), torch.zeros(2, 16, 2, 8).double(), 0
    seqlens = torch.zeros(2, dtype=torch.int32)
    for part in (slice(0, 4), *(slice(i, i + 1) for i in range(4, 9))):
        out = flash_attn_with_kvcache(
            q[:, part],
            k_cache,
            v_cache,
            k=k[:, part],
            v=v[:, part],
            cache_seqlens=seqlens,
            causal=True,
            window_size=(4, 0),
        )
        torch.testing.assert_close(out, whole[:, part], rtol=0, atol=1e-12)
        held += out.shape[1]
        seqlens += out.shape[1]


def test_dropout_is_unbiased_and_seeded() -> None:
    q, k = tensor(4, 16, 2, 8), tensor(4, 16, 2, 8, seed=1)
    v = torch.ones_like(q)
    for window in ((-1, -1), (8, 0)):
        torch.manual_seed(1)
        first = flash_attn_func(q, k, v, 0.25, causal=True, window_size=window)
        torch.manual_seed(1)
        assert torch.equal(first, flash_attn_func(q, k, v, 0.25, causal=True, window_size=window))
        assert first.std() > 0
        assert first.mean().item() == pytest.approx(1, abs=0.1)


q, cache = tensor(2, 2, 2, 8), tensor(2, 6, 2, 8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: flash_attn_func(q, q, q, softcap=-30.0), "softcap must be a finite number above 0"),
        (lambda: flash_attn_func(q, q, q, softcap=-30.0, window_size=(0, 1)), "softcap must be a finite number"),
        (lambda: flash_attn_func(q, q, q, alibi_slopes=torch.ones(2)), "alibi_slopes is not served"),
        (lambda: flash_attn_func(q, q, q, return_attn_probs=True), "return_attn_probs is not served"),
        (lambda: flash_attn_qkvpacked_func(tensor(1, 2, 3, 2, 8), alibi_slopes=q), "alibi_slopes is not served"),
        (lambda: flash_attn_qkvpacked_func(tensor(1, 2, 2, 2, 8)), r"must be \(B, T, 3, H, D\)"),
        (lambda: flash_attn_func(q[0], q, q), r"q must be \(B, T, H, D\)"),
        (lambda: flash_attn_func(q, q, q, window_size=(-2, 0)), "window_size must be two whole numbers"),
        (lambda: flash_attn_func(q, q, q, 1.0, window_size=(0, 0)), "dropout_p must be in"),
        (lambda: flash_attn_func(q, q[:1], q[:1], window_size=(0, 0)), "same batch size"),
        (lambda: flash_attn_with_kvcache(q, cache, cache, q, None), "given together"),
        (lambda: flash_attn_with_kvcache(q, cache, cache, q, q), "cache_seqlens must be given"),
        (lambda: flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=5), "2 more do not fit after the 5"),
        (lambda: flash_attn_with_kvcache(q, cache, cache, cache_seqlens=7), "from 0 to the cache's 6"),
        (lambda: flash_attn_with_kvcache(q, cache, cache, q[..., :4], q[..., :4], cache_seqlens=0), "as the cache's"),
        *(
            (lambda name=name, value=value: flash_attn_with_kvcache(q, cache, cache, **{name: value}), f"{name} is not")
            for name, value in {
                "rotary_cos": q,
                "rotary_sin": q,
                "cache_batch_idx": torch.zeros(2),
                "cache_leftpad": torch.zeros(2),
                "block_table": q,
                "alibi_slopes": q,
                "num_splits": 4,
                "return_softmax_lse": True,
            }.items()
        ),
    ],
)
def test_refusals(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(AttentionError, match=sentence):
        call()
