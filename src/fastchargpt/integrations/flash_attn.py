"""flash-attention's shape of call, for projects that were written for it, on a GPU or a CPU.

    from fastchargpt.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

Tensors are (B, T, H, D), as there; here they may be of any float dtype and on any device. The names, the order and the
defaults of the arguments are those of flash-attn 2; an argument that is not served is refused by name, never ignored.

Causal attention runs on `fastchargpt.causal_attention`, with a window to the left and a soft-cap where they are asked
for. A window to the right, and a cache whose rows have different lengths, run under a mask of Tq x Tk.
"""

from typing import Any

import torch
from torch import Tensor

from fastchargpt.attention import causal_attention, causal_attention_packed, explain_attention
from fastchargpt.errors import AttentionError
from fastchargpt.integrations.masked import masked_attention

__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_with_kvcache"]

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of q (B, Tq, Hq, D) over k and v (B, Tk, Hkv, D), Hq a multiple of Hkv: out (B, Tq, Hq, D).

    Query i stands at key i + Tk - Tq (bottom-right alignment). A query that sees no key gives 0.

    Args:
        q, k, v: one dtype and device, any strides.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        softmax_scale: what the scores are multiplied by; None is D**-0.5.
        causal: whether a query sees no key after its own place.
        window_size: keys that a query sees to its left and to its right; -1 is no limit.
        softcap: what bounds the scaled scores, as softcap * tanh(score / softcap); 0 leaves them as they are.
        deterministic: refused where the backward pass would not be (SDPA on a GPU).
        alibi_slopes, return_attn_probs: only at their defaults.

    Raises:
        AttentionError: an argument that is not served, or a shape, dtype or range that is wrong.
    """
    _refuse(alibi_slopes=alibi_slopes is not None, return_attn_probs=return_attn_probs)
    q_BHTD, k_BHTD, v_BHTD = (_heads_first(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    out = _attend(q_BHTD, k_BHTD, v_BHTD, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    return out.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of packed queries, keys and values: qkv (B, T, 3, H, D), out (B, T, H, D).

    Causal attention, with a window to the left or without, reads qkv in place. Arguments and errors as in
    `flash_attn_func`.
    """
    _refuse(alibi_slopes=alibi_slopes is not None, return_attn_probs=return_attn_probs)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise AttentionError(f"qkv must be (B, T, 3, H, D); got shape {tuple(qkv.shape)}")
    kind = _mask_kind(qkv.shape[1], qkv.shape[1], causal, window_size)
    if not deterministic and qkv.is_contiguous() and kind in ("causal", "window"):
        heads = qkv.shape[3]
        packed = causal_attention_packed(
            qkv.flatten(2),
            heads,
            scale=softmax_scale,
            dropout_p=dropout_p,
            window=window_size[0] if kind == "window" else None,
            softcap=_cap(softcap),
        )
        return packed.view(*packed.shape[:2], heads, -1)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    return _attend(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, deterministic).transpose(1, 2)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Attention of q (B, Tq, Hq, D) over a cache (B, S, Hkv, D), to which k and v (B, Tnew, Hkv, D) are written first.

    Args:
        q: queries; the last of them stands at the cache's last key (bottom-right alignment).
        k_cache, v_cache: written in place at [cache_seqlens, cache_seqlens + Tnew) of each row.
        k, v: new keys and values, both or neither.
        cache_seqlens: keys that the cache holds before the call: a number, or (B,) integers (read on the host). None is
            the whole cache, and needs k to be None.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        num_splits: 0 or 1; the keys of a query are never split.
        rotary_interleaved: has no effect, since the rotary tables are not served.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table, alibi_slopes, return_softmax_lse: only at
            their defaults.

    Raises:
        AttentionError: an argument that is not served, a full cache, or a shape, dtype or range that is wrong.
    """
    _refuse(
        rotary_cos=rotary_cos is not None,
        rotary_sin=rotary_sin is not None,
        cache_batch_idx=cache_batch_idx is not None,
        cache_leftpad=cache_leftpad is not None,
        block_table=block_table is not None,
        alibi_slopes=alibi_slopes is not None,
        num_splits=num_splits not in (0, 1),
        return_softmax_lse=return_softmax_lse,
    )
    for x, name in ((q, "q"), (k_cache, "k_cache"), (v_cache, "v_cache")):
        _heads_first(x, name)
    if (k is None) != (v is None):
        raise AttentionError("k and v must be given together, and one of them is None")
    held = _lengths(cache_seqlens, k_cache, needed=k is not None)
    if k is not None and v is not None:
        _append(k_cache, v_cache, k, v, held)
        held = [length + k.shape[1] for length in held]
    end = max(held, default=0)
    q_BHTD, k_BHSD, v_BHSD = q.transpose(1, 2), k_cache[:, :end].transpose(1, 2), v_cache[:, :end].transpose(1, 2)
    if len(set(held)) <= 1:
        return _attend(q_BHTD, k_BHSD, v_BHSD, 0.0, softmax_scale, causal, window_size, softcap, False).transpose(1, 2)
    # every check of shapes, dtypes and ranges
    explain_attention(q_BHTD, k_BHSD, v_BHSD, scale=softmax_scale, softcap=_cap(softcap))
    rows = torch.tensor(held, device=q.device).view(-1, 1, 1, 1)
    visible = _band(q.shape[1], end, rows, *_limits(causal, window_size), q.device) & (
        torch.arange(end, device=q.device) < rows
    )
    out = masked_attention(q_BHTD, k_BHSD, v_BHSD, visible, scale=softmax_scale, softcap=_cap(softcap))
    return out.transpose(1, 2)


def _refuse(**given: bool) -> None:
    for name, refused in given.items():
        if refused:
            raise AttentionError(f"{name} is not served by fastchargpt's flash_attn functions: leave it at its default")


def _heads_first(x: Tensor, name: str) -> Tensor:
    if x.dim() != 4:
        raise AttentionError(f"{name} must be (B, T, H, D); got shape {tuple(x.shape)}")
    return x.transpose(1, 2)


def _cap(softcap: float) -> float | None:
    return None if softcap == 0.0 else softcap


def _limits(causal: bool, window_size: Window) -> Window:
    """Keys visible to the left and to the right of a query's own place; -1 is no limit."""
    if len(window_size) != 2 or any(not isinstance(size, int) or size < -1 for size in window_size):
        raise AttentionError(f"window_size must be two whole numbers of at least -1; got {window_size!r}")
    left, right = window_size
    return left, 0 if causal else right


def _mask_kind(tq: int, tk: int, causal: bool, window_size: Window) -> str:
    """What the limits amount to for tq queries and tk keys: "none", "causal", "window" (causal, and a left limit) or
    "band" (any other)."""
    left, right = _limits(causal, window_size)
    # query i stands at key i + tk - tq, so no key is more than tk - 1 to the left of one or tq - 1 to the right
    if left != -1 and left < tk - 1:
        return "window" if right == 0 or tq == 1 else "band"  # one query stands at the last key
    if right == -1 or right >= tq - 1:
        return "none"
    return "causal" if right == 0 else "band"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    deterministic: bool,
) -> Tensor:
    """Attention of q (B, Hq, Tq, D) over k and v (B, Hkv, Tk, D): (B, Hq, Tq, D)."""
    explain_attention(q, k, v, scale=scale, dropout_p=dropout_p)  # every check of shapes, dtypes and ranges
    tq, tk = q.shape[2], k.shape[2]
    kind = _mask_kind(tq, tk, causal, window_size)
    left, right = _limits(causal, window_size)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "softcap": _cap(softcap)}
    unmasked = options | {"causal": kind != "none", "window": left if kind == "window" else None}
    reason = explain_attention(q, k, v, **unmasked)
    if deterministic and q.is_cuda and (kind == "band" or reason.startswith("sdpa")):
        raise AttentionError(f"deterministic=True is not served where attention runs on SDPA on a GPU ({reason})")
    if kind != "band" or q.numel() == 0 or k.numel() == 0:
        out: Tensor = causal_attention(q, k, v, **unmasked)
        return out
    return masked_attention(q, k, v, _band(tq, tk, tk, left, right, q.device), **options)


def _band(tq: int, tk: int, end: int | Tensor, left: int, right: int, device: torch.device) -> Tensor:
    """Which of tk keys the tq queries that stand before `end` see, (..., tq, tk)."""
    place = torch.arange(tq, device=device)[:, None] + (end - tq)
    offset = torch.arange(tk, device=device) - place
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left != -1:
        visible &= offset >= -left
    if right != -1:
        visible &= offset <= right
    return visible


def _lengths(cache_seqlens: int | Tensor | None, cache: Tensor, *, needed: bool) -> list[int]:
    """Keys held by each row of the cache."""
    batch, capacity = cache.shape[:2]
    if cache_seqlens is None:
        if needed:
            raise AttentionError("cache_seqlens must be given where k and v are: it says where they are written")
        return [capacity] * batch
    found: Any = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else cache_seqlens
    lengths = found if isinstance(found, list) else [found] * batch
    if len(lengths) != batch or any(type(n) is not int or not 0 <= n <= capacity for n in lengths):
        raise AttentionError(
            f"cache_seqlens must be a whole number or {batch} of them, from 0 to the cache's {capacity}; "
            f"got {found!r:.80}"
        )
    return lengths


@torch.no_grad()
def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, held: list[int]) -> None:
    """Write the new keys and values after those held, in place."""
    rows, capacity = k_cache.shape[:2]
    if k.dim() != 4 or k.shape != v.shape or k.shape[0] != rows or k.shape[2:] != k_cache.shape[2:]:
        raise AttentionError(
            f"k and v must be (B, Tnew, Hkv, D) as the cache's {tuple(k_cache.shape)}; "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    new = k.shape[1]
    if max(held, default=0) + new > capacity:
        raise AttentionError(f"the cache takes {capacity} keys: {new} more do not fit after the {max(held)} it holds")
    for cache, fresh in ((k_cache, k), (v_cache, v)):
        if len(set(held)) == 1:
            cache[:, held[0] : held[0] + new] = fresh
        else:
            for row, start in enumerate(held):
                cache[row, start : start + new] = fresh[row]
