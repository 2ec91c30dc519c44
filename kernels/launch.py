"""What every launch of a kernel passes besides its tensors and their strides."""

import dataclasses
import math
from typing import Any

import torch

from .philox import dropout_threshold, keep_probability

__all__ = ["LaunchArguments", "alignment", "block_d", "is_plain", "launch_arguments"]

WHOLE_TILES = (16, 32, 64, 128, 256)  # the widths that `block_d` has


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchArguments:
    """The tail of every kernel's signature, in its order."""

    seed: torch.Tensor  # (1,) int64; any tensor where there is no dropout
    scalars: tuple[int | float, ...]  # heads, group, tq, tk, scale, threshold, keep_scale
    variant: dict[str, int | float | None]  # window, softcap
    constants: dict[str, Any]  # HEAD_DIM, BLOCK_D, CAUSAL, NEGATE, DROPOUT, PRECISION; a launch adds ALIGN


def block_d(head_dim: int) -> int:
    """head_dim rounded up to the width of a tile: a power of two, at least 16 (the least that a tensor core takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def is_plain(q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
    """Whether this is what most models do, which needs the fewest registers: causal, no groups, no columns of zeros."""
    if not causal or q.shape[1] != k.shape[1]:
        return False
    for width in WHOLE_TILES:  # noqa: SIM110 (torch.compile may hold a head_dim as a symbol: branches decide it)
        if q.shape[-1] == width:
            return True
    return False


def alignment(*tensors: torch.Tensor) -> int:
    """ALIGN, the largest power of two up to 16 that divides every stride between rows, heads and sequences.

    From 16 on Triton sees it by itself. For a head_dim of 52 or 100 the strides are multiples of 4, and without being
    told a kernel would load one element at a time.
    """
    found = 16
    for tensor in tensors:
        found = math.gcd(found, *tensor.stride()[:-1])
    if found == 16:  # the usual; else look whether what spoils it is a stride by which nothing is read
        return found
    strides = (
        stride
        for tensor in tensors
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False)
        if size > 1
    )
    return math.gcd(16, *strides)


def launch_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    seed: torch.Tensor | None,
    *,
    scale: float,
    causal: bool,
    dropout_p: float,
    window: int | None = None,
    softcap: float | None = None,
) -> LaunchArguments:
    """Arguments for q (B, Hq, Tq, D) against k (B, Hkv, Tk, D).

    A window or a soft-cap of None is gone once a kernel is compiled: the plain kernel is what it would be without them.
    """
    heads, tq, head_dim = q.shape[1], q.shape[2], q.shape[3]
    dropout = dropout_p > 0.0
    assert not dropout or seed is not None, "dropout needs a seed"
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return LaunchArguments(
        seed=q if seed is None else seed,
        scalars=(
            heads,
            heads // k.shape[1],
            tq,
            k.shape[2],
            scale,
            dropout_threshold(dropout_p),
            1.0 / keep_probability(dropout_p),
        ),
        variant={"window": window, "softcap": softcap},
        constants={
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d(head_dim),
            "CAUSAL": causal,
            "NEGATE": scale < 0.0,
            "DROPOUT": dropout,
            "PRECISION": "tf32" if tf32 else "ieee",
        },
    )
