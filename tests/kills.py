"""Runs that are killed again and again: one life of a run, in a process of its own, and what a run leaves behind."""

import contextlib
import dataclasses
import math
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt.checkpoint import Checkpoint, load_checkpoint
from fastchargpt.generation import generate
from fastchargpt.loading import load
from fastchargpt.metrics import JsonlMetrics, read_metrics
from fastchargpt.precision import Precision
from fastchargpt.sampling import SamplingConfig
from fastchargpt.trainer import Trainer

# wide enough for the native step, which has no dropout
NATIVE_MODEL = dataclasses.replace(MODEL, n_embd=32, dropout=0.0)
SAMPLE_CHARACTERS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run to be killed."""

    # of TrainConfig
    fields: dict[str, Any]
    # whether native code takes the steps
    native: bool = False
    # whether fp16's gradient scaler is at work, on fp32 products, and one step in seven overflows
    scaler: bool = False


def server() -> ForkServerContext:
    """Processes forked from one that has imported torch and run nothing: a life begins in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenizers", "fastchargpt.trainer", "safetensors.torch"])
    return context


def live(out_dir: Path, run: Run) -> None:
    """Begin a run, or take it up where the life before was cut off, and train to its end."""
    torch.set_num_threads(1)
    loggers: list[Any] = []
    config = dataclasses.replace(CONFIG, **run.fields, engine="native" if run.native else "torch")
    model = NATIVE_MODEL if run.native else MODEL
    trainer = Trainer(model, config, corpus(), out_dir=out_dir, loggers=loggers, log=lambda line: None)
    if run.scaler:
        Precision.autocast = lambda self, device: contextlib.nullcontext()  # type: ignore[method-assign]
        trainer.step.precision = trainer.precision = dataclasses.replace(trainer.precision, name="fp16")
        trainer.step._scaler = torch.amp.GradScaler("cpu", growth_interval=3)
        trainer.model.lm_head.weight.register_hook(
            lambda gradient: gradient * (math.inf if trainer.step.iteration % 7 == 5 else 1.0)
        )
    begun = any((out_dir / name).exists() for name in ("last", "last.new", "last.old"))
    out_dir.mkdir(exist_ok=True)
    loggers.append(JsonlMetrics(out_dir / "metrics.jsonl", resume_step=trainer.resume() if begun else None))
    trainer.run()


def run_with_kills(context: ForkServerContext, out_dir: Path, run: Run, kills: int, seed: int) -> str:
    """Kill a run `kills` times at random moments, then let it end; a line on where the kills hit."""
    choose = random.Random(seed)
    hit = during_save = 0
    while hit < kills:
        process = context.Process(target=live, args=(out_dir, run))
        process.start()
        folders = {path: path.stat().st_mtime_ns for path in out_dir.glob("last*")} if out_dir.exists() else {}
        # from its first save on, so that each life gets somewhere
        while process.is_alive() and folders == {path: _mtime(path) for path in out_dir.glob("last*")}:
            time.sleep(0.001)
        time.sleep(choose.random() * 0.15)
        process.kill()
        process.join()
        if process.exitcode == 0:  # the run is over, and there is nothing left to kill
            break
        hit += 1
        during_save += (out_dir / "last.new").exists() or not (out_dir / "last").exists()
    process = context.Process(target=live, args=(out_dir, run))
    process.start()
    process.join()
    assert process.exitcode == 0
    return f"{hit} kills, {during_save} of them during a save"


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # moved away just now
        return 0


@dataclasses.dataclass(frozen=True)
class Remains:
    """What a run leaves behind, in so far as it must be equal."""

    last: Checkpoint
    best: Checkpoint
    # every figure that does not depend on the clock
    rows: list[dict[str, float]]
    # a text of the last model
    sample: str


def remains(out_dir: Path) -> Remains:
    """Read what a run left."""
    clock = ("step_ms", "tokens_per_second", "mfu")
    rows = [
        {name: value for name, value in row.items() if name not in clock}
        for row in read_metrics(out_dir / "metrics.jsonl")
    ]
    model, tokenizer = load(out_dir / "last")
    assert tokenizer is not None
    sample = generate(model, tokenizer, "a", SamplingConfig(max_new_tokens=SAMPLE_CHARACTERS, seed=1))[0].text
    last = load_checkpoint(out_dir / "last", with_trainer=True)
    return Remains(last, load_checkpoint(out_dir / "best"), rows, sample)


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)
