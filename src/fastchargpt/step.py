"""The one optimised training step that the trainer, the benchmarks and other people's loops share."""

import contextlib
import time
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastchargpt.averaging import WeightAverage
from fastchargpt.batches import TokenBatches
from fastchargpt.captured import CapturedStep, CudaGraphs, DeviceRates, Graphs
from fastchargpt.choices import choose_engine, choose_training_precision, graph_problem
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.model import GPT
from fastchargpt.native_step import NativeStep, native_update_problem
from fastchargpt.optim import make_adamw
from fastchargpt.parallel import Parallel
from fastchargpt.precision import Precision
from fastchargpt.sharding import local, sharded_state, whole_state

__all__ = ["TrainStep", "make_train_step"]


class TrainStep:
    """Forward, backward, clipping and optimiser, with gradient accumulation and scaling.

    Call it with a batch; it returns the loss without waiting for the device. `make_train_step` builds one.

    Attributes:
        iteration: steps taken.
        grad_norm: norm of the last gradient before clipping, a 0-d tensor; None when nothing is clipped.
        grad_norms: the norm of each parameter's, 1-D, in the order of `norm_names`; None when nothing is clipped.
        norm_names: the parameters that had a gradient.
        parallel: the processes that share the step.
        native: the native code that takes the step, or None where torch does.
        average: the averaged weights, or None where none are kept.
        compile_seconds: how long compiling took; None before it.
        was_compiled: whether the state last loaded is that of a compiled step.
        captured: the CUDA graphs that take the step, or None. What the caller changes behind it (the clipping, a
            module's switches) is not seen by a graph that is there already: `captured.reset()` after such a change.
        updating: whether the optimiser is at work; still True after an error that may have left an update half done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        grad_clip: float,
        gradient_accumulation_steps: int,
        compile: bool,
        learning_rate: Callable[[int], float] | None,
        native: NativeStep | None = None,
        graphs: Graphs | None = None,
        average: WeightAverage | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.grad_clip = grad_clip
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.iteration = 0
        self.grad_norm: Tensor | None = None
        self.grad_norms: Tensor | None = None
        self.norm_names: list[str] = []
        self.updating = False
        self._schedule = learning_rate
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names.get(id(p), f"parameter {number}") for number, p in enumerate(self._parameters)]
        self._device: torch.device = self._parameters[0].device
        self._device_type = self._device.type
        self._scaler = torch.amp.GradScaler(self._device_type, enabled=precision.needs_scaler)
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._eager_loss
        self.compile_seconds: float | None = None
        self.was_compiled = False
        self.native = native
        self.parallel = parallel or Parallel(device=self._parameters[0].device, reason="one process")
        self._module = self.parallel.replicate(model, native=native is not None)
        self._native_update = native is not None and native_update_problem(optimizer) is None
        self.average = average
        self.captured = None if graphs is None else CapturedStep(graphs)
        self._rates = None if self.captured is None else DeviceRates(optimizer, self.captured.reset)
        self._rate = 0.0  # the schedule's last value
        self.compile(compile)

    @property
    def device(self) -> torch.device:
        """Where the step is taken."""
        return self._device

    @property
    def compiled(self) -> bool:
        """Whether the forward and backward pass are compiled."""
        return self._is_compiled

    @property
    def settled(self) -> bool:
        """Whether the next steps are like the last: nothing is left to be captured."""
        return self.captured is None or self.captured.problem is not None or self.captured.captured > 0

    def compile(self, on: bool = True) -> None:
        """Compile the forward and backward pass from the next step on, or stop using what was compiled."""
        self._is_compiled = on
        self._loss = self._compiling(torch.compile(self._eager_loss)) if on else self._eager_loss
        if self.captured is not None:
            self.captured.reset()

    def _compiling(self, compiled: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The first call, in which torch compiles both passes: it is timed, and hands over to what it compiled."""

        def loss(x: Tensor, y: Tensor) -> Tensor:
            start = time.perf_counter()
            result = compiled(x, y)
            self.compile_seconds = time.perf_counter() - start
            self._loss = compiled
            return result

        return loss

    def _eager_loss(self, x: Tensor, y: Tensor) -> Tensor:
        with self.precision.autocast(self._device_type):
            loss: Tensor = self._module(x, y)[1]
        return loss

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step.

        Args:
            x: token ids, (B, T) int64; with gradient accumulation B is that of all micro-batches together.
            y: the tokens that follow, (B, T) int64.

        Returns:
            The mean loss before the step, in nats per token: a 0-d tensor on the device. Where several processes share
            the step, that of this one's sequences.

        Raises:
            ConfigError: B is not a multiple of gradient_accumulation_steps.
        """
        if self.captured is None:
            self._begin(x.shape[0])
            return self._end(self._native_step(x, y) if self.native is not None else self._torch_step(x, y))
        return self._captured_step(self._figures, x, y, key="batch")

    def take(self, batches: TokenBatches) -> Tensor:
        """Take one step on a supply's next batch: where the step is captured, its gather is part of the graph."""
        if self.captured is None or not batches.resident:
            return self(*batches.next_batch())

        def body(starts: Tensor) -> Tensor:
            return self._figures(*batches.gather(starts))

        return self._captured_step(body, batches.next_starts(), key=id(batches))

    def _begin(self, batch_size: int) -> None:
        parts = self.gradient_accumulation_steps
        if batch_size % parts:
            raise ConfigError(f"a batch of {batch_size} sequences cannot be split into {parts} equal micro-batches")
        groups = self.optimizer.param_groups
        if self._schedule is not None:
            self._rate = self._schedule(self.iteration)
            rates = [self._rate * group.get("lr_scale", 1.0) for group in groups]
            if self._rates is not None:
                self._rates.set_all(rates)
            else:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
        elif self._rates is not None:
            self._rates.collect()

    def _end(self, total: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        if self.average is not None:
            self.average.updates += 1
        return total

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has its averaged weights where the step keeps them; a no-op where it does not."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _captured_step(self, body: Callable[..., Tensor], *inputs: Tensor, key: Hashable) -> Tensor:
        assert self.captured is not None
        self._begin(inputs[0].shape[0])
        figures = self.captured(body, *inputs, device=self._device, key=(key, self.model.training))
        self.updating = False
        if self.grad_clip > 0.0:
            self.grad_norm, self.grad_norms = figures[1], figures[2:]
        return self._end(figures[0])

    def _figures(self, x: Tensor, y: Tensor) -> Tensor:
        """A whole step; its loss and, where there is clipping, the gradient's norm and each parameter's, (2 + P,)."""
        self.optimizer.zero_grad(set_to_none=True)  # a capture that failed may have left gradients behind
        figures = [self._torch_step(x, y).reshape(1)]
        self.optimizer.zero_grad(set_to_none=True)  # inside the graph, so that their memory is used again
        if self.grad_clip > 0.0:
            assert self.grad_norm is not None
            assert self.grad_norms is not None
            figures += [self.grad_norm.reshape(1), self.grad_norms]
        return torch.cat(figures)

    def _torch_step(self, x: Tensor, y: Tensor) -> Tensor:
        parts = self.gradient_accumulation_steps
        total: Tensor | None = None
        with self.precision.matmuls():
            for number, (x_part, y_part) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), start=1):
                with self.parallel.exchange(self._module, number == parts):
                    loss = self._loss(x_part, y_part)
                    if parts > 1:
                        loss = loss / parts
                    self._scaler.scale(loss).backward()
                total = loss.detach() if total is None else total + loss.detach()
            if self.grad_clip > 0.0:
                self._scaler.unscale_(self.optimizer)
                self._clip()
            self.updating = True
            self._scaler.step(self.optimizer)
            self._scaler.update()
            if self.average is not None:
                self.average.add()
            self.updating = False
        assert total is not None
        return total

    def _native_step(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.native is not None
        parts = self.gradient_accumulation_steps
        total = torch.zeros(())
        for number, (x_part, y_part) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            total += self.native(x_part, y_part, scale=1.0 / parts, add=number > 0) / parts
        if self.parallel.mode != "none":
            self.parallel.average([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        if not self._native_update:
            if self.grad_clip > 0.0:
                self._clip()
            self.updating = True
            self.optimizer.step()
        else:
            self.updating = True
            norms = self.native.update(self.optimizer, self.grad_clip)
            if self.grad_clip > 0.0:
                self.norm_names, self.grad_norms = self._names, norms
                self.grad_norm = torch.linalg.vector_norm(norms)
        if self.average is not None:
            self.average.add()
        self.updating = False
        return total

    @torch.no_grad()
    def _clip(self) -> None:
        """torch's clip_grad_norm_, bit for bit, but each parameter's norm is kept: it says which one overflowed."""
        gradients = [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        self.norm_names = [
            name for name, parameter in zip(self._names, self._parameters, strict=True) if parameter.grad is not None
        ]
        self.grad_norms = self.parallel.norms(torch.stack(torch._foreach_norm(gradients)))
        self.grad_norm = torch.linalg.vector_norm(self.grad_norms)
        nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip, self.grad_norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        if self._schedule is not None and self._rates is not None:
            return self._rate  # the group's own lies on the device
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / float(group.get("lr_scale", 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on; the same whether the run is shared or not.

        Of a run whose weights are in pieces every process must call it, and process 0 alone gets what it can use.
        """
        return {
            "iteration": self.iteration,
            "optimizer": whole_state((self._rates or self.optimizer).state_dict(), keep=self.parallel.is_main),
            "scaler": self._scaler.state_dict(),
            "compiled": self.compiled,
            **({} if self.average is None else {"average": self.average.state_dict(keep=self.parallel.is_main)}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is another optimiser's, or another model's.
        """
        self.optimizer.load_state_dict(sharded_state(state["optimizer"], self._parameters))
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                moment = name in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                if moment and not (isinstance(value, Tensor) and value.shape == parameter.shape):
                    raise ValueError(f"the optimiser's {name} is not of its parameter's shape")
        self.iteration = int(state["iteration"])
        self._scaler.load_state_dict(state["scaler"])
        self.was_compiled = state.get("compiled") is True
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def make_train_step(
    model: nn.Module,
    *,
    learning_rate: float | Callable[[int], float] = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    grad_clip: float = 1.0,
    gradient_accumulation_steps: int = 1,
    precision: str | Precision = "auto",
    compile: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    engine: Literal["auto", "native", "torch"] = "auto",
    cuda_graph: bool = False,
    ema_decay: float = 0.0,
    parallel: Parallel | None = None,
) -> TrainStep:
    """A training step for any model whose `model(x, y)` returns `(logits, loss)`.

    Args:
        model: on its device, in fp32.
        learning_rate: a number, or a function of the step's index, counted from 0.
        weight_decay: AdamW's, on matrices and embeddings.
        betas: AdamW's.
        grad_clip: largest norm of the gradient; 0 means no clipping.
        gradient_accumulation_steps: micro-batches that a batch is split into.
        precision: auto, fp32, tf32, bf16, fp16, or a `Precision`.
        compile: whether the forward and backward pass are compiled.
        optimizer: in place of AdamW; then weight_decay and betas are its own.
        engine: native takes the step in C++ code, for a `GPT` in float32 on a CPU; auto does where that serves.
        cuda_graph: whether the whole step, optimiser included, is captured in a CUDA graph and replayed by one launch.
            Then each step must do the same operations: a model that looks at its tensors' values cannot be captured.
        ema_decay: keeps an average of the weights, `step.average`, in which a step ago counts this much; 0 keeps none.
        parallel: the processes that share the step, each calling it with its own sequences.

    Raises:
        ConfigError: a value breaks a rule.
        BackendUnavailableError: the precision, the engine or the graph cannot be had here.
    """
    if gradient_accumulation_steps < 1:
        raise ConfigError(f"gradient_accumulation_steps must be at least 1, not {gradient_accumulation_steps}")
    if grad_clip < 0:
        raise ConfigError(f"grad_clip must not be negative, and it is {grad_clip}")
    device = next(model.parameters()).device
    schedule = learning_rate if callable(learning_rate) else None
    if optimizer is None:
        start = learning_rate(0) if callable(learning_rate) else learning_rate
        optimizer = make_adamw(model, weight_decay=weight_decay, learning_rate=start, betas=betas)
    chosen = (
        choose_training_precision(precision, model, engine, compile=compile)
        if isinstance(precision, str)
        else precision
    )
    native = choose_engine(engine, model, chosen, compile=compile).native
    if cuda_graph and (problem := graph_problem(model, optimizer, chosen)) is not None:
        raise BackendUnavailableError(f"cuda_graph=True cannot be served: {problem}")
    return TrainStep(
        model,
        optimizer,
        precision=chosen,
        grad_clip=grad_clip,
        gradient_accumulation_steps=gradient_accumulation_steps,
        compile=compile,
        learning_rate=schedule,
        native=NativeStep(model) if native and isinstance(model, GPT) else None,
        graphs=CudaGraphs(device) if cuda_graph else None,
        average=WeightAverage(model, ema_decay) if ema_decay > 0.0 else None,
        parallel=parallel,
    )
