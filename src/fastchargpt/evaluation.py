"""Exact evaluation: a whole split, every token predicted once, the same figure every time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastchargpt.batches import TokenData, eval_batches
from fastchargpt.config import IGNORE_INDEX
from fastchargpt.native_step import NativeStep
from fastchargpt.parallel import Parallel
from fastchargpt.precision import Precision

__all__ = ["EVAL_TOKENS_PER_BATCH", "Evaluation", "evaluate"]

# enough tokens in a batch to fill the device, few enough to fit beside a training run
EVAL_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True)
class Evaluation:
    """A model's loss over a split."""

    # mean cross-entropy, in nats per token
    loss: float
    # tokens predicted
    tokens: int

    @property
    def bits_per_token(self) -> float:
        """The loss in bits; bits per character where a token is a character."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """e to the loss: the number of equally likely tokens that would be as surprising."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: TokenData,
    *,
    block_size: int,
    precision: Precision,
    max_batches: int | None = None,
    native: NativeStep | None = None,
    parallel: Parallel | None = None,
) -> Evaluation:
    """The mean loss over a split, read in windows of block_size that do not overlap.

    Args:
        model: `model(x, y)` returns `(logits, loss)` with the mean over targets that are not -1.
        tokens: the split, 1-D.
        block_size: tokens in a window: the context of its last prediction.
        precision: number format of the matrix products.
        native: the model's native step, which then computes the losses.
        max_batches: read only this many batches, evenly spaced over the split; None reads it whole.
        parallel: the processes that share the windows; each gets the mean over all of them.

    Raises:
        CorpusError: the split is shorter than two tokens.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        sums = torch.zeros(2, dtype=torch.float64)  # of the losses, of the targets
        rank, world_size = (0, 1) if parallel is None else (parallel.rank, parallel.world_size)
        batch_size = max(1, EVAL_TOKENS_PER_BATCH // block_size)
        if max_batches is None:
            batch_size *= world_size  # so that each process's share fills its device
        with precision.matmuls(), precision.autocast(device.type):
            for x, y in eval_batches(tokens, block_size, batch_size, device, max_batches, rank, world_size):
                targets = int((y != IGNORE_INDEX).sum())
                loss: Tensor = model(x, y)[1] if native is None else native.loss(x, y)
                if targets:  # a share of padding alone has no mean
                    sums[0] += loss.double().cpu() * targets
                    sums[1] += targets
    finally:
        model.train(was_training)
        if parallel is not None:
            parallel.settle(model)
    total, count = (sums if parallel is None else parallel.total(sums)).tolist()
    return Evaluation(loss=total / count, tokens=int(count))
