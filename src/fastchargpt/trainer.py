"""The training loop: batches in, losses out, checkpoints on the way."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastchargpt.attention import explain_attention
from fastchargpt.batches import TokenBatches, place_tokens
from fastchargpt.checkpoint import Checkpoint, load_last_good, save_checkpoint
from fastchargpt.choices import choose_compile, choose_engine, choose_graph, choose_training_precision
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.corpus import Corpus
from fastchargpt.determinism import check_deterministic, deterministic_algorithms
from fastchargpt.errors import CheckpointError, FastchargptError, TrainingError
from fastchargpt.evaluation import EVAL_TOKENS_PER_BATCH, evaluate
from fastchargpt.faults import NumberWatch, first_not_finite, is_out_of_memory
from fastchargpt.metrics import MetricsLogger
from fastchargpt.model import GPT
from fastchargpt.optim import learning_rate_at, make_optimizer
from fastchargpt.precision import choose_device
from fastchargpt.signals import StopSignals
from fastchargpt.step import make_train_step

__all__ = ["TrainResult", "Trainer"]

Stopped = Literal["finished", "target", "patience", "SIGINT", "SIGTERM"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    # optimiser steps taken, those before a resume included
    iterations: int
    # exact validation loss at the last evaluation, nats per token
    val_loss: float
    # the lowest of them, and the step it was at
    best_val_loss: float
    best_iteration: int
    # wall-clock seconds of this call
    seconds: float
    # why it ended: finished, target, patience, or the signal's name
    stopped: Stopped


class Trainer:
    """Trains one GPT on one corpus.

    Args:
        model_config: the model; its vocab_size must be at least the corpus's.
        config: how it is trained.
        corpus: the tokens.
        out_dir: where `last/` and `best/` are saved; None saves nothing.
        info: further facts (JSON values) to keep in each checkpoint.
        loggers: whatever takes `.log(dict, step=)`.
        log: takes each line that people read; the forms `step N: ...` and `iter N: ...` are nanoGPT's.
        progress: whether a tqdm bar is drawn.

    Raises:
        ConfigError, CorpusError, BackendUnavailableError: the parts do not fit together, or not here.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        config: TrainConfig,
        corpus: Corpus,
        *,
        out_dir: Path | None = None,
        info: Mapping[str, Any] | None = None,
        loggers: Sequence[MetricsLogger] = (),
        log: Callable[[str], None] = print,
        progress: bool = False,
    ) -> None:
        self.config, self.corpus, self.out_dir, self.info = config, corpus, out_dir, dict(info or {})
        self._loggers, self._log, self._progress = loggers, log, progress
        self.device = choose_device(config.device)
        if config.deterministic:
            check_deterministic(self.device, config.compile)
        self.compile = choose_compile(
            "off" if config.deterministic and self.device.type == "cuda" else config.compile,
            self.device,
            config.max_iters,
        )
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(self.device)
        self.model.set_attention(config.attention)
        self.model.checkpoint_activations = config.checkpoint_activations
        self.precision = choose_training_precision(
            config.precision, self.model, config.engine, compile=config.compile == "on"
        )
        self._train_tokens, self._val_tokens = (
            place_tokens(corpus.train, self.device),
            place_tokens(corpus.val, self.device),
        )
        self.batches = TokenBatches(
            self._train_tokens,
            batch_size=config.batch_size * config.gradient_accumulation_steps,
            block_size=model_config.block_size,
            order=config.order,
            device=self.device,
            seed=config.seed,
        )
        self.engine = choose_engine(config.engine, self.model, self.precision, compile=self.compile.on)
        optimizer = make_optimizer(self.model, config)
        self.graph = choose_graph(
            config.cuda_graph,
            self.model,
            optimizer,
            self.precision,
            tokens=config.batch_size * model_config.block_size,
            deterministic=config.deterministic,
        )
        self.step = make_train_step(
            self.model,
            optimizer=optimizer,
            learning_rate=lambda iteration: learning_rate_at(iteration, config),
            grad_clip=config.grad_clip,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            precision=self.precision,
            compile=self.compile.on,
            engine="native" if self.engine.native else "torch",
            cuda_graph=self.graph.on,
        )
        self.val_loss = self.best_val_loss = math.inf
        self.best_iteration = 0
        self._evaluated_at = -1
        self._evaluations_without_gain = 0
        self._saved_at = -1  # the step that last/ holds
        self._numbers = NumberWatch(self.step, last_good=self._last_good, log=self._write)
        self._bar: Any = None

    def describe(self) -> list[str]:
        """The choices of this run and their reasons, a line each."""
        model, config = self.model.config, self.config
        tokens_per_step = self.batches.batch_size * model.block_size
        q = torch.empty(
            1, model.n_head, model.block_size, model.head_dim, device=self.device, dtype=self.precision.dtype
        )
        kv = q[:, : model.kv_heads]
        attention = explain_attention(q, kv, kv, dropout_p=model.dropout, backend=config.attention)
        return [
            f"corpus: {self.corpus.name}, {len(self.corpus.train):,} training and {len(self.corpus.val):,} validation "
            f"tokens, vocabulary of {self.corpus.vocab_size}",
            f"model: {self.model.get_num_params() / 1e6:.2f}M parameters, {model.n_layer} layers "
            f"x {model.n_head} heads x {model.n_embd} channels, context {model.block_size}",
            f"step: {self.batches.batch_size} sequences, {tokens_per_step:,} tokens; {config.max_iters:,} steps are "
            f"{config.max_iters * tokens_per_step / max(1, len(self.corpus.train)):.1f} passes over the training split",
            f"device {self.device}; precision {self.precision.name}: {self.precision.reason}",
            f"attention {attention}",
            f"compile {'on' if self.compile.on else 'off'}: {self.compile.reason}",
            f"engine {'native' if self.engine.native else 'torch'}: {self.engine.reason}",
            f"cuda graph {'on' if self.graph.on else 'off'}: {self.graph.reason}",
            *(["deterministic: the same bits in every run with this seed"] if config.deterministic else []),
        ]

    def run(self) -> TrainResult:
        """Train to the end, or to the first reason to stop. Going on after a signal is another call.

        Raises:
            TrainingError: a loss, a gradient or a weight is not finite, or memory ran out; the message names the step
                and the last checkpoint.
            BackendUnavailableError: deterministic was asked for, and an operation has no deterministic form here.
        """
        start = time.perf_counter()
        deterministic = deterministic_algorithms(self.config.deterministic)
        with deterministic, StopSignals() as signals, self._progress_bar(), self._memory_errors():
            stopped = self._loop(signals)
        return TrainResult(
            iterations=self.step.iteration,
            val_loss=self.val_loss,
            best_val_loss=self.best_val_loss,
            best_iteration=self.best_iteration,
            seconds=time.perf_counter() - start,
            stopped=stopped,
        )

    def _loop(self, signals: StopSignals) -> Stopped:
        config, step = self.config, self.step
        since, steps_timed = time.perf_counter(), 0
        while True:
            at_end = step.iteration >= config.max_iters or config.eval_only
            due = step.iteration % config.eval_interval == 0 and (step.iteration > 0 or config.eval_at_start)
            if (at_end or due) and self._evaluated_at != step.iteration:
                self._evaluate_and_save()
                since, steps_timed = time.perf_counter(), 0
            if self._evaluated_at == step.iteration:  # by a life before, too, that was killed behind its last save
                if config.target_val_loss is not None and self.val_loss <= config.target_val_loss:
                    return "target"
                if config.patience is not None and self._evaluations_without_gain >= config.patience:
                    return "patience"
            if at_end:
                return "finished"
            if signals.received is not None:
                self._numbers.read()
                self._save_last()
                return "SIGINT" if signals.received.name == "SIGINT" else "SIGTERM"
            self._numbers.note(step.take(self.batches))
            steps_timed += 1
            if (step.iteration - 1) % config.log_interval == 0:
                loss = self._numbers.read()  # waits for the device, so the time below is true
                now = time.perf_counter()
                self._report_step(loss, (now - since) / steps_timed)
                since, steps_timed = now, 0

    def _report_step(self, loss: float, seconds: float) -> None:
        step, batch_size = self.step, self.batches.batch_size
        iteration = step.iteration - 1
        mfu = self.model.estimate_mfu(batch_size, seconds, self.precision.dtype)
        tokens_per_second = batch_size * self.model.config.block_size / seconds
        self._write(f"iter {iteration}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%")
        figures = {
            "loss": loss,
            "lr": step.learning_rate,
            "step_ms": seconds * 1000,
            "tokens_per_second": tokens_per_second,
        }
        if math.isfinite(mfu):
            figures["mfu"] = mfu
        norm = math.nan if step.grad_norm is None else float(step.grad_norm)
        if math.isfinite(norm):  # not where nothing is clipped, nor in a step that the gradient scaler skipped
            figures["grad_norm"] = norm
        self._report(figures, iteration)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s", refresh=False)
            self._bar.update(step.iteration - self._bar.n)

    def _evaluate_and_save(self) -> None:
        self._numbers.read()
        iteration, block_size = self.step.iteration, self.model.config.block_size
        train = evaluate(
            self.model,
            self._train_tokens,
            block_size=block_size,
            precision=self.precision,
            max_batches=self._train_batches(),
            native=self.step.native,
        )
        val = evaluate(
            self.model,
            self._val_tokens,
            block_size=block_size,
            precision=self.precision,
            native=self.step.native,
        )
        if not math.isfinite(val.loss):
            raise TrainingError(
                f"the validation loss is {val.loss} at step {iteration} (learning rate {self.step.learning_rate:.3g}): "
                f"lower --learning-rate or --grad-clip; {self._last_good()}"
            )
        self.val_loss, self._evaluated_at = val.loss, iteration
        improved = val.loss < self.best_val_loss
        if improved:
            self.best_val_loss, self.best_iteration, self._evaluations_without_gain = val.loss, iteration, 0
        else:
            self._evaluations_without_gain += 1
        self._write(f"step {iteration}: train loss {train.loss:.4f}, val loss {val.loss:.4f}")
        self._report({"train_loss": train.loss, "val_loss": val.loss}, iteration)
        if self.out_dir is not None and not self.config.eval_only:
            if improved:
                save_checkpoint(self.out_dir / "best", self._checkpoint(with_trainer=False))
            self._save_last()

    def _train_batches(self) -> int:
        """How many evaluation batches hold as many tokens as eval_iters training batches."""
        tokens = self.config.eval_iters * self.config.batch_size * self.model.config.block_size
        return max(1, round(tokens / EVAL_TOKENS_PER_BATCH))

    def _save_last(self) -> None:
        if self.out_dir is None:
            return
        overflowed = first_not_finite(self.model)
        if overflowed is not None:  # the step that did it had a finite loss and gradient, so nothing has said so yet
            raise TrainingError(
                f"the weight {overflowed} is not finite after step {self.step.iteration - 1} (learning rate "
                f"{self.step.learning_rate:.3g}): lower --learning-rate; {self._last_good()}"
            )
        save_checkpoint(self.out_dir / "last", self._checkpoint(with_trainer=True), keep_previous=True)
        self._saved_at = self.step.iteration

    def _last_good(self) -> str:
        if self.out_dir is None or self._saved_at < 0:
            return "nothing was saved"
        return f"the last good checkpoint is {self.out_dir / 'last'}, of step {self._saved_at}"

    def _checkpoint(self, *, with_trainer: bool) -> Checkpoint:
        return Checkpoint(
            model_config=self.model.config,
            weights=self.model.state_dict(),
            tokenizer_json=None if self.corpus.tokenizer is None else self.corpus.tokenizer.to_json(),
            train_config=self.config,
            trainer_state=self._state() if with_trainer else None,
            info={
                **self.info,
                "iteration": self.step.iteration,
                "val_loss": self.val_loss if math.isfinite(self.val_loss) else None,
                "corpus": self.corpus.name,
                "corpus_tokens": [len(self.corpus.train), len(self.corpus.val)],
            },
        )

    def _state(self) -> dict[str, Any]:
        """Everything beside the weights that the rest of the run depends on."""
        return {
            "step": self.step.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "best_iteration": self.best_iteration,
            "evaluated_at": self._evaluated_at,
            "evaluations_without_gain": self._evaluations_without_gain,
        }

    def resume(self) -> int:
        """Take up the run whose `last/` lies in out_dir; on a CPU the rest is then bit-equal to never having stopped.

        Where `last/` is damaged, the save before it is taken, and a line says so.

        Returns:
            The steps already taken.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model or corpus.
        """
        assert self.out_dir is not None, "a run without an out dir has nothing to resume"
        folder = self.out_dir / "last"
        checkpoint, damage = load_last_good(folder, device=self.device, with_trainer=True, repair=True)
        if damage is not None:
            self._write(
                f"{damage}; going on from the save before it, of step {checkpoint.info.get('iteration')} (the damaged "
                f"one is kept as {folder}.damaged)"
            )
        if checkpoint.model_config != self.model.config:
            raise CheckpointError(
                f"{folder} holds another model than the one asked for: resume with the flags it began with"
            )
        sizes = [len(self.corpus.train), len(self.corpus.val)]
        if checkpoint.info.get("corpus_tokens") != sizes:
            raise CheckpointError(
                f"{folder} was trained on {checkpoint.info.get('corpus_tokens')} training and validation tokens, and "
                f"the corpus {self.corpus.name} has {sizes}: resume with the --data it began with"
            )
        state = checkpoint.trainer_state
        assert state is not None
        try:
            self.model.load_state_dict(checkpoint.weights)
            self._load_state(state)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            if isinstance(error, FastchargptError):
                raise
            reason = str(error).splitlines()[0][:120] if str(error) else "no reason given"
            raise CheckpointError(
                f"{folder} holds the state of another kind of run ({type(error).__name__}: {reason}): it can be "
                "sampled from, not resumed"
            ) from None
        self._saved_at = self.step.iteration
        return self.step.iteration

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state["step"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.val_loss, self.best_val_loss = float(state["val_loss"]), float(state["best_val_loss"])
        self.best_iteration, self._evaluated_at = int(state["best_iteration"]), int(state["evaluated_at"])
        self._evaluations_without_gain = int(state["evaluations_without_gain"])

    def _report(self, figures: dict[str, float], iteration: int) -> None:
        for logger in self._loggers:
            logger.log(figures, step=iteration)

    def _write(self, line: str) -> None:
        if self._bar is None:
            self._log(line)
        elif not line.startswith("iter "):  # the bar itself shows what the iter lines say
            self._bar.write(line)

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[None]:
        if not self._progress:
            yield
            return
        from tqdm import tqdm

        with tqdm(
            total=self.config.max_iters, initial=self.step.iteration, unit="step", dynamic_ncols=True
        ) as self._bar:
            try:
                yield
            finally:
                self._bar.update(self.step.iteration - self._bar.n)
                bar, self._bar = self._bar, None
                bar.refresh()

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # here, not in the handler: leaving it frees the frames of the failed step and the tensors that they hold
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise TrainingError(
            f"out of memory at step {self.step.iteration}: lower --batch-size (and raise "
            f"--gradient-accumulation-steps to keep the step), --block-size or the model's size; {self._rescue()}"
        )

    def _rescue(self) -> str:
        """Save the steps since the last checkpoint, if they are whole and it can be done; a clause that says so."""
        if not self.step.updating and not self.config.eval_only and self._saved_at < self.step.iteration:
            with contextlib.suppress(FastchargptError, MemoryError, RuntimeError):
                self._numbers.read()
                self._save_last()
        return self._last_good()
