"""torch's fused attention behind our signature: bottom-right causal, grouped heads, a mask only where it has to be."""

import torch
import torch.nn.functional as F

from .window import seen_keys

__all__ = ["attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout_p: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of q (B, Hq, Tq, D) over k, v (B, Hkv, Tk, D): out (B, Hq, Tq, D), in q's dtype.

    torch's own `is_causal` is aligned top-left, so it serves Tq == Tk only. One query sees every key and needs no mask
    (decoding). Otherwise the queries are made as many as the keys: those that see nothing are cut off, or rows of zeros
    are put in front and their results cut off. Only where that would more than double the work (a few queries against
    a long cache), and for a window, is a mask built, of Tq x Tk. What precedes every window is cut off beforehand, so
    that a window needs no mask in decoding. Dropout is torch's own, drawn from torch's generator.
    """
    if scale <= 0.0:  # torch scales its -inf mask too, on CPU: -inf * 0 is NaN, -inf * -1 shows the future
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    k, v, window = seen_keys(q, k, v, window)
    tq, tk = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if tq == 1:
        causal = False  # assigned, since under torch.export with a dynamic T `causal and tq != 1` would be symbolic
    if not causal or (tq == tk and window is None):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    if tq > tk:
        rest = q[:, :, tq - tk :]
        seen = attention(rest, k, v, scale=scale, causal=True, dropout_p=dropout_p, window=window)
        return F.pad(seen, (0, 0, tq - tk, 0))
    if window is None and 2 * tq > tk:
        square = F.scaled_dot_product_attention(
            F.pad(q, (0, 0, tk - tq, 0)), k, v, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=gqa
        )
        return square[:, :, tk - tq :]
    visible = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    if window is not None:
        visible = visible.triu(tk - tq - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale, enable_gqa=gqa)
