"""A whole training step as one CUDA graph: captured once for each shape of its inputs, then replayed by one launch.

A graph repeats the same kernels on the same memory, so whatever changes from step to step must lie in tensors that stay
where they are: the inputs, the learning rates, the optimiser's counts. `CudaGraphs` holds every line that needs a GPU;
the tests replace it by one that records and replays a CPU's operations under a graph's rules.
"""

import functools
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CapturedStep", "CudaGraphs", "DeviceRates", "Graphs"]

# Steps taken one operation at a time before the capture: they make what is made once (optimiser state, cuBLAS
# workspaces, compiled kernels), which a capture may not do. torch's own examples take three.
WARM_UP_STEPS = 3
# A graph keeps the memory of its step; a run whose batches change shape all the time would fill the device with them.
MAX_GRAPHS = 4


class Graphs(Protocol):
    """What capturing asks of a device."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run the body as it will be captured, one operation at a time."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record what the body does, without doing it; the call that does it."""


class CudaGraphs:
    """torch.cuda's graphs. All of one object share their memory, as only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run the body on the stream of the capture: torch binds a gradient to the stream that it is first made on."""
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                body()
            before.wait_stream(self._stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Record the body; torch registers the device's generator, so that each replay draws further on."""
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                body()
        return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps a workspace for each stream that it has seen, 32 MiB on an H100."""
    return torch.cuda.Stream(device)


@dataclass
class _Recording:
    """The tensors that one shape's graph reads and writes, and how far it has come."""

    inputs: list[Tensor]
    output: Tensor | None = None
    warmed_up: int = 0
    replay: Callable[[], None] | None = None


class CapturedStep:
    """Takes steps through CUDA graphs where it can, and one operation at a time where it cannot.

    A failed capture changes nothing: recording does no work. The step is then taken the plain way, and so is every
    later one.

    Args:
        graphs: the device's.

    Attributes:
        problem: why steps are no longer captured, one clause; None while they are.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._recordings: dict[Hashable, _Recording] = {}
        self.problem: str | None = None

    def reset(self) -> None:
        """Forget all graphs, because memory that they read or write has been replaced or what they do has changed."""
        self._recordings.clear()

    @property
    def captured(self) -> int:
        """Graphs that are ready."""
        return sum(recording.replay is not None for recording in self._recordings.values())

    def __call__(self, body: Callable[..., Tensor], *inputs: Tensor, device: torch.device, key: Hashable) -> Tensor:
        """The body's result for these inputs.

        Args:
            body: takes the inputs on the device and returns one tensor; it must do the same operations each time.
            inputs: tensors on the host or the device.
            device: where the inputs go.
            key: whatever else makes the body do other operations than before.

        Returns:
            A tensor of its own, which later steps leave alone.
        """
        key = (key, *((tuple(x.shape), x.dtype) for x in inputs))
        if key not in self._recordings:
            if self.problem is None and len(self._recordings) == MAX_GRAPHS:
                self._give_up(f"the batches have had more than {MAX_GRAPHS} shapes")
            if self.problem is None:
                self._recordings[key] = _Recording([torch.empty_like(x, device=device) for x in inputs])
        recording = self._recordings.get(key)
        if recording is None or (self.problem is not None and recording.replay is None):
            return body(*(x.to(device) for x in inputs))
        for static, x in zip(recording.inputs, inputs, strict=True):
            # from pinned memory nobody waits for the copy; torch keeps that memory until it is done
            static.copy_(x.pin_memory() if static.is_cuda and not x.is_cuda else x, non_blocking=True)

        def run() -> None:
            result = body(*recording.inputs)
            if recording.output is None:
                recording.output = torch.empty_like(result)
            recording.output.copy_(result)

        if recording.replay is None and recording.warmed_up == WARM_UP_STEPS:
            try:
                recording.replay = self._graphs.capture(run)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0] if str(error) else type(error).__name__)
                return body(*recording.inputs)
        if recording.replay is None:
            recording.warmed_up += 1
            self._graphs.warm_up(run)
        else:
            recording.replay()
        assert recording.output is not None
        return recording.output.clone()

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        warnings.warn(f"steps go on without a CUDA graph: {problem}", RuntimeWarning, stacklevel=4)


class DeviceRates:
    """An optimiser's learning rates and counts as tensors on the device, where a graph reads them anew each time.

    Args:
        optimizer: one whose groups have `capturable`.
        changed: called when a loaded state has replaced the optimiser's tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, changed: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._changed = changed
        device = optimizer.param_groups[0]["params"][0].device
        self._rates = list(torch.zeros(len(optimizer.param_groups), device=device).unbind())
        self._capturable = [bool(group.get("capturable", False)) for group in optimizer.param_groups]
        self._move()
        optimizer.register_load_state_dict_post_hook(lambda _: self._loaded())

    def _loaded(self) -> None:
        self._move()
        self._changed()

    def _move(self) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = True
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(parameter.device, torch.float32)
        self.collect()

    def collect(self) -> None:
        """Take over the rates that somebody else has set as numbers."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                self.set(group, rate, float(group["lr"]))

    def set_all(self, rates: list[float]) -> None:
        """Set each group's rate, without waiting for the device."""
        for group, rate, value in zip(self._optimizer.param_groups, self._rates, rates, strict=True):
            self.set(group, rate, value)

    @staticmethod
    def set(group: dict[str, Any], rate: Tensor, value: float) -> None:
        """Set one group's rate."""
        rate.fill_(value)
        group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state as it would be without a graph, so that any run can go on from it."""
        state: dict[str, Any] = self._optimizer.state_dict()
        groups = [
            {**group, "lr": float(group["lr"]), "capturable": capturable}
            for group, capturable in zip(state["param_groups"], self._capturable, strict=True)
        ]
        return {**state, "param_groups": groups}
