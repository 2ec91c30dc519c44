"""Training and sampling in small, as the default path does them, judged against float64."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastchargpt.config import GPTConfig
from fastchargpt.engines import EngineConfig
from fastchargpt.generation import generate_tokens
from fastchargpt.model import GPT
from fastchargpt.native import native_problem
from fastchargpt.precision import Precision
from fastchargpt.sampling import SamplingConfig
from fastchargpt.step import TrainStep, make_train_step

__all__ = ["Rehearsal", "rehearse"]

STEPS, TOKENS = 5, 24
# logits closer than this are a tie that rounding decides
TIE = 1e-4
# by how much a loss may differ from float64's
TOLERANCE = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 3e-2, "fp16": 3e-2}
CONFIG = GPTConfig.family("modern", vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of it."""

    # whether native code took the steps and wrote the tokens
    native_step: bool
    native_decoder: bool
    # largest difference of a loss from float64's, in nats, and what is allowed
    loss_error: float
    tolerance: float
    # loss before the first and the last step
    first_loss: float
    last_loss: float
    # tokens written with the cache that the model, reading the whole text at once, does not find likeliest
    wrong_tokens: int

    @property
    def right(self) -> bool:
        """Whether training and sampling work here."""
        return self.loss_error <= self.tolerance and self.last_loss < self.first_loss and self.wrong_tokens == 0


def rehearse(device: torch.device, precision: Precision) -> Rehearsal:
    """Train a small model for a few steps and let it write a few tokens.

    Raises:
        BackendUnavailableError, RuntimeError: whatever the default path runs into here.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1)
        model = GPT(CONFIG).to(device)
        rows = torch.randint(CONFIG.vocab_size, (8, CONFIG.block_size + 1)).to(device)
    truth = copy.deepcopy(model).double()
    truth.set_attention("naive")
    step = make_train_step(model, precision=precision)
    found = _losses(step, rows)
    exact = _losses(make_train_step(truth, precision="fp32", engine="torch"), rows)
    model.eval()
    greedy = SamplingConfig(max_new_tokens=TOKENS, top_k=1)
    written = generate_tokens(model, rows[:2, :4], greedy, EngineConfig())
    return Rehearsal(
        native_step=step.native is not None,
        native_decoder=native_problem(model) is None,
        loss_error=max(abs(a - b) for a, b in zip(found, exact, strict=True)),
        tolerance=TOLERANCE[precision.name],
        first_loss=found[0],
        last_loss=found[-1],
        wrong_tokens=_unlikely(model, written),
    )


def _losses(step: TrainStep, rows: Tensor) -> list[float]:
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return [float(step(x, y)) for _ in range(STEPS)]


@torch.no_grad()
def _unlikely(model: GPT, written: Tensor) -> int:
    logits = model(written[:, :-1], written[:, 1:])[0][:, -TOKENS:]
    chosen = logits.gather(2, written[:, -TOKENS:, None])[..., 0]
    return int((logits.amax(dim=2) - chosen > TIE).sum())
