"""The training loop: batches in, losses out, checkpoints on the way."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastchargpt.attention import explain_attention
from fastchargpt.batches import TokenBatches, place_tokens
from fastchargpt.choices import choose_compile, choose_engine, choose_graph, choose_training_precision
from fastchargpt.compiling import AutoCompile, CostFile, cost_key
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.corpus import Corpus
from fastchargpt.determinism import check_deterministic, deterministic_algorithms
from fastchargpt.downloads import cache_dir
from fastchargpt.errors import BackendUnavailableError, FastchargptError, TrainingError
from fastchargpt.evaluation import EVAL_TOKENS_PER_BATCH, evaluate
from fastchargpt.faults import NumberWatch, is_out_of_memory
from fastchargpt.metrics import MetricsLogger
from fastchargpt.model import GPT
from fastchargpt.optim import learning_rate_at, make_optimizer
from fastchargpt.parallel import Parallel, open_parallel
from fastchargpt.reporting import Reporter
from fastchargpt.saving import Saves
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

    Where several processes share a run, each makes a Trainer with the same arguments and calls the same methods;
    process 0 alone writes and logs.

    Args:
        model_config: the model; its vocab_size must be at least the corpus's.
        config: how it is trained.
        corpus: the tokens.
        out_dir: where `last/` and `best/` are saved; None saves nothing.
        info: further facts (JSON values) to keep in each checkpoint.
        loggers: whatever takes `.log(dict, step=)`.
        log: takes each line that people read; the forms `step N: ...` and `iter N: ...` are nanoGPT's.
        progress: whether a tqdm bar is drawn.
        parallel: the processes that share the run; by default `open_parallel` joins those that a launcher started, and
            `trainer.parallel.close()` leaves them.

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
        parallel: Parallel | None = None,
    ) -> None:
        self.config, self.corpus, self.out_dir = config, corpus, out_dir
        self.parallel = parallel or open_parallel(config.parallel, config.device)
        self._reporter = Reporter(log, loggers, progress=progress, silent=not self.parallel.is_main)
        self.device = self.parallel.device
        if config.deterministic:
            check_deterministic(self.device, config.compile)
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(self.device)
        self.model.set_attention(config.attention)
        self.model.checkpoint_activations = config.checkpoint_activations
        sharded = self.parallel.mode == "fsdp"
        engine = "torch" if sharded and config.engine == "auto" else config.engine
        self.precision = choose_training_precision(config.precision, self.model, engine, compile=config.compile == "on")
        if self.precision.needs_scaler and sharded:
            raise BackendUnavailableError(
                "parallel=fsdp cannot be had with precision fp16, whose gradient scaler needs whole gradients: use "
                "--precision=bf16 or fp32, or --parallel=ddp"
            )
        self.parallel.shard(self.model, self.model.transformer.h)
        if not self.parallel.is_main:
            torch.manual_seed(config.seed + self.parallel.rank)  # each process's dropout is its own
        self._train_tokens, self._val_tokens = (
            place_tokens(corpus.train, self.device),
            place_tokens(corpus.val, self.device),
        )
        _, micro_batches = self.parallel.share(config.batch_size, config.gradient_accumulation_steps)
        self.batches = TokenBatches(
            self._train_tokens,
            batch_size=config.batch_size * config.gradient_accumulation_steps,
            block_size=model_config.block_size,
            order=config.order,
            device=self.device,
            seed=config.seed,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
        )
        self.engine = choose_engine(config.engine, self.model, self.precision, compile=config.compile == "on")
        self.compile = choose_compile(
            config.compile,
            self.device,
            native=self.engine.native,
            deterministic=config.deterministic,
            sharded=sharded,
        )
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
            gradient_accumulation_steps=micro_batches,
            precision=self.precision,
            compile=self.compile.on,
            engine="native" if self.engine.native else "torch",
            cuda_graph=self.graph.on,
            ema_decay=config.ema_decay,
            parallel=self.parallel,
        )
        self._saves = Saves(
            out_dir,
            info or {},
            model=self.model,
            config=config,
            corpus=corpus,
            step=self.step,
            batches=self.batches,
            parallel=self.parallel,
            write=self._reporter.line,
        )
        self.scores = self._saves.scores
        self._numbers = NumberWatch(self.step, last_good=self._saves.last_good, log=self._reporter.line)
        self._auto_compile = self._make_auto_compile() if self.compile.pending else None

    def _make_auto_compile(self) -> AutoCompile:
        config, world_size = self.config, self.parallel.world_size
        facts = (
            self.batches.batch_size,
            config.gradient_accumulation_steps,
            self.precision.name,
            self.graph.on,
            world_size,
        )
        return AutoCompile(
            self.step,
            last=config.max_iters,
            log=self._reporter.line,
            costs=CostFile(cache_dir() / "compile.json"),
            key=cost_key(self.model.config, self.device, *facts),
        )

    @property
    def val_loss(self) -> float:
        """Exact validation loss at the last evaluation, nats per token."""
        return self.scores.val_loss

    @property
    def best_val_loss(self) -> float:
        """The lowest validation loss so far."""
        return self.scores.best_val_loss

    @property
    def best_iteration(self) -> int:
        """The step of the lowest validation loss."""
        return self.scores.best_iteration

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
            str(self.compile),
            f"engine {'native' if self.engine.native else 'torch'}: {self.engine.reason}",
            f"cuda graph {'on' if self.graph.on else 'off'}: {self.graph.reason}",
            *([self._describe_sharing()] if self.parallel.mode != "none" else []),
            *(["deterministic: the same bits in every run with this seed"] if config.deterministic else []),
        ]

    def _describe_sharing(self) -> str:
        rows, parts = self.parallel.share(self.config.batch_size, self.config.gradient_accumulation_steps)
        return f"{self.parallel.describe()}; of each step a process takes {parts} x {rows} sequences"

    def run(self) -> TrainResult:
        """Train to the end, or to the first reason to stop. Going on after a signal is another call.

        Raises:
            TrainingError: a loss, a gradient or a weight is not finite, memory ran out, or another process that shares
                the run is gone; the message names the step and the last checkpoint.
            BackendUnavailableError: deterministic was asked for, and an operation has no deterministic form here.
        """
        start = time.perf_counter()
        deterministic = deterministic_algorithms(self.config.deterministic)
        bar = self._reporter.bar(self.config.max_iters, lambda: self.step.iteration)
        with deterministic, StopSignals() as signals, bar, self._faults():
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
        config, step, scores = self.config, self.step, self.scores
        since, steps_timed = time.perf_counter(), 0
        while True:
            at_end = step.iteration >= config.max_iters or config.eval_only
            due = step.iteration % config.eval_interval == 0 and (step.iteration > 0 or config.eval_at_start)
            if (at_end or due) and scores.evaluated_at != step.iteration:
                self._evaluate_and_save()
                since, steps_timed = time.perf_counter(), 0
            if scores.evaluated_at == step.iteration:  # by a life before, too, that was killed behind its last save
                if config.target_val_loss is not None and scores.val_loss <= config.target_val_loss:
                    return "target"
                if config.patience is not None and scores.evaluations_without_gain >= config.patience:
                    return "patience"
            if at_end:
                return "finished"
            received = self.parallel.largest(signals.received or 0)  # a signal to one process stops all, at one step
            if received:
                self._numbers.read()
                self._save_last()
                return "SIGINT" if received == signal.SIGINT else "SIGTERM"
            self._numbers.note(step.take(self.batches))
            steps_timed += 1
            if (step.iteration - 1) % config.log_interval == 0:
                loss = self._numbers.read()  # waits for the device, so the time below is true
                now = time.perf_counter()
                self._report_step(loss, (now - since) / steps_timed)
                self._weigh_compiling(steps_timed, (now - since) / steps_timed)
                since, steps_timed = now, 0

    def _weigh_compiling(self, steps: int, seconds: float) -> None:
        """Under compile=auto: process 0 decides by its own times, and the others do as it does."""
        if self._auto_compile is None:
            return
        if self.parallel.is_main:
            self._auto_compile.note(steps, seconds)
        on = bool(self.parallel.largest(self.step.compiled if self.parallel.is_main else 0))
        if on != self.step.compiled:
            self.step.compile(on)

    def _report_step(self, loss: float, seconds: float) -> None:
        if not self.parallel.is_main:
            return
        step, batch_size = self.step, self.batches.batch_size
        iteration = step.iteration - 1
        # the share of all devices' peak is that of one device with its part of the batch
        mfu = self.model.estimate_mfu(batch_size / self.parallel.world_size, seconds, self.precision.dtype)
        tokens_per_second = batch_size * self.model.config.block_size / seconds
        self._reporter.line(f"iter {iteration}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu * 100:.2f}%")
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
        self._reporter.figures(figures, iteration)
        self._reporter.move(step.iteration, f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s")

    def _evaluate_and_save(self) -> None:
        self._numbers.read()
        with self.step.averaged():
            self._evaluate()
        if not self.config.eval_only:
            self._save_last()

    def _evaluate(self) -> None:
        """Both losses; where the validation loss is the lowest so far, the weights go to `best/`."""
        iteration, block_size = self.step.iteration, self.model.config.block_size
        train = evaluate(
            self.model,
            self._train_tokens,
            block_size=block_size,
            precision=self.precision,
            max_batches=self._train_batches(),
            native=self.step.native,
            parallel=self.parallel,
        )
        val = evaluate(
            self.model,
            self._val_tokens,
            block_size=block_size,
            precision=self.precision,
            native=self.step.native,
            parallel=self.parallel,
        )
        if not math.isfinite(val.loss):
            raise TrainingError(
                f"the validation loss is {val.loss} at step {iteration} (learning rate {self.step.learning_rate:.3g}): "
                f"lower --learning-rate or --grad-clip; {self._saves.last_good()}"
            )
        improved = self.scores.note(val.loss, iteration)
        self._reporter.line(f"step {iteration}: train loss {train.loss:.4f}, val loss {val.loss:.4f}")
        self._reporter.figures({"train_loss": train.loss, "val_loss": val.loss}, iteration)
        if improved and not self.config.eval_only:
            self._saves.save_best()

    def _train_batches(self) -> int:
        """How many evaluation batches hold as many tokens as eval_iters training batches."""
        tokens = self.config.eval_iters * self.config.batch_size * self.model.config.block_size
        return max(1, round(tokens / EVAL_TOKENS_PER_BATCH))

    def _save_last(self) -> None:
        self._saves.save_last()

    def resume(self) -> int:
        """Take up the run whose `last/` lies in out_dir; on a CPU the rest is then bit-equal to never having stopped.

        Where `last/` is damaged, the save before it is taken, and a line says so. The run may have had another number
        of processes, which shared it in another way: then it goes on with the same data, and equal up to rounding.

        Returns:
            The steps already taken.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another model or corpus.
        """
        taken = self._saves.resume()
        if self._auto_compile is not None and self.step.was_compiled:
            self._auto_compile.resume()
        return taken

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Memory that runs out, here or on another process, as one sentence."""
        try:
            yield
            return
        except (MemoryError, RuntimeError) as error:
            lost = self.parallel.is_lost(error)
            if not lost and not is_out_of_memory(error):
                raise
        # here, not in the handler: leaving it frees the frames of the failed step and the tensors that they hold
        if lost:
            raise TrainingError(
                f"another process of this run ended at step {self.step.iteration}, and said why if it could; "
                f"{self._saves.last_good()}"
            )
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise TrainingError(
            f"out of memory at step {self.step.iteration}: lower --batch-size (and raise "
            f"--gradient-accumulation-steps to keep the step), --block-size or the model's size; {self._rescue()}"
        )

    def _rescue(self) -> str:
        """Save the steps since the last checkpoint, if they are whole and it can be done; a clause that says so.

        Not where the run is shared: a save needs all processes, and those that had enough memory are still in the step.
        """
        alone, since = self.parallel.mode == "none", self._saves.saved_at
        if alone and not self.step.updating and not self.config.eval_only and since < self.step.iteration:
            with contextlib.suppress(FastchargptError, MemoryError, RuntimeError):
                self._numbers.read()
                self._save_last()
        return self._saves.last_good()
