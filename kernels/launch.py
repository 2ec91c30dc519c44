"""One launch of a kernel: all that it is given besides its tensors, worked out once for every call alike."""

import ctypes
import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .availability import triton_version
from .philox import dropout_threshold, keep_probability

__all__ = [
    "LAUNCHES_KEPT",
    "VARYING",
    "Launch",
    "Problem",
    "Strides",
    "alignment",
    "block_d",
    "heads_together",
    "inverse",
    "is_plain",
    "overlapping",
    "problem_of",
]

WHOLE_TILES = (16, 32, 64, 128, 256)  # the widths that `block_d` has
KNOWN_TRITON = (3, 7)  # the newest version of which it is known what decides the machine code
L2_SHARE = 0.5  # of the cache, that the heads begun together may take
GRAPHS_OVERLAP = 12_030  # CUDA 12.3: drivers before it cannot record such a launch in a graph
MOST_ALONG_Y = 65535  # programs of a grid; along x there may be 2^31 - 1
LAUNCHES_KEPT = 256  # of each kernel: sizes, strides and options that come back
# Arguments of which machine code must not depend on whether they are 1, or multiples of 16.
VARYING = (
    "together", "together_inverse", "heads", "heads_inverse", "tq", "tk", "stretch", "pieces", "threshold", "window",
)  # fmt: skip
KEYS = ("k", "v", "dk", "dv")  # tensors in the shape of k; the others are in that of q
Strides = tuple[int, ...]


class Problem(NamedTuple):
    """What a call of attention computes: all but where its tensors lie, and what is in them."""

    q_shape: tuple[int, ...]  # (B, Hq, Tq, D)
    k_shape: tuple[int, ...]  # (B, Hkv, Tk, D)
    dtype: torch.dtype
    device: torch.device
    tf32: bool  # whether products of float32 may be rounded so
    scale: float
    causal: bool
    dropout_p: float
    window: int | None
    softcap: float | None

    @property
    def length(self) -> int:
        """The longer of Tq and Tk."""
        return max(self.q_shape[2], self.k_shape[2])

    @property
    def is_variant(self) -> bool:
        """Whether there is a sliding window or a soft-cap."""
        return self.window is not None or self.softcap is not None

    @property
    def is_plain(self) -> bool:
        """See the function of that name."""
        return is_plain(self.q_shape, self.k_shape, self.causal)

    def arguments(self) -> dict[str, Any]:
        """By the kernels' names for them. A None, and all that would be done with it, is gone from compiled code."""
        _, heads, tq, head_dim = self.q_shape
        return {
            "group": heads // self.k_shape[1],
            "tq": tq,
            "tk": self.k_shape[2],
            "scale": self.scale,
            "threshold": dropout_threshold(self.dropout_p),
            "keep_scale": 1.0 / keep_probability(self.dropout_p),
            "window": self.window,
            "softcap": self.softcap,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d(head_dim),
            "CAUSAL": self.causal,
            "NEGATE": self.scale < 0.0,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": "tf32" if self.tf32 else "ieee",
        }


def problem_of(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    dropout_p: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Problem:
    """The problem of q (B, Hq, Tq, D) against k (B, Hkv, Tk, D); float32 follows torch's matmul precision."""
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return Problem(q.shape, k.shape, q.dtype, q.device, tf32, scale, causal, dropout_p, window, softcap)


class Launch:
    """A kernel, its grid, and every argument but the tensors; called with those, in the order of the kernel's own.

    Triton looks at every argument of a launch to find the machine code for it, which takes longer than the launch.
    Here only the tensors' addresses differ from call to call, and of them it only asks whether 16 divides them: so the
    code that it found is kept by that, and launched at once from then on.
    """

    def __init__(
        self,
        kernel: Any,
        blocks: int,  # of a head
        heads: int,  # of the queries or the keys: a program takes a block of a head
        problem: Problem,
        strides: Mapping[str, Strides],  # by the name of the tensor
        in_turn: bool = False,  # see `heads_together`
        **settings: Any,  # further arguments of the kernel's, and the compiler's options
    ) -> None:
        together = heads_together(problem, heads, in_turn)
        shapes = (problem.k_shape if name in KEYS else problem.q_shape for name in strides)
        known = {
            **problem.arguments(),
            **{f"{name}_strides": stride for name, stride in strides.items()},
            **settings,
            "together": together,
            "together_inverse": inverse(together),
            "heads": heads,
            "heads_inverse": inverse(heads),
            "ALIGN": alignment(zip(shapes, strides.values(), strict=True)),
        }
        names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
        self._kernel = kernel
        self._grid = (blocks * together, heads * problem.q_shape[0] // together, 1)
        self._rest = tuple(known[name] for name in names)
        self._options = {name: value for name, value in settings.items() if name not in names}
        self._code: dict[tuple[bool, ...], Any] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream."""
        whole = tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])
        code = self._code.get(whole)
        if code is not None:
            code[self._grid](*tensors, *self._rest)
            return
        code = self.by_triton(*tensors)
        if code is not None and _may_keep_code():  # an interpreter has none
            self._code[whole] = code

    def by_triton(self, *tensors: torch.Tensor) -> Any:
        """Launch as Triton itself does, which looks at every argument; gives the machine code that it found."""
        return self._kernel[self._grid](*tensors, *self._rest, **self._options)


def heads_together(problem: Problem, heads: int, in_turn: bool) -> int:
    """Of B times `heads` heads, how many are begun together: the blocks with the most work of all of them first.

    Programs start in the order of their numbers. Head after head (`in_turn`, as far as a grid is wide), the longest of
    the last head would start when the others are nearly done, and be waited for: on an H200 a forward of 1024 tokens
    took 48 us so, and takes 42. But what the programs of a head read again should still be in the L2 cache, so they are
    as many as fit there; the number has to divide that of all heads. Of 128 tokens, where a head has two blocks, head
    after head is faster all the same (22.1 us, not 23.3), so a table says which.
    """
    count = problem.q_shape[0] * heads
    if in_turn and count <= MOST_ALONG_Y:
        return 1
    share = (math.prod(problem.q_shape) + math.prod(problem.k_shape)) * problem.dtype.itemsize / count
    fitting = L2_SHARE * _l2_bytes(problem.device) / share
    if count <= fitting:
        return count
    small = [number for number in range(1, math.isqrt(count) + 1) if count % number == 0]
    divisors = small + [count // number for number in small]
    nearest = min(divisors, key=lambda number: max(number / fitting, fitting / number))
    return nearest if count // nearest <= MOST_ALONG_Y else count


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(properties, "L2_cache_size", 0) or 32 * 2**20


def overlapping(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may begin while the one before it ends, which its kernel waits for (`await_last`)."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"launch_pdl": True} if _driver_version() >= GRAPHS_OVERLAP else {}


@functools.cache
def _driver_version() -> int:
    """The version of CUDA that the driver has, 12030 for 12.3; 0 where it does not say."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@functools.cache
def _may_keep_code() -> bool:
    """AMD's code also depends on how much memory a tensor is part of; that of a Triton to come, on who knows what."""
    version = tuple(int(part) for part in str(triton_version()).split(".")[:2])
    return torch.version.hip is None and version <= KNOWN_TRITON


def inverse(number: int) -> int:
    """What makes division by a number from 1 to 2^31 - 1 a product, for `programs.divided`: magic * 64 + shift.

    n // number is n * magic >> shift for every n below 2^31: magic, of 32 bits, is 2^shift / number and less than 1
    more, which n times does not reach the next whole number. Both in one, since Triton would compile anew for a magic
    that 16 divides. Source: Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
    """
    shift = 31 + (number - 1).bit_length()
    return -(-(1 << shift) // number) << 6 | shift


def block_d(head_dim: int) -> int:
    """head_dim rounded up to the width of a tile: a power of two, at least 16 (the least that a tensor core takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def is_plain(q_shape: Sequence[int], k_shape: Sequence[int], causal: bool) -> bool:
    """Whether this is what most models do, which needs the fewest registers: causal, no groups, no columns of zeros."""
    if not causal or q_shape[1] != k_shape[1]:
        return False
    for width in WHOLE_TILES:  # noqa: SIM110 (torch.compile may hold a head_dim as a symbol: branches decide it)
        if q_shape[-1] == width:
            return True
    return False


def alignment(views: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """ALIGN of views (shape, strides): the largest power of two up to 16 that divides every stride but the last one's.

    From 16 on Triton sees it by itself. For a head_dim of 52 or 100 the strides are multiples of 4, and without being
    told a kernel would load one element at a time. A stride by which nothing is read may be anything.
    """
    used = (stride for shape, strides in views for size, stride in zip(shape[:-1], strides, strict=False) if size > 1)
    return math.gcd(16, *used)
