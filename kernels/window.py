"""What a sliding window leaves of the keys: a query at key i sees the keys i - window .. i."""

import torch

__all__ = ["hiding", "keys_seen", "seen_keys"]


def hiding(window: int | None, tk: int) -> int | None:
    """The window, or None where it hides none of tk keys from any query."""
    return None if window is None or window >= tk - 1 else window


def keys_seen(tq: int, tk: int, window: int | None) -> int:
    """How many of tk keys, the last of them, any of tq queries sees."""
    return tk if window is None else min(tk, tq + window)


def seen_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """k and v (B, Hkv, Tk, D) without the keys before every query's window (views), and what `hiding` gives for them.

    One query (decoding) sees all that is left, so nothing remains to be hidden from it.
    """
    first = k.shape[2] - keys_seen(q.shape[2], k.shape[2], window)
    if first > 0:
        k, v = k[:, :, first:], v[:, :, first:]
    return k, v, hiding(window, k.shape[2])
