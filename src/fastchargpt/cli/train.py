"""`fastchargpt train`: text in; a trained model, its figures, its picture and a sample out."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastchargpt.checkpoint import load_last_good
from fastchargpt.cli.arguments import given, parse, peek
from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.corpus import Corpus, load_corpus
from fastchargpt.errors import ConfigError, OutDirError
from fastchargpt.metrics import JsonlMetrics, MetricsLogger, TensorBoardMetrics, read_metrics
from fastchargpt.outdir import claim_out_dir
from fastchargpt.parallel import Parallel, open_parallel
from fastchargpt.plotting import plot_losses
from fastchargpt.presets import preset
from fastchargpt.trainer import Trainer, TrainResult

__all__ = ["run"]

SAMPLE_TOKENS = 500


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What to train on, and where to."""

    # a .txt file, a folder with nanoGPT's train.bin and val.bin, or a name: shakespeare, enwik8, text8, pydoc, auto
    data: str = "auto"
    # what a token is, where the data is text
    tokenizer: Literal["char", "byte", "bpe"] = "char"
    # distinct tokens that BPE learns
    bpe_vocab_size: int = 1024
    # the recipe that all other defaults come from: lecture, shakespeare-char, modern-char, gpt2, ...; auto takes
    # shakespeare-char on a GPU and modern-char-cpu elsewhere
    preset: str = "auto"
    # folder of the run's checkpoints, figures, picture and sample
    out_dir: str = "out"
    # go on with the run in out_dir, with the options it began with
    resume: bool = False
    # replace the run in out_dir
    overwrite: bool = False
    # also write TensorBoard event files to out_dir/tensorboard
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a GPT on a text. nanoGPT's spellings work too: --n_layer=4, --compile=False, --dtype=float32."""

    # what to train on, and where to
    run: RunOptions = field(default_factory=RunOptions)
    # the model
    model: GPTConfig = field(default_factory=GPTConfig)
    # how it is trained
    train: TrainConfig = field(default_factory=TrainConfig)


def run(argv: Sequence[str]) -> int:
    """Train as the words say; the exit status."""
    command = parse(TrainCommand, argv, command="train", default=_defaults(argv))
    options, config = command.run, command.train
    if options.resume and options.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it: give one of the two")
    with open_parallel(config.parallel, config.device) as parallel:
        return _run(command, argv, parallel)


def _run(command: TrainCommand, argv: Sequence[str], parallel: Parallel) -> int:
    options, config = command.run, command.train
    corpus = load_corpus(options.data, tokenizer=options.tokenizer, bpe_vocab_size=options.bpe_vocab_size)
    if corpus.note:
        print(corpus.note)
    model_config = _with_vocabulary(command.model, corpus, options.resume or given(argv, "vocab_size"))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on a GPU
    out_dir = Path(options.out_dir)
    mode: Literal["new", "resume", "overwrite"] = "new"
    if options.resume or options.overwrite:
        mode = "resume" if options.resume else "overwrite"
    loggers: list[MetricsLogger] = []
    trainer = Trainer(
        model_config,
        config,
        corpus,
        out_dir=out_dir,
        info={
            "data": _portable(options.data, corpus),
            "tokenizer": options.tokenizer,
            "bpe_vocab_size": options.bpe_vocab_size,
        },
        loggers=loggers,
        progress=sys.stderr.isatty(),
        parallel=parallel,
    )
    metrics = out_dir / "metrics.jsonl"
    with contextlib.ExitStack() as held:
        parallel.on_main(lambda: held.enter_context(claim_out_dir(out_dir, mode)))
        resumed_at = trainer.resume() if options.resume else None

        def begin() -> None:
            loggers.append(JsonlMetrics(metrics, resume_step=resumed_at))
            if options.tensorboard:
                loggers.append(TensorBoardMetrics(out_dir / "tensorboard"))

        parallel.on_main(begin)
        for line in trainer.describe():
            print(line)
        if resumed_at is not None:
            print(f"resumed from {out_dir / 'last'} at step {resumed_at}")
        result = trainer.run()
        parallel.close()  # what is left is process 0's alone
        if parallel.is_main:
            try:
                _finish(trainer, result, out_dir, metrics)
            except OSError as error:
                if isinstance(error, OutDirError | BrokenPipeError):
                    raise
                raise OutDirError(
                    f"the run is saved in {out_dir}, but its picture or sample could not be written ({error.strerror})"
                ) from error
    return 128 + signal.Signals[result.stopped] if result.stopped in ("SIGINT", "SIGTERM") else 0


def _defaults(argv: Sequence[str]) -> TrainCommand:
    """What the flags that are not given mean: the preset's values, or those of the run that is resumed."""
    if given(argv, "resume") and peek(argv, "resume") not in ("False", "false"):
        out_dir = peek(argv, "out_dir") or RunOptions.out_dir
        checkpoint, _ = load_last_good(Path(out_dir) / "last")
        remembered: dict[str, Any] = {
            name: checkpoint.info[name]
            for name, kind in (("data", str), ("tokenizer", str), ("bpe_vocab_size", int))
            if isinstance(checkpoint.info.get(name), kind)
        }
        return TrainCommand(
            run=RunOptions(**remembered),
            model=checkpoint.model_config,
            train=checkpoint.train_config or TrainConfig(),
        )
    name = peek(argv, "preset") or "auto"
    if name == "auto":
        import torch

        name = "shakespeare-char" if torch.cuda.is_available() else "modern-char-cpu"
    recipe = preset(name)
    return TrainCommand(model=recipe.model, train=recipe.train)


def _with_vocabulary(model: GPTConfig, corpus: Corpus, asked_for: bool) -> GPTConfig:
    """The model for a corpus: with its vocabulary, or a larger one that was asked for, now or when the run began."""
    if not asked_for:
        return dataclasses.replace(model, vocab_size=corpus.vocab_size)
    if model.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"--vocab-size {model.vocab_size} is below the {corpus.vocab_size} distinct tokens of {corpus.name}: "
            "leave it out"
        )
    return model


def _portable(data: str, corpus: Corpus) -> str:
    """The data's name as a later call understands it: from another folder, or where `auto` would take another text."""
    if data == "auto":
        return corpus.name
    return str(Path(data).resolve()) if Path(data).exists() else data


def _finish(trainer: Trainer, result: TrainResult, out_dir: Path, metrics: Path) -> None:
    """Say how the run ended, draw its picture and write a sample of its best model."""
    why = {
        "finished": "finished",
        "target": "reached the target validation loss",
        "patience": "stopped early: the validation loss no longer falls",
        "SIGINT": "stopped by Ctrl-C",
        "SIGTERM": "stopped by SIGTERM",
    }[result.stopped]
    print(f"{why} after {result.iterations} steps, {result.seconds:.1f} s")
    if result.best_val_loss < float("inf"):
        print(f"best validation loss {result.best_val_loss:.4f} at step {result.best_iteration}")
    if trainer.config.eval_only:
        return
    if result.stopped in ("SIGINT", "SIGTERM"):
        print(f"saved {out_dir / 'last'}: go on with --resume --out-dir {out_dir}")
        return
    title = f"{trainer.corpus.name}: {trainer.model.get_num_params() / 1e6:.2f}M parameters, {result.seconds:.0f} s"
    if plot_losses(read_metrics(metrics), out_dir / "loss.png", title=title):
        print(f"drew {out_dir / 'loss.png'}")
    else:
        print("no picture: matplotlib is missing (pip install 'fastchargpt[plot]')")
    if (out_dir / "best").is_dir() and trainer.corpus.tokenizer is not None:
        text = _sample(out_dir / "best")
        (out_dir / "sample.txt").write_text(text, encoding="utf-8")
        width = shutil.get_terminal_size().columns
        print(f"{'─' * min(width, 80)}\n{text}\n{'─' * min(width, 80)}")
        print(f"saved {out_dir}: more with `fastchargpt sample {out_dir}`")


def _sample(folder: Path) -> str:
    from fastchargpt.generation import generate
    from fastchargpt.loading import load
    from fastchargpt.sampling import SamplingConfig

    model, tokenizer = load(folder)
    assert tokenizer is not None
    return generate(model, tokenizer, "", SamplingConfig(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=1337))[
        0
    ].text
