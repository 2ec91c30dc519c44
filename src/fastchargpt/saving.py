"""What a run leaves in its out dir and takes up again: weights and everything else that its next step depends on.

A checkpoint is the same whether one process wrote it or several, with whole weights or in pieces: process 0 writes, and
every process reads, so the out dir must be one that all of them see.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastchargpt.batches import TokenBatches
from fastchargpt.checkpoint import Checkpoint, load_last_good, save_checkpoint
from fastchargpt.config import TrainConfig
from fastchargpt.corpus import Corpus
from fastchargpt.errors import CheckpointError, FastchargptError, TrainingError
from fastchargpt.faults import first_not_finite
from fastchargpt.model import GPT
from fastchargpt.parallel import Parallel
from fastchargpt.sharding import piece_like, whole_state
from fastchargpt.step import TrainStep

__all__ = ["Saves", "Scores"]


@dataclass
class Scores:
    """A run's validation losses, as far as they decide what becomes of it."""

    # exact validation loss at the last evaluation, nats per token, and the step it was at
    val_loss: float = math.inf
    evaluated_at: int = -1
    # the lowest, and its step
    best_val_loss: float = math.inf
    best_iteration: int = 0
    evaluations_without_gain: int = 0

    def note(self, val_loss: float, iteration: int) -> bool:
        """Take a new loss; whether it is the lowest."""
        self.val_loss, self.evaluated_at = val_loss, iteration
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_iteration, self.evaluations_without_gain = val_loss, iteration, 0
            return True
        self.evaluations_without_gain += 1
        return False

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values that `dataclasses.asdict` gave."""
        self.val_loss, self.best_val_loss = float(state["val_loss"]), float(state["best_val_loss"])
        self.best_iteration, self.evaluated_at = int(state["best_iteration"]), int(state["evaluated_at"])
        self.evaluations_without_gain = int(state["evaluations_without_gain"])


class Saves:
    """Saves a run to `last/` and `best/`, and takes it up from `last/`; with several processes, all of them call.

    Args:
        out_dir: the run's folder; None saves nothing.
        info: further facts (JSON values) to keep in each checkpoint.
        model, config, corpus, step, batches: the run's parts.
        parallel: the processes that share it.
        write: takes a line that people read.

    Attributes:
        scores: the run's validation losses.
        saved_at: the step that `last/` holds; -1 before the first save.
    """

    def __init__(
        self,
        out_dir: Path | None,
        info: Mapping[str, Any],
        *,
        model: GPT,
        config: TrainConfig,
        corpus: Corpus,
        step: TrainStep,
        batches: TokenBatches,
        parallel: Parallel,
        write: Callable[[str], None],
    ) -> None:
        self.out_dir, self.info = out_dir, dict(info)
        self.model, self.config, self.corpus, self.step, self.batches = model, config, corpus, step, batches
        self.scores = Scores()
        self.saved_at = -1
        self._parallel, self._write = parallel, write
        self._model_config = model.config

    def last_good(self) -> str:
        """A clause that names the last good checkpoint."""
        if self.out_dir is None or self.saved_at < 0:
            return "nothing was saved"
        return f"the last good checkpoint is {self.out_dir / 'last'}, of step {self.saved_at}"

    def save_best(self) -> None:
        """Save the weights alone, to `best/`."""
        if self.out_dir is not None:
            self._save(self.out_dir / "best", None, keep_previous=False)

    def save_last(self) -> None:
        """Save all that the rest of the run depends on, to `last/`.

        Raises:
            TrainingError: a weight is not finite.
        """
        if self.out_dir is None:
            return
        overflowed = first_not_finite(self.model, self._parallel)
        if overflowed is not None:  # the step that did it had a finite loss and gradient, so nothing has said so yet
            raise TrainingError(
                f"the weight {overflowed} is not finite after step {self.step.iteration - 1} (learning rate "
                f"{self.step.learning_rate:.3g}): lower --learning-rate; {self.last_good()}"
            )
        self._save(self.out_dir / "last", self._state(), keep_previous=True)
        self.saved_at = self.step.iteration

    def _save(self, folder: Path, state: dict[str, Any] | None, *, keep_previous: bool) -> None:
        weights = whole_state(self.model.state_dict(), keep=self._parallel.is_main)
        self._parallel.on_main(
            lambda: save_checkpoint(folder, self._checkpoint(weights, state), keep_previous=keep_previous)
        )

    def _checkpoint(self, weights: dict[str, Any], state: dict[str, Any] | None) -> Checkpoint:
        val_loss = self.scores.val_loss
        return Checkpoint(
            model_config=self._model_config,
            weights=weights,
            tokenizer_json=None if self.corpus.tokenizer is None else self.corpus.tokenizer.to_json(),
            train_config=self.config,
            trainer_state=state,
            info={
                **self.info,
                "iteration": self.step.iteration,
                "val_loss": val_loss if math.isfinite(val_loss) else None,
                "corpus": self.corpus.name,
                "corpus_tokens": [len(self.corpus.train), len(self.corpus.val)],
            },
        )

    def _state(self) -> dict[str, Any]:
        """Everything beside the weights that the rest of the run depends on."""
        generators = self._generators()
        return {
            "step": self.step.state_dict(),
            "batches": self.batches.state_dict(),
            **generators[0],
            **({"others": generators[1:]} if len(generators) > 1 else {}),
            **dataclasses.asdict(self.scores),
        }

    def _generators(self) -> list[dict[str, Any]]:
        """The state of torch's generators, which dropout draws from, on each process."""
        parallel = self._parallel
        rng = parallel.each(torch.get_rng_state())
        if parallel.device.type != "cuda":
            return [{"rng": state, "cuda_rng": []} for state in rng]
        if parallel.mode == "none":
            return [{"rng": rng[0], "cuda_rng": torch.cuda.get_rng_state_all()}]
        devices = parallel.each(torch.cuda.get_rng_state(parallel.device))
        return [{"rng": state, "cuda_rng": [device]} for state, device in zip(rng, devices, strict=True)]

    def resume(self) -> int:
        """Take up the run in `last/`, or in the save before it where that is damaged, which a line then says.

        Returns:
            The steps already taken.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model or corpus.
        """
        assert self.out_dir is not None, "a run without an out dir has nothing to resume"
        folder, parallel = self.out_dir / "last", self._parallel
        found: list[tuple[Checkpoint, str | None]] = []

        def read(*, repair: bool) -> None:
            device = "cpu" if parallel.mode == "fsdp" else parallel.device
            found.append(load_last_good(folder, device=device, with_trainer=True, repair=repair))

        parallel.on_main(lambda: read(repair=True))
        if not parallel.is_main:
            read(repair=False)
        checkpoint, damage = found[0]
        if damage is not None:
            self._write(
                f"{damage}; going on from the save before it, of step {checkpoint.info.get('iteration')} (the damaged "
                f"one is kept as {folder}.damaged)"
            )
        if checkpoint.model_config != self._model_config:
            raise CheckpointError(
                f"{folder} holds another model than the one asked for: resume with the flags it began with"
            )
        sizes = [len(self.corpus.train), len(self.corpus.val)]
        if checkpoint.info.get("corpus_tokens") != sizes:
            raise CheckpointError(
                f"{folder} was trained on {checkpoint.info.get('corpus_tokens')} training and validation tokens, and "
                f"the corpus {self.corpus.name} has {sizes}: resume with the --data it began with"
            )
        assert checkpoint.trainer_state is not None
        try:
            self._load(checkpoint.weights, checkpoint.trainer_state)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            if isinstance(error, FastchargptError):
                raise
            reason = str(error).splitlines()[0][:120] if str(error) else "no reason given"
            raise CheckpointError(
                f"{folder} holds the state of another kind of run ({type(error).__name__}: {reason}): it can be "
                "sampled from, not resumed"
            ) from None
        taken = self.step.iteration
        if parallel.largest(taken) != taken or parallel.largest(-taken) != -taken:
            raise CheckpointError(
                f"the processes of this run found different steps in {folder}: each must see the same out dir"
            )
        self.saved_at = taken
        return taken

    def _load(self, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: piece_like(weight, own[name]) if name in own else weight for name, weight in weights.items()}
        )
        self.step.load_state_dict(state["step"])
        self.batches.load_state_dict(state["batches"])
        self._load_generators(state)
        self.scores.load_state_dict(state)

    def _load_generators(self, state: dict[str, Any]) -> None:
        parallel = self._parallel
        saved = [state, *state.get("others", [])]
        if parallel.rank >= len(saved):  # the run had fewer processes, so this one's dropout has nothing to go on from
            torch.manual_seed((self.config.seed + 7919 * parallel.rank + 104_729 * self.step.iteration) % 2**63)
            return
        mine = saved[parallel.rank]
        torch.set_rng_state(mine["rng"])
        if not mine["cuda_rng"] or parallel.device.type != "cuda":
            return
        if parallel.mode == "none":
            torch.cuda.set_rng_state_all(mine["cuda_rng"][: torch.cuda.device_count()])
        else:
            torch.cuda.set_rng_state(mine["cuda_rng"][0], parallel.device)
