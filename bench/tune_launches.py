"""Runs the tuner's candidates on a GPU: compiled and judged against float64 first, then timed in turns."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from fastchargpt.attention import causal_attention
from fastchargpt.bench.tune import BrokenDevice
from fastchargpt.bench.tune_space import Place
from fastchargpt.kernels.tuning import Plan, forced
from fastchargpt.parity import attention_inputs, check_attention
from fastchargpt.timing import Timing, race

__all__ = ["GpuRig"]

TOKENS, WIDTH = 16_384, 384  # of one training step: what fills a GPU
CHECKED_HEADS = 2
DROPOUT = 0.1
TF32_EPS = 2.0**-10
Racer = Callable[..., Mapping[str, Timing]]


@dataclasses.dataclass
class GpuRig:
    """The device, and how much time a race gets."""

    device: torch.device
    seconds: float = 0.3  # of timing a race
    tokens: int = TOKENS
    width: int = WIDTH
    racer: Racer = race

    def problem(self, place: Place, plan: Plan, what: str) -> str | None:
        """Run a plan once and hold it against float64; the reason it cannot be used, or None.

        fp32 is judged in both precisions that an entry serves.

        Raises:
            BrokenDevice: the device computes no more.
        """
        try:
            for precision in _precisions(place):
                if reason := self._wrong(place, plan, what, TF32_EPS if precision == "high" else None):
                    return reason
        except Exception as error:  # whatever a compiler or a launch raises
            reason = _in_words(error)
            self._still_computes(reason)
            return reason
        return None

    def race(self, place: Place, plans: Mapping[str, Plan], what: str) -> Mapping[str, float]:
        """Median seconds of each plan, on the same tensors; the operator's own host code is timed, without autograd."""
        tensors = self._tensors(place, what)
        seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        options = (seed, place.head_dim**-0.5, True, DROPOUT if place.dropout else 0.0, None, None)

        def run(plan: Plan) -> object:
            with torch.no_grad(), forced(plan):
                if what == "backward":
                    return torch.ops.fastchargpt.attention_backward(*tensors, *options)
                return torch.ops.fastchargpt.attention_forward(*tensors, *options)

        if what == "backward":
            q, k, v, dout = tensors
            with torch.no_grad(), forced(next(iter(plans.values()))):
                out, lse = torch.ops.fastchargpt.attention_forward(q, k, v, *options)
            tensors = (dout, None, q, k, v, out, lse)
        calls = {name: functools.partial(run, plan) for name, plan in plans.items()}
        timings = self.racer(calls, self.device, seconds=self.seconds, warmup=3, min_rounds=15)
        return {name: timing.median for name, timing in timings.items()}

    def _tensors(self, place: Place, what: str) -> tuple[torch.Tensor | None, ...]:
        """q, k, v, and for a backward dout: as many heads and tokens as a training step has; one query for a decode."""
        heads, batch = max(1, self.width // place.head_dim), max(1, self.tokens // place.length)
        sizes = (1 if what == "decode" else batch, heads, place.length, place.head_dim)
        q, k, v, dout = (x.detach() for x in attention_inputs(*sizes, device=self.device, dtype=_dtype(place)))
        if what == "decode":
            q = q[:, :, -1:]
        return (q, k, v, dout) if what == "backward" else (q, k, v)

    def _wrong(self, place: Place, plan: Plan, what: str, eps: float | None) -> str | None:
        dropout_p = DROPOUT if place.dropout else 0.0
        length = place.length
        inputs = attention_inputs(1, CHECKED_HEADS, length, place.head_dim, device=self.device, dtype=_dtype(place))
        if what == "decode":  # one query sees every key: the last row of the causal square
            return self._wrong_decode(plan, inputs, eps)
        seed = torch.tensor([length], dtype=torch.int64, device=self.device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            from fastchargpt.kernels import flash

            scale = q.shape[-1] ** -0.5
            return flash.attention(q, k, v, scale=scale, causal=True, dropout_p=dropout_p, seed=seed)[0]

        with forced(plan):
            parity = check_attention(attend, inputs, dropout_p=dropout_p, seed=seed, eps=eps)
        self._wait()
        if parity.right:
            return None
        return (
            f"its errors against float64 are {parity.output:.2f} (output) and {parity.gradients:.2f} (gradients) times "
            "what plain PyTorch's own errors allow"
        )

    def _wrong_decode(self, plan: Plan, inputs: tuple[torch.Tensor, ...], eps: float | None) -> str | None:
        q, k, v = (x.detach() for x in inputs[:3])
        with forced(plan):
            got = causal_attention(q[:, :, -1:], k, v, backend="triton")
        self._wait()
        true, plain = (
            causal_attention(q.to(kind)[:, :, -1:], k.to(kind), v.to(kind), backend="naive")
            for kind in (torch.float64, q.dtype)
        )
        error, allowed = (float((x.double() - true).abs().max()) for x in (got, plain))
        slack = 4 * (eps or torch.finfo(q.dtype).eps) * float(true.abs().max())
        return None if error <= 2 * allowed + slack else f"its error against float64 is {error:.2e}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _still_computes(self, reason: str) -> None:
        """Raise BrokenDevice unless the device can still add two numbers."""
        try:
            torch.ones(1, device=self.device).add(1.0).item()
        except RuntimeError as error:
            raise BrokenDevice(f"after a candidate the GPU computes no more in this process ({reason})") from error


def _dtype(place: Place) -> torch.dtype:
    return torch.bfloat16 if place.dtype == "half" else torch.float32


def _precisions(place: Place) -> Iterator[str]:
    """Sets torch's matmul precision to each that an entry of this dtype serves, and back."""
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest",) if place.dtype == "half" else ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            yield precision
    finally:
        torch.set_float32_matmul_precision(before)


def _in_words(error: Exception) -> str:
    if {"required", "limit", "name"} <= vars(error).keys():  # Triton's OutOfResources
        needs = vars(error)
        return f"needs {needs['required']} of {needs['name']}, and this GPU has {needs['limit']} for a program"
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in this device's memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"does not compile or run: {type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"
