"""Dropout bits: Philox 4x32 counters, the same on a CPU in torch and on a GPU in Triton.

Whether the weight of one key for one query is kept depends on (seed, batch, head, row, column) and on nothing else:
not on the tile that computes it, not on the order, not on the device. One Philox call gives eight draws of 16 bits:
of each 16 x 16 block of scores those of the rows r and r + 8 and the columns c, c + 1, c + 8 and c + 9, which are what
one thread holds of a tensor core's tile, so that in a kernel no draw moves between threads. Source: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the seven rounds that pass its BigCrush runs; PTX ISA,
"Matrix fragments for mma.m16n8k16", for who holds what.
"""

import torch

__all__ = ["ROUNDS", "draw_seed", "draw_seeds", "dropout_threshold", "keep_mask", "keep_probability", "philox_4x32"]

ROUNDS = 7
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh (1,) int64 seed from torch's generator for `device`.

    It follows `torch.manual_seed`, advances the generator once a call, never leaves the device, and is redrawn equal
    by activation checkpointing, which restores the generator's state.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def draw_seeds(count: int) -> torch.Tensor:
    """As many seeds at once, (count,) int64, from torch's generator for CPUs."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64)


def dropout_threshold(dropout_p: float) -> int:
    """The 16-bit number below which a draw drops: round(p * 2**16), so a p below 2**-17 drops nothing."""
    return min(round(dropout_p * 2**16), 2**16 - 1)


def keep_probability(dropout_p: float) -> float:
    """The probability with which `dropout_threshold` really keeps: survivors are divided by it, so there is no bias."""
    return 1.0 - dropout_threshold(dropout_p) / 2**16


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words from a 4 x 32-bit counter and a 2 x 32-bit key, all held in int64 and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2**64, which keeps all 64 bits of the unsigned 32 x 32 product.
        product_a, product_b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1, c2, c3 = (
            ((product_b >> 32) & _LOW) ^ c1 ^ k0,
            product_b & _LOW,
            ((product_a >> 32) & _LOW) ^ c3 ^ k1,
            product_a & _LOW,
        )
        k0, k1 = (k0 + WEYL_A) & _LOW, (k1 + WEYL_B) & _LOW
    return c0, c1, c2, c3


def keep_mask(
    seed: torch.Tensor, batch: int, heads: int, rows: int, columns: int, dropout_p: float, *, first_row: int = 0
) -> torch.Tensor:
    """The dropout mask, bool (batch, heads, rows, columns), True where a weight is kept; row 0 is query `first_row`."""

    def along(dim: int, start: int, count: int) -> torch.Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = count
        return torch.arange(start, start + count, dtype=torch.int64, device=seed.device).view(shape)

    blocks = -(-columns // 16)
    row = along(2, first_row, rows)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    counter = (along(3, 0, 4 * blocks), row // 16 * 8 + row % 8, along(1, 0, heads), along(0, 0, batch))
    w0, w1, w2, w3 = philox_4x32(counter, key)  # (batch, heads, rows, 4 * blocks)
    second = row % 16 >= 8
    words = torch.stack((torch.where(second, w2, w0), torch.where(second, w3, w1)), dim=-1)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(batch, heads, rows, blocks, 4, 2, 2)
    draws = draws.transpose(-3, -2).reshape(batch, heads, rows, 16 * blocks)[..., :columns]
    return draws >= dropout_threshold(dropout_p)
