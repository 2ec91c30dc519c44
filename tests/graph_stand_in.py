"""CUDA graphs without a GPU: a CPU's operations recorded and replayed under the rules of a graph.

As on a GPU, recording changes nothing (what it had to do in order to know the shapes is undone), a replay runs the
same operations on the same memory with the same numbers, random draws go on in the generator, and reading a value
while recording is an error. So a rate baked in as a number, a tensor replaced instead of written, or a hidden
`.item()` shows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["RecordedGraphs"]

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}


class RecordedGraphs:
    """Serves where `CudaGraphs` would; counts what is asked of it."""

    def __init__(self) -> None:
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, body: Callable[[], None]) -> None:
        self.warm_ups += 1
        body()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        recorder, generator = _Recorder(), torch.get_rng_state()
        try:
            with recorder:
                body()
        finally:
            recorder.undo()
            torch.set_rng_state(generator)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # storages that were written, and what was in them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in READS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of CUDA's words")
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_flatten(value)[0]:
                    if isinstance(tensor, Tensor):
                        self._keep(tensor)
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, _tensors(result)))
        return result

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            for old, new in zip(recorded, _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
