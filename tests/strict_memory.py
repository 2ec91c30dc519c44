"""What the strict interpreter knows about memory: what belongs to an argument, who touched it, what was never set.

`LaunchMemory` shadows the tensors of one kernel launch, element by element, and refuses

- an access to an address that no argument owns: past the end, before the start, or between the rows of a strided view;
- a store to an element that another program of the same launch stored or loaded, and a load of an element that another
  program stored: programs run in no order on a GPU, so either is a race whatever order it happened to take here.

`poisoned_empty` and `with_margins` need no interpreter: they serve the same tests on a real GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Guarded", "LaunchMemory", "OutOfBoundsError", "RaceError", "StrictError", "poisoned_empty", "with_margins"]


class StrictError(AssertionError):
    """A kernel did something that a GPU would punish and Triton's own interpreter lets pass."""


class OutOfBoundsError(StrictError):
    """A load or store touched an address that no tensor argument owns."""


class RaceError(StrictError):
    """Two programs of one launch (or two lanes of one store) meet at one address and at least one of them stores."""


NOBODY, MANY = -1, -2  # in `writer` and `reader`: no program yet; more than one program


class _Region:
    """The shadow of one storage: per `unit` bytes, whether an argument owns them and which program touched them."""

    def __init__(self, storage: torch.UntypedStorage, unit: int) -> None:
        self.start, self.unit = storage.data_ptr(), unit
        units = storage.nbytes() // unit
        self.owner = np.full(units, NOBODY, np.int16)  # index into `names`
        self.writer = np.full(units, NOBODY, np.int32)
        self.reader = np.full(units, NOBODY, np.int32)
        self.names: list[str] = []

    def own(self, name: str, tensor: torch.Tensor) -> None:
        """Mark exactly the elements of a view, gaps between its rows left out."""
        factor = tensor.element_size() // self.unit
        first = tensor.storage_offset() * factor
        shape = (*tensor.shape, factor)
        strides = (*(stride * factor for stride in tensor.stride()), 1)
        view = np.lib.stride_tricks.as_strided(self.owner[first:], shape, [2 * stride for stride in strides])
        view[...] = len(self.names)
        self.names.append(name)


class LaunchMemory:
    """The tensor arguments of one launch, by name, and what its programs have done to them."""

    def __init__(self, kernel: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.kernel = kernel
        self.program, self.program_id = 0, (0, 0, 0)  # the one that is running, set by the executor
        storages: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors:
            if tensor.numel():
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.regions = []
        for views in storages.values():
            region = _Region(views[0][1].untyped_storage(), min(tensor.element_size() for _, tensor in views))
            for name, tensor in views:
                region.own(name, tensor)
            self.regions.append(region)

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        """Check the active lanes of a load, then note this program as their reader."""
        for region, units in self._locate(addresses, itemsize, "load"):
            writer = region.writer[units]
            if (stale := (writer != NOBODY) & (writer != self.program)).any():
                self._race("loads what program", region, units[stale][0], writer[stale][0], "stored")
            reader = region.reader[units]
            region.reader[units] = np.where((reader == NOBODY) | (reader == self.program), self.program, MANY)

    def prefetch(self, addresses: np.ndarray, itemsize: int) -> None:
        """Check the active lanes of a prefetch, which reads nothing that could be seen."""
        for _ in self._locate(addresses, itemsize, "prefetch"):
            pass

    def store(self, addresses: np.ndarray, itemsize: int) -> None:
        """Check the active lanes of a store, then note this program as their writer."""
        for region, units in self._locate(addresses, itemsize, "store"):
            writer, reader = region.writer[units], region.reader[units]
            if (taken := (writer != NOBODY) & (writer != self.program)).any():
                self._race("stores where program", region, units[taken][0], writer[taken][0], "stored")
            if (seen := (reader != NOBODY) & (reader != self.program)).any():
                self._race("stores where program", region, units[seen][0], reader[seen][0], "loaded")
            region.writer[units] = self.program

    def unique_bytes(self) -> tuple[int, int]:
        """Bytes loaded and bytes stored so far, however often."""
        loaded = sum(int((region.reader != NOBODY).sum()) * region.unit for region in self.regions)
        stored = sum(int((region.writer != NOBODY).sum()) * region.unit for region in self.regions)
        return loaded, stored

    def _locate(self, addresses: np.ndarray, itemsize: int, what: str) -> Iterator[tuple[_Region, np.ndarray]]:
        """Split addresses by storage, as indices of units; every one must be owned by an argument."""
        if not addresses.size:
            return
        missing = np.ones(addresses.shape, bool)
        for region in self.regions:
            offset = addresses - np.uint64(region.start)  # wraps to something huge for addresses before the start
            inside = offset <= np.uint64(max(region.owner.size * region.unit - itemsize, 0))
            if not inside.any():
                continue
            missing &= ~inside
            units = (offset[inside] // np.uint64(region.unit)).astype(np.int64)
            if itemsize > region.unit:
                units = (units[:, None] + np.arange(itemsize // region.unit)).ravel()
            if (foreign := region.owner[units] == NOBODY).any():
                self._out_of_bounds(what, foreign, region.start + int(units[foreign][0]) * region.unit)
            yield region, units
        if missing.any():
            self._out_of_bounds(what, missing, int(addresses[missing][0]))

    def _out_of_bounds(self, what: str, lanes: np.ndarray, address: int) -> None:
        where = "no tensor argument has any element"
        if self.regions:
            near = min(self.regions, key=lambda r: max(r.start - address, address - r.start - r.owner.size * r.unit))
            index = (address - near.start) // near.unit
            where = (
                f"the first at element {index} of the storage of {' and '.join(near.names)}, which owns no such element"
            )
        raise OutOfBoundsError(
            f"{self.kernel}: {what} out of bounds in {int(lanes.sum())} lane(s) of program {self.program_id}, {where}"
        )

    def _race(self, does: str, region: _Region, unit: int, other: int, did: str) -> None:
        who = "several others" if other == MANY else f"number {other}"
        name = region.names[region.owner[unit]]
        raise RaceError(
            f"{self.kernel}: program {self.program_id} {does} {who} {did}, at element {unit} of the storage of {name}"
        )


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its kin allocate with NaN (or the largest integer), on any device.

    Torch has this built in as a companion of its deterministic mode; warn_only keeps that mode from refusing operators.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


class Guarded(NamedTuple):
    """A tensor that lives in the middle of a larger buffer whose every other byte is known."""

    tensor: torch.Tensor
    buffer: torch.Tensor  # uint8
    owned: torch.Tensor  # bool per byte of the buffer: does it belong to the tensor?

    def assert_intact(self) -> None:
        """Raise unless every byte around (and between the rows of) the tensor is as it was."""
        changed = (self.buffer != GUARD_BYTE) & ~self.owned
        if changed.any():
            where = changed.nonzero().flatten()
            first = int(where[0]) - int(self.owned.nonzero()[0])
            raise StrictError(f"{len(where)} guard byte(s) changed, the first {first} bytes from the tensor's start")

    def assert_written(self) -> None:
        """Raise if any element still holds the guard pattern, as it does in a fresh `with_margins(..., fill=False)`."""
        fresh = torch.full((self.tensor.element_size(),), GUARD_BYTE, dtype=torch.uint8, device=self.tensor.device)
        left = (self.tensor.contiguous().view(torch.uint8).view(-1, len(fresh)) == fresh).all(1)
        if left.any():
            raise StrictError(f"{int(left.sum())} of {left.numel()} elements were never written")


GUARD_BYTE = 0xFF  # a NaN in every float type, -1 in every integer type


def with_margins(like: torch.Tensor, *, margin: int = 256, fill: bool = True) -> Guarded:
    """A tensor of the shape, strides, dtype and device of `like`, with `margin` guard bytes on both sides.

    With `fill` it holds the values of `like` (an input), without it the guard pattern (an output to be written).
    """
    if margin % 64:
        raise ValueError(f"margin must be a multiple of 64 bytes, to keep the alignment of the tensor; got {margin}")
    size = like.element_size()
    span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    length = (2 * margin + span * size + 63) // 64 * 64
    buffer = torch.full((length,), GUARD_BYTE, dtype=torch.uint8, device=like.device)
    owned = torch.zeros(length // size, size, dtype=torch.bool, device=like.device)
    owned.as_strided((*like.shape, size), (*(s * size for s in like.stride()), 1), margin).fill_(True)
    tensor = buffer.view(like.dtype).as_strided(like.shape, like.stride(), margin // size)
    if fill:
        tensor.copy_(like)
    return Guarded(tensor, buffer, owned.flatten())
