"""Runs that are killed again and again: one life of a run, in a process of its own, and what a run leaves behind."""

import dataclasses
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt.checkpoint import Checkpoint, load_checkpoint
from fastchargpt.metrics import JsonlMetrics, read_metrics
from fastchargpt.trainer import Trainer


def server() -> ForkServerContext:
    """Processes forked from one that has imported torch and run nothing: a life begins in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenizers", "fastchargpt.trainer", "safetensors.torch"])
    return context


def live(out_dir: Path, fields: dict[str, Any]) -> None:
    """Begin a run, or take it up where the life before was cut off, and train to its end."""
    torch.set_num_threads(1)
    loggers: list[Any] = []
    config = dataclasses.replace(CONFIG, **fields)
    trainer = Trainer(MODEL, config, corpus(), out_dir=out_dir, loggers=loggers, log=lambda line: None)
    begun = any((out_dir / name).exists() for name in ("last", "last.new", "last.old"))
    out_dir.mkdir(exist_ok=True)
    loggers.append(JsonlMetrics(out_dir / "metrics.jsonl", resume_step=trainer.resume() if begun else None))
    trainer.run()


def run_with_kills(context: ForkServerContext, out_dir: Path, fields: dict[str, Any], kills: int, seed: int) -> str:
    """Kill a run `kills` times at random moments, then let it end; a line on where the kills hit."""
    choose = random.Random(seed)
    hit = during_save = 0
    while hit < kills:
        process = context.Process(target=live, args=(out_dir, fields))
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
    process = context.Process(target=live, args=(out_dir, fields))
    process.start()
    process.join()
    assert process.exitcode == 0
    return f"{hit} kills, {during_save} of them during a save"


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # moved away just now
        return 0


def remains(out_dir: Path) -> tuple[Checkpoint, Checkpoint, list[dict[str, float]]]:
    """What must be equal: last, best, and every figure that does not depend on the clock."""
    rows = [
        {name: value for name, value in row.items() if name not in ("step_ms", "tokens_per_second", "mfu")}
        for row in read_metrics(out_dir / "metrics.jsonl")
    ]
    last = load_checkpoint(out_dir / "last", with_trainer=True)
    return last, load_checkpoint(out_dir / "best"), rows


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)
