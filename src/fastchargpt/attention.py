"""Causal attention with one signature over three backends: our Triton kernels, torch's SDPA and the naive reference.

Shapes: B batch, Hq query heads, Hkv key and value heads, Tq queries, Tk keys, D head_dim, C = Hq * D.
"""

import math
from typing import Literal, overload

import torch

from .errors import AttentionError, BackendUnavailableError, nearest
from .kernels import naive, sdpa
from .kernels.availability import triton_problem
from .kernels.launch import is_plain, problem_of
from .kernels.packed import unpack
from .kernels.philox import draw_seed
from .kernels.tuning import serves_variants, widest_head
from .kernels.window import hiding

__all__ = [
    "BACKENDS",
    "causal_attention",
    "causal_attention_packed",
    "choose_backend",
    "explain_attention",
]

BACKENDS = ("auto", "triton", "sdpa", "naive")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_HEAD_DIM = (8, 256)


@overload
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    dropout_p: float = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, softmax(scale * q k^T) v, in which query i sees the keys up to i + Tk - Tq.

    Args:
        q: (B, Hq, Tq, D), any strides; float32, bfloat16, float16 or float64.
        k: (B, Hkv, Tk, D), in q's dtype and on its device; Hq is a multiple of Hkv (grouped-query attention).
        v: as k.
        scale: what the scores are multiplied by; None is D**-0.5. Zero and negative values are honoured.
        causal: False lets every query see every key.
        dropout_p: the probability, in [0, 1), of dropping a weight; the others are divided by 1 - dropout_p.
        window: how many keys before its own a query sees (flash-attn's left window); None is all of them. Triton skips
            what no query of a block sees, SDPA takes a mask of Tq x Tk. With causal=True only.
        softcap: what bounds the scaled scores, as softcap * tanh(score / softcap); None leaves them as they are.
        backend: "auto" (`explain_attention` says which it takes), "triton", "sdpa" or "naive".
        return_lse: also return the log-sum-exp of each query's scaled scores.

    Returns:
        out (B, Hq, Tq, D) in q's dtype, or (out, lse) with lse (B, Hq, Tq) in float32 (float64 for float64 inputs).
        A query that sees no key gives 0 (lse -inf). An empty batch or sequence gives an empty result.

    Raises:
        AttentionError: an argument that no backend accepts.
        BackendUnavailableError: a backend asked for by name that cannot serve.
    """
    _check(q, k, v, scale, dropout_p)
    window, softcap = _check_variant(causal, window, softcap)
    name = choose_backend(
        q,
        k,
        v,
        causal=causal,
        dropout_p=dropout_p,
        return_lse=return_lse,
        backend=backend,
        window=window,
        softcap=softcap,
    )[0]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if name == "sdpa":
        return sdpa.attention(q, k, v, scale=scale, causal=causal, dropout_p=dropout_p, window=window)
    attend = naive.attention
    if name == "triton":
        from .kernels import flash

        attend = flash.attention
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    out, lse = attend(
        q, k, v, scale=scale, causal=causal, dropout_p=dropout_p, seed=seed, window=window, softcap=softcap
    )
    return (out, lse) if return_lse else out


def causal_attention_packed(
    qkv: torch.Tensor,
    n_head: int,
    *,
    n_kv_head: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention straight from the projection: reads qkv in place and returns what the next projection takes.

    Args:
        qkv: (B, T, 3 * C): all query heads, then all key heads, then all value heads. With `n_kv_head` the keys and
            the values have fewer heads: (B, T, (n_head + 2 * n_kv_head) * D).
        n_head: query heads, Hq.
        n_kv_head: key and value heads, a divisor of n_head; None is n_head.
        scale, dropout_p, window, softcap, backend: as in `causal_attention`.

    Returns:
        (B, T, C) in qkv's dtype. Neither direction copies qkv on Triton, where the backward writes one packed
        gradient; elsewhere the forward is views only.

    Raises:
        AttentionError, BackendUnavailableError: as `causal_attention`.
    """
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    _check_packed(qkv, n_head, n_kv_head)
    q, k, v = unpack(qkv.detach(), n_head, n_kv_head)  # what is asked of them is cheaper without autograd
    _check(q, k, v, scale, dropout_p)
    window, softcap = _check_variant(True, window, softcap)
    name = choose_backend(
        q, k, v, causal=True, dropout_p=dropout_p, return_lse=False, backend=backend, window=window, softcap=softcap
    )[0]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    seed = draw_seed(qkv.device) if dropout_p > 0.0 and name != "sdpa" else None
    if name == "triton":
        from .kernels import flash

        return flash.attention_packed(
            qkv, n_head, n_kv_head, scale=scale, dropout_p=dropout_p, seed=seed, window=window, softcap=softcap
        )
    q, k, v = unpack(qkv, n_head, n_kv_head)
    if name == "sdpa":
        out = sdpa.attention(q, k, v, scale=scale, causal=True, dropout_p=dropout_p, window=window)
    else:
        out, _ = naive.attention(
            q, k, v, scale=scale, causal=True, dropout_p=dropout_p, seed=seed, window=window, softcap=softcap
        )
    return out.transpose(1, 2).flatten(2)


def explain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> str:
    """Which backend `causal_attention` would take for these arguments, and why, in a sentence.

    Raises what `causal_attention` would raise; computes nothing.
    """
    _check(q, k, v, scale, dropout_p)
    window, softcap = _check_variant(causal, window, softcap)
    name, reason = choose_backend(
        q,
        k,
        v,
        causal=causal,
        dropout_p=dropout_p,
        return_lse=return_lse,
        backend=backend,
        window=window,
        softcap=softcap,
    )
    detail = ""
    if name == "triton":
        from .kernels import flash

        problem = problem_of(q, k, scale=1.0, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap)
        detail = f" ({flash.describe(problem)})"
    elif name == "sdpa" and hiding(window, k.shape[2]) is not None and q.shape[2] > 1:
        detail = f" (the window of {window} as a mask of Tq x Tk)"
    return f"{name}: {reason}{detail}"


def choose_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    dropout_p: float,
    return_lse: bool,
    backend: str,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[str, str]:
    """The backend that serves these (checked) arguments, "triton", "sdpa" or "naive", and the reason.

    Raises:
        AttentionError: `backend` is not a name in `BACKENDS`.
        BackendUnavailableError: `backend` names one that cannot serve.
    """
    variant = hiding(window, k.shape[2]) is not None or softcap is not None
    if backend == "auto":
        if q.numel() == 0 or k.numel() == 0:
            return "naive", "nothing is to be computed for an empty batch or sequence"
        beyond = "the log-sum-exp is asked for, which SDPA does not return" if return_lse else ""
        beyond = beyond or ("a soft-cap is asked for, which SDPA does not have" if softcap is not None else "")
        if q.is_cuda:
            problem = _triton_refusal(q, k, causal, dropout_p, variant)
            if problem is None:
                return "triton", "the tensors are on a GPU that the Triton kernels serve"
            return ("naive", f"{beyond}, and {problem}") if beyond else ("sdpa", problem)
        if beyond:
            return "naive", f"{beyond}, and Triton serves GPUs only"
        return "sdpa", "the tensors are not on a CUDA or ROCm GPU, where alone the Triton kernels are the faster ones"
    if backend == "naive":
        return "naive", "it was asked for by name"
    if backend == "sdpa":
        if return_lse:
            raise BackendUnavailableError(
                "backend 'sdpa' does not return the log-sum-exp (return_lse=True): use backend 'triton' or 'naive'"
            )
        if softcap is not None:
            raise BackendUnavailableError(
                f"backend 'sdpa' has no soft-cap of the scores (softcap={softcap}): use backend 'triton' or 'naive'"
            )
        return ("naive" if q.numel() == 0 or k.numel() == 0 else "sdpa"), "it was asked for by name"
    if backend == "triton":
        problem = _triton_refusal(q, k, causal, dropout_p, variant)
        if problem is not None:
            raise BackendUnavailableError(f"backend 'triton' cannot serve: {problem}; use backend 'auto' or 'sdpa'")
        return ("naive" if q.numel() == 0 or k.numel() == 0 else "triton"), "it was asked for by name"
    raise AttentionError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}{nearest(backend, BACKENDS)}")


def _triton_refusal(q: torch.Tensor, k: torch.Tensor, causal: bool, dropout_p: float, variant: bool) -> str | None:
    """Why the Triton kernels cannot serve these (`variant`: with a window or a soft-cap), or None when they can."""
    dtype, head_dim = q.dtype, q.shape[-1]
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if not _TRITON_HEAD_DIM[0] <= head_dim <= _TRITON_HEAD_DIM[1]:
        return f"the Triton kernels take a head_dim from 8 to 256, and it is {head_dim}"
    device = (q.device.type, q.device.index or 0)
    problem = triton_problem(*device)
    plain = is_plain(q.shape, k.shape, causal)
    if problem is None and head_dim > widest_head(*device, dtype, dropout_p > 0.0, plain):
        return f"the launch table of this GPU has no {dtype} kernels without spills for a head_dim of {head_dim}"
    if problem is None and variant and not serves_variants(*device, dtype, head_dim, dropout_p > 0.0, plain):
        return (
            f"the launch table of this GPU has no {dtype} kernels with a window or a soft-cap and without spills "
            f"for a head_dim of {head_dim}"
        )
    return problem


def _check_packed(qkv: torch.Tensor, n_head: int, n_kv_head: int) -> None:
    """Raise AttentionError where qkv is not (B, T, (Hq + 2 Hkv) * D)."""
    if qkv.dim() != 3:
        raise AttentionError(f"qkv must have 3 dimensions, (B, T, 3 * C); got shape {tuple(qkv.shape)}")
    if n_head < 1 or n_kv_head < 1 or n_head % n_kv_head:
        raise AttentionError(f"n_head must be a positive multiple of n_kv_head; got {n_head} and {n_kv_head}")
    width, heads = qkv.shape[2], n_head + 2 * n_kv_head
    if width % heads or width == 0:
        raise AttentionError(
            f"qkv's last dimension must be a multiple of n_head + 2 * n_kv_head = {heads}; got {width}"
        )


def _check_variant(causal: bool, window: int | None, softcap: float | None) -> tuple[int | None, float | None]:
    """The window and the soft-cap; raise AttentionError for those that mean nothing."""
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int | torch.SymInt) or window < 0:
            raise AttentionError(
                f"window must be a whole number of keys, 0 or more, or None for no window; got {window!r}"
            )
        if not causal:
            raise AttentionError(
                f"window counts the keys before a query's own and needs causal=True; got window={window}, causal=False"
            )
    if softcap is not None:
        if not (math.isfinite(softcap) and softcap > 0.0):
            raise AttentionError(f"softcap must be a finite number above 0, or None for no soft-cap; got {softcap}")
        softcap = float(softcap)
    return window, softcap


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, dropout_p: float) -> None:
    """Raise AttentionError where no backend could serve. Runs on every call: comparisons only, words when it fails."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4:
                raise AttentionError(f"{name} must have 4 dimensions, (B, H, T, D); got shape {tuple(x.shape)}")
    qb, qh, _, qd = q.shape
    kb, kh, _, kd = k.shape
    if k.shape != v.shape:
        raise AttentionError(f"v must have k's shape; got {tuple(v.shape)} and {tuple(k.shape)}")
    if qb != kb:
        raise AttentionError(f"q and k must have the same batch size; got {qb} and {kb}")
    if qd != kd:
        raise AttentionError(f"q and k must have the same head_dim; got {qd} and {kd}")
    if qd == 0 or qh == 0 or kh == 0 or qh % kh:
        raise AttentionError(
            f"q's heads must be a positive multiple of k's, and head_dim positive; "
            f"got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype not in _DTYPES:
        raise AttentionError(f"q's dtype must be float32, bfloat16, float16 or float64; got {q.dtype}")
    if (k.dtype != q.dtype or v.dtype != q.dtype) and not torch.is_autocast_enabled(q.device.type):
        raise AttentionError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise AttentionError(f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}")
    if not 0.0 <= dropout_p < 1.0:
        raise AttentionError(f"dropout_p must be in [0, 1); got {dropout_p}")
    if scale is not None and not math.isfinite(scale):
        raise AttentionError(f"scale must be a finite number, or None for head_dim**-0.5; got {scale}")
