"""The processes that share a run: who they are, what they tell each other, and torch's two ways to share the work.

`ddp` keeps the whole model on every process and averages the gradients; `fsdp` keeps a piece of every weight, of its
gradient and of its optimiser state on each. Both share out the batch that a single process would draw, so the losses
are those of a single process. A run of one process imports nothing of torch.distributed, and every method passes its
argument through.

Host-side figures (signals, evaluations, errors) travel by gloo, tensors of a GPU by NCCL.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fastchargpt import errors
from fastchargpt.errors import BackendUnavailableError, ConfigError, FastchargptError
from fastchargpt.precision import choose_device

__all__ = ["Parallel", "ParallelMode", "open_parallel"]

ParallelMode = Literal["none", "ddp", "fsdp"]


class Parallel:
    """One process's view of a run that several may share; `open_parallel` makes it.

    Attributes:
        mode: none where the run has one process.
        rank, world_size: this process's number, and how many there are.
        device: where this process computes.
        reason: a clause on why the run is shared, or not.
    """

    def __init__(
        self, mode: ParallelMode = "none", *, device: torch.device, rank: int = 0, world_size: int = 1, reason: str
    ) -> None:
        self.mode, self.rank, self.world_size, self.device, self.reason = mode, rank, world_size, device, reason
        self._opened = False  # whether the process group is ours to close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # After an error the group is left to the end of the process: the others notice that it is gone only once its
        # message is out, and nothing waits for those that are stuck.
        if kind is None:
            self.close()

    def close(self) -> None:
        """Leave the process group, where this object joined it."""
        if self._opened:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._opened = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def describe(self) -> str:
        """The choice and its reason, for the log."""
        if self.mode == "none":
            return f"parallel none: {self.reason}"
        backend = "NCCL" if self.device.type == "cuda" else "gloo"
        threads = f", {torch.get_num_threads()} thread(s) each" if self.device.type == "cpu" else ""
        return f"parallel {self.mode}: {self.world_size} processes by {backend}{threads}; {self.reason}"

    def share(self, batch_size: int, accumulation: int) -> tuple[int, int]:
        """What one process takes of a step: (sequences in a micro-batch, micro-batches), neither above the run's own.

        Micro-batches are shared out first, as nanoGPT does, then the sequences of each.

        Raises:
            ConfigError: the step cannot be shared equally.
        """
        common = math.gcd(accumulation, self.world_size)
        rest = self.world_size // common
        if batch_size % rest:
            raise ConfigError(
                f"{self.world_size} processes cannot share a step of {accumulation} x {batch_size} sequences equally: "
                f"make batch_size or gradient_accumulation_steps a multiple of {self.world_size}"
            )
        return batch_size // rest, accumulation // common

    # what the processes tell each other; every one of them must call at the same time

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place, on the tensor's device."""
        if self.mode != "none":
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, in place, on the tensor's device."""
        return self.total(values).div_(self.world_size) if self.mode != "none" else values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.mode == "none":
            return number
        import torch.distributed as dist

        value = torch.tensor(int(number))  # a bool, too, as a number: all must send the same type
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def each(self, value: Tensor) -> list[Tensor]:
        """Every process's tensor, in the order of their numbers; a host tensor of the same shape on each."""
        if self.mode == "none":
            return [value]
        import torch.distributed as dist

        found = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(found, value)
        return found

    def on_main(self, act: Callable[[], object]) -> None:
        """Do something on process 0 alone; the others wait, and an error of this package is raised on all of them."""
        if self.mode == "none":
            act()
            return
        import torch.distributed as dist

        error: FastchargptError | None = None
        if self.is_main:
            try:
                act()
            except FastchargptError as caught:
                error = caught
        said = b"" if error is None else f"{type(error).__name__}\n{error}".encode()
        length = torch.tensor(len(said))
        dist.broadcast(length, 0)
        if not length:
            return
        if error is not None:
            dist.broadcast(torch.tensor(list(said), dtype=torch.uint8), 0)
            raise error
        letters = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        name, _, sentence = bytes(letters.tolist()).decode().partition("\n")
        raise (getattr(errors, name) if name in errors.__all__ else FastchargptError)(sentence)

    # how the model and its gradients are shared

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Under fsdp, cut every weight into pieces, in place; before the optimiser is made.

        Weights stay float32 and so do the gradients that are summed; the products' format is left to autocast, as in a
        run of one process, so that every mode gives the same numbers. (A MixedPrecisionPolicy would halve what is
        gathered, and run norms, rotations and the loss in 16 bits too.)
        """
        if self.mode != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def settle(self, model: nn.Module) -> None:
        """Under fsdp, let go of the weights that a forward pass without a backward pass leaves gathered.

        The next pass would take them for the present ones, whatever has become of the pieces.
        """
        if self.mode == "fsdp":
            model.reshard()  # type: ignore[operator]

    def replicate(self, model: nn.Module, *, native: bool) -> nn.Module:
        """Under ddp, process 0's weights for all, and what to call in the model's place; else the model itself.

        Args:
            model: on its device.
            native: whether gradients come from native code, and `average` is called for them.
        """
        if self.mode != "ddp":
            return model
        if native:
            import torch.distributed as dist

            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), 0)
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        # the rotary table, the one buffer, never changes; how to say so got another name in torch 2.13
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **buffers)

    def exchange(self, module: nn.Module, on: bool) -> contextlib.AbstractContextManager[object]:
        """Around a micro-batch's forward and backward pass: gradients are exchanged in it, or only added up."""
        if self.mode == "fsdp":
            module.set_requires_gradient_sync(on)  # type: ignore[operator]
        elif self.mode == "ddp" and not on:
            skip: contextlib.AbstractContextManager[object] = module.no_sync()  # type: ignore[operator]
            return skip
        return contextlib.nullcontext()

    def average(self, gradients: Sequence[Tensor]) -> None:
        """The mean over the processes, in place, sent as one flat tensor; under ddp with native code."""
        if self.mode == "none":
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        parts = self.mean(flat).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(list(gradients), [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def norms(self, norms: Tensor) -> Tensor:
        """The norms of whole gradients from those of this process's pieces."""
        return self.total(norms.square()).sqrt() if self.mode == "fsdp" else norms

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error is torch's way to say that another process is gone."""
        if self.mode == "none":
            return False
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or "gloo" in str(error)


def open_parallel(mode: Literal["auto", "ddp", "fsdp", "none"] = "auto", device: str = "auto") -> Parallel:
    """Join the processes that a launcher such as torchrun started, if it did.

    Args:
        mode: auto is ddp where there are several processes.
        device: as in `TrainConfig`; on GPUs each process takes the one of its LOCAL_RANK.

    Raises:
        ConfigError: the mode does not fit how the process was started.
        BackendUnavailableError: there are more processes than GPUs, or they cannot reach each other.
    """
    if mode not in ("auto", "ddp", "fsdp", "none"):
        raise ConfigError(f"parallel must be auto, ddp, fsdp or none, not {mode!r}")
    world_size = _number("WORLD_SIZE", 1)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and (world_size > 1 or mode in ("ddp", "fsdp")):
        asked = f"WORLD_SIZE is {world_size}" if world_size > 1 else f"parallel={mode} shares a run among processes"
        alone = "" if world_size > 1 else ", or say --parallel=auto"
        raise ConfigError(
            f"{asked}, and no launcher gave this one a RANK: start it with torchrun --nproc-per-node=N{alone}"
        )
    if mode == "none" and world_size > 1:
        raise ConfigError(
            f"parallel=none would make {world_size} runs of the same kind in one out dir: leave it out, or start "
            "one process without torchrun"
        )
    if mode == "none" or (mode == "auto" and world_size == 1):
        reason = "asked for" if mode == "none" else "one process"
        return Parallel(device=choose_device(device), reason=reason)
    import torch.distributed as dist

    if not dist.is_available():
        raise BackendUnavailableError(
            "this torch is built without torch.distributed: start one process, without torchrun"
        )
    place = _device(device)
    shared = Parallel(
        "ddp" if mode == "auto" else mode,
        device=place,
        rank=_number("RANK", 0),
        world_size=world_size,
        reason=f"WORLD_SIZE is {world_size}" if mode == "auto" else "asked for",
    )
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        try:
            if place.type == "cuda":
                dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
            else:
                dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BackendUnavailableError(
                f"the {world_size} processes of this run could not reach each other ({reason}): start all of them with "
                "one torchrun command a machine"
            ) from error
        shared._opened = True
    return shared


def _device(name: str) -> torch.device:
    """This process's device among those of a machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = choose_device(name)
    if device.type == "cuda":
        here, count = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        if ":" in name:
            raise ConfigError(f"each process of a shared run takes a GPU of its own: use device=cuda, not {name}")
        if here > count:
            raise BackendUnavailableError(
                f"there are {here} processes on this machine and {count} GPU(s): use --nproc-per-node={count}, or "
                "--device=cpu"
            )
        return torch.device("cuda", _number("LOCAL_RANK", 0))
    if device.type != "cpu":
        raise BackendUnavailableError(f"a run cannot be shared on {device.type}: use --device=cpu, or one process")
    return device


def _number(variable: str, otherwise: int) -> int:
    value = os.environ.get(variable, str(otherwise))
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {variable} must be a count, not {value!r:.40}")
    return int(value)
