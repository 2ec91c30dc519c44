"""Training and evaluation batches: the tokens live once on the device, and a batch is one gather."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastchargpt.config import IGNORE_INDEX
from fastchargpt.errors import CheckpointError, ConfigError, CorpusError

__all__ = ["TokenBatches", "TokenData", "eval_batches", "place_tokens"]

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
TokenData: TypeAlias = npt.NDArray[np.integer[Any]] | torch.Tensor

# On a GPU the tokens may take this share of the free memory; the rest is the model's.
RESIDENT_SHARE = 0.25
_SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}


def place_tokens(tokens: TokenData, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tokens as a 1-D tensor in their narrow dtype, on `device` when they fit there, else left where they are.

    uint16 is kept as the same bits in int16, uint32 in int32, because torch gathers those on every device; `widen`ing
    a batch undoes it. A memory map stays a map on the CPU. On a GPU the tokens may take a quarter of the free memory.

    Raises:
        CorpusError: not one-dimensional, or not integers.
    """
    device = torch.device(device)
    if isinstance(tokens, torch.Tensor):
        data = tokens
    else:
        array = np.asarray(tokens)
        if array.dtype.newbyteorder("=") in _SIGNED:
            array = array.astype(array.dtype.newbyteorder("="), copy=False).view(_SIGNED[array.dtype.newbyteorder("=")])
        elif array.dtype.kind not in "iu":
            raise CorpusError(f"tokens must be integers, not {array.dtype}")
        with warnings.catch_warnings():  # a read-only array or map is fine: nothing here writes to the tokens
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            data = torch.from_numpy(array)
    if data.ndim != 1 or data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
        raise CorpusError(f"tokens must be a one-dimensional run of integers, not {data.ndim}-dimensional {data.dtype}")
    if device.type == "cuda" and not _is_on(data, device):
        free, _ = torch.cuda.mem_get_info(device)
        return data.to(device) if data.numel() * data.element_size() <= free * RESIDENT_SHARE else data
    return data if device.type == "cpu" else data.to(device)


def _is_on(tokens: torch.Tensor, device: torch.device) -> bool:
    """Whether tokens lie on a device; "cuda" stands for the one of any number, and compares unequal to "cuda:0"."""
    return tokens.device.type == device.type and device.index in (None, tokens.device.index)


def _widen(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Gathered tokens as contiguous int64 on `device`."""
    if not _is_on(tokens, device):
        tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
    wide = tokens.to(torch.int64).contiguous()
    return wide.bitwise_and_(0xFFFF) if tokens.dtype == torch.int16 else wide


def _check_sizes(n_tokens: int, batch_size: int, block_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("block_size", block_size)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")
    if n_tokens < block_size + 1:
        raise CorpusError(
            f"a split of {n_tokens} tokens is too short for block_size {block_size}, which needs at least "
            f"{block_size + 1}: use a longer text, another val_fraction or a smaller block_size"
        )


class TokenBatches:
    """An endless supply of training batches; `next_batch()` gives (x, y), each (B, T) int64, y one token ahead of x.

    Args:
        tokens: 1-D tokens: an array, a memory map, or a tensor (one that `place_tokens` has placed is not copied).
        batch_size: sequences of one step over all ranks, B * world_size.
        block_size: tokens of one sequence, T.
        order: `random` draws offsets with replacement, as nanoGPT and the notebook do; `epochs` cuts the text into
            windows of T tokens, at a random phase, and visits each once in a random order before the next epoch.
        device: where the batches go.
        seed: seeds a generator of this object's own.
        generator: a CPU generator to draw from instead, used for nothing else. With neither, draws come from torch's
            global generator, whose state is then the caller's to save and restore.
        rank, world_size: each rank draws the same global batch and takes its own rows: the data of one process.

    Raises:
        ConfigError: an argument breaks a rule.
        CorpusError: fewer than block_size + 1 tokens.
    """

    def __init__(
        self,
        tokens: TokenData,
        *,
        batch_size: int,
        block_size: int,
        order: Literal["random", "epochs"] = "random",
        device: torch.device | str = "cpu",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.device = torch.device(device)
        self._data = place_tokens(tokens, self.device)
        _check_sizes(len(self._data), batch_size, block_size)
        if order not in ("random", "epochs"):
            raise ConfigError(f"order must be 'random' or 'epochs', not {order!r}")
        if seed is not None and generator is not None:
            raise ConfigError("give seed or generator, not both: a generator carries its own seed")
        if generator is not None and generator.device.type != "cpu":
            raise ConfigError(f"generator must be a CPU generator, not one on {generator.device}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in [0, world_size), not {rank} of {world_size}")
        if batch_size % world_size:
            raise ConfigError(f"batch_size {batch_size} must be divisible by world_size {world_size}")
        if world_size > 1 and seed is None and generator is None:
            raise ConfigError("several ranks draw the same batches only from the same seed: give seed or generator")
        self.batch_size, self.block_size, self.order = batch_size, block_size, order
        self._generator = generator if seed is None else torch.Generator().manual_seed(seed)
        share = batch_size // world_size
        self._rows = slice(rank * share, (rank + 1) * share)
        # Row i is tokens i to i + T: a view on the same memory, so one index_select is the whole gather.
        self._windows = self._data.unfold(0, block_size + 1, 1)
        self.epoch = 0  # epochs begun, in order="epochs"
        self._starts = torch.empty(0, dtype=torch.int64)  # this epoch's windows, in the order they are visited
        self._cursor = 0  # windows of this epoch already given out
        self._epoch_rng: torch.Tensor | None = None  # the generator's state before this epoch was drawn

    def next_batch(self) -> Batch:
        """The next (x, y), each (batch_size / world_size, block_size) int64, contiguous, on the device."""
        starts = self.next_starts()
        if self._data.device.type == "cuda":
            starts = starts.pin_memory().to(self._data.device, non_blocking=True)
        else:
            starts = starts.to(self._data.device)
        return self.gather(starts)

    def next_starts(self) -> torch.Tensor:
        """The next batch as the positions where its windows begin, (batch_size / world_size,) int64, on the CPU.

        Drawing them is all that a batch needs a generator for, and it is done on the CPU on every device: the same seed
        gives the same batches everywhere, and a checkpoint holds one small state.
        """
        starts = self._random_starts() if self.order == "random" else self._epoch_starts()
        return starts[self._rows]

    @property
    def resident(self) -> bool:
        """Whether the tokens lie where the batches go, so that `gather` stays on the device."""
        return _is_on(self._data, self.device)

    def gather(self, starts: torch.Tensor) -> Batch:
        """The (x, y) of windows that begin at `starts`, int64 and on the tokens' device."""
        window = self._windows.index_select(0, starts)  # [B, T + 1], narrow dtype
        return _widen(window[:, :-1], self.device), _widen(window[:, 1:], self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where the supply stands: ints, strings and a uint8 tensor, the same on every rank and for any world size."""
        if self.order == "epochs" and self.epoch:
            rng = self._epoch_rng
        else:
            rng = None if self._generator is None else self._generator.get_state()
        return {
            "order": self.order,
            "n_tokens": len(self._data),
            "block_size": self.block_size,
            "epoch": self.epoch,
            "cursor": self._cursor,
            "rng": None if rng is None else rng.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another order, text or block size, or damaged.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or state.keys() != own.keys():
            raise CheckpointError(f"the data cursor is damaged: it must have the fields {sorted(own)}")
        for name in ("order", "n_tokens", "block_size"):
            if state[name] != own[name]:
                raise CheckpointError(
                    f"the data cursor was saved with {name} {state[name]!r:.40}, and this run has {own[name]!r}: "
                    "resume with the same text and settings"
                )
        rng, epoch, cursor = state["rng"], state["epoch"], state["cursor"]
        if any(type(value) is not int or value < 0 for value in (epoch, cursor)) or (epoch and rng is None):
            raise CheckpointError("the data cursor is damaged: epoch and cursor must be counts, with a generator state")
        self.epoch, self._cursor, self._starts, self._epoch_rng = 0, 0, self._starts[:0], None
        if rng is None:
            return
        # The global generator is not ours to set: an epoch drawn from it is drawn again from a copy.
        generator = torch.Generator() if self._generator is None else self._generator
        try:
            generator.set_state(rng)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the data cursor is damaged: its generator state is not one ({error})") from None
        if epoch:
            self._epoch_rng = rng.clone()
            self._starts = self._draw_epoch(generator)
        if cursor > len(self._starts):
            raise CheckpointError(f"the data cursor is damaged: {cursor} of {len(self._starts)} windows given out")
        self.epoch, self._cursor = epoch, cursor

    def _random_starts(self) -> torch.Tensor:
        # The same call as nanoGPT's and the notebook's, so the same seed gives the same batches.
        return torch.randint(len(self._data) - self.block_size, (self.batch_size,), generator=self._generator)

    def _epoch_starts(self) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        missing = self.batch_size
        while missing:  # once, or twice when a batch straddles two epochs
            if self._cursor == len(self._starts):
                self._begin_epoch()
            part = self._starts[self._cursor : self._cursor + missing]
            self._cursor += len(part)
            missing -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def _begin_epoch(self) -> None:
        self._epoch_rng = torch.get_rng_state() if self._generator is None else self._generator.get_state()
        self._starts = self._draw_epoch(self._generator)
        self._cursor = 0
        self.epoch += 1

    def _draw_epoch(self, generator: torch.Generator | None) -> torch.Tensor:
        n, block = len(self._data), self.block_size
        # A phase that leaves at least one whole window.
        phase = int(torch.randint(min(block, n - block), (), generator=generator))
        count = (n - 1 - phase) // block
        return torch.randperm(count, generator=generator).mul_(block).add_(phase)


def eval_batches(
    tokens: TokenData,
    block_size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The whole split, in order: every token but the first, which has no context, is a target exactly once.

    With `max_batches` only so many of the batches, evenly spaced, for an estimate of a long split.

    Of several ranks each takes its rows of every batch, all equally many: ceil(B / world_size).

    Every batch has the same shape, (B, T) int64 with B = min(batch_size, windows of the split), so that a compiled
    model compiles once. What is missing at the end is padded: inputs with 0, targets with IGNORE_INDEX. The exact mean
    is therefore sum of losses / count of targets >= 0, over all batches, and not the mean of the batches' means.

    Raises:
        ConfigError: a size is not a positive integer.
        CorpusError: fewer than 2 tokens, or not 1-D integers.
    """
    device = torch.device(device)
    data = place_tokens(tokens, device)
    _check_sizes(max(len(data), block_size + 1), batch_size, block_size)
    targets = len(data) - 1
    if targets < 1:
        raise CorpusError(f"a split of {len(data)} tokens has nothing to predict: it needs at least 2")
    rows = min(batch_size, -(-targets // block_size))
    step = rows * block_size
    share = -(-rows // world_size)

    def batches() -> Iterator[Batch]:
        starts: Sequence[int] = range(0, targets, step)
        if max_batches is not None and max_batches < len(starts):
            starts = [starts[number * len(starts) // max_batches] for number in range(max_batches)]
        for start in starts:
            first, last = (min(start + step, start + number * share * block_size) for number in (rank, rank + 1))
            run = _widen(data[first : last + 1], device)
            missing = share * block_size + 1 - len(run)
            x = torch.nn.functional.pad(run, (0, missing))[:-1] if missing else run[:-1]
            y = torch.nn.functional.pad(run, (0, missing), value=IGNORE_INDEX)[1:] if missing else run[1:]
            yield x.view(share, block_size), y.view(share, block_size)

    return batches()
