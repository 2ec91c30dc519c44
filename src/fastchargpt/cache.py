"""The key/value cache of decoding: allocated once, written in place."""

import torch
from torch import Tensor

from fastchargpt.config import GPTConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of every layer for `batch_size` sequences of up to `capacity` tokens.

    `GPT.forward(idx, cache=cache)` appends the tokens of `idx` and sees all that came before. `length` counts the
    tokens held; set it back to forget the newest.

    Args:
        config: the model's config.
        batch_size: sequences decoded side by side.
        capacity: tokens per sequence; `config.block_size` unless given.
        device: where the cache lives.
        dtype: its number format, that of the model's activations.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = config.block_size if capacity is None else capacity
        self.length = 0
        shape = (config.n_layer, 2, batch_size, config.kv_heads, self.capacity, config.head_dim)
        self.kv_L2BHSD = torch.zeros(shape, device=device, dtype=dtype)

    @torch.no_grad()
    def append(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer after those it holds, and return all of them as views.

        Decoding only: no gradient flows through the cache.
        """
        start, end = self.length, self.length + k_BHTD.shape[2]
        k_BHSD, v_BHSD = self.kv_L2BHSD[layer]
        k_BHSD[:, :, start:end] = k_BHTD
        v_BHSD[:, :, start:end] = v_BHTD
        return k_BHSD[:, :, :end], v_BHSD[:, :, :end]
