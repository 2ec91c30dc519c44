"""The race to a loss: nanoGPT's published CPU demo against `fastchargpt train --preset speedrun-cpu`, whole processes.

Both are started as their users start them and timed from the start of the process to its end, imports and evaluation
included. What an installation compiles once (setup.py) is timed apart. The losses are then taken by one and the same
function from the weights that each has saved, over the whole validation split in windows of 64 characters.
"""

import os
import pickle
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastchargpt.batches import place_tokens
from fastchargpt.convert.readers import read
from fastchargpt.corpus import Corpus, load_corpus
from fastchargpt.errors import ConfigError, TrainingError, nearest
from fastchargpt.evaluation import evaluate
from fastchargpt.kernels import cpu_train
from fastchargpt.kernels.cpu_compiler import build_library
from fastchargpt.kernels.cpu_train import library
from fastchargpt.loading import load, restore
from fastchargpt.model import GPT
from fastchargpt.precision import choose_precision
from fastchargpt.tokenizers import CharTokenizer

__all__ = ["CORPORA", "TARGET", "Finish", "check_corpus", "compile_seconds", "entrants", "get_corpus", "time_to_loss"]

CORPORA = ("shakespeare", "pydoc", "stdlib")
# the validation loss on shakespeare that nanoGPT's README gives for the demo; elsewhere it is what the demo reaches
TARGET = 1.88
CONTEXT = 64
# the demo's command, from nanoGPT's README
DEMO = dict(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4)
DEMO |= dict(n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0)
STDLIB_CHARACTERS = 1_200_000


@dataclass(frozen=True, kw_only=True)
class Finish:
    """One run of one contestant."""

    # wall-clock seconds of the process
    seconds: float
    # exact validation loss of the weights it saved, nats per character
    val_loss: float


def check_corpus(name: str) -> None:
    """Refuse the name of a corpus that is not of CORPORA."""
    if name not in CORPORA:
        raise ConfigError(
            f"there is no corpus {name!r} to race on{nearest(name, CORPORA)}; there are {', '.join(CORPORA)}"
        )


def get_corpus(name: str, folder: Path) -> tuple[Corpus, str]:
    """A corpus of characters, and what `--data` takes for it.

    Args:
        name: of CORPORA; `stdlib` is the source of this Python's standard library.
        folder: where a text may be written.
    """
    check_corpus(name)
    if name != "stdlib":
        return load_corpus(name), name
    path = folder / "stdlib.txt"
    path.write_text(_stdlib(), encoding="utf-8")
    return load_corpus(path), str(path)


def _stdlib() -> str:
    """Modules in alphabetical order; ASCII alone, which leaves out the encodings' tables."""
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii():
            parts.append(text)
        if sum(map(len, parts)) >= STDLIB_CHARACTERS:
            break
    return "\n".join(parts)[:STDLIB_CHARACTERS]


def compile_seconds(folder: Path) -> float:
    """Seconds that compiling the native training step takes, as setup.py or else the first run does it."""
    library()  # a contestant's run is to find it
    source = Path(cpu_train.__file__).with_suffix(".cpp")
    start = time.perf_counter()
    build_library(source, folder / "cpu_train.so", "the native training step")
    return time.perf_counter() - start


def entrants(data: str, corpus: Corpus, checkout: Path | None, folder: Path) -> dict[str, Callable[[], Finish]]:
    """The contestants; each call of one is a run.

    Args:
        data: what our `--data` takes.
        corpus: the same, read.
        checkout: nanoGPT's; it is read and never written to.
        folder: for what the runs write.
    """

    def ours() -> Finish:
        out = folder / "ours"
        words = ["train", "--preset", "speedrun-cpu", f"--data={data}", f"--out-dir={out}", "--overwrite"]
        seconds = _run([sys.executable, "-m", "fastchargpt", *words], folder, {})
        return Finish(seconds=seconds, val_loss=_exact_loss(load(out)[0], corpus))

    found: dict[str, Callable[[], Finish]] = {"fastchargpt": ours}
    if checkout is not None:
        found["nanoGPT"] = lambda: _nanogpt(checkout, corpus, folder)
    return found


def _nanogpt(checkout: Path, corpus: Corpus, folder: Path) -> Finish:
    """Its own train.py, in a folder of ours with the corpus in its format."""
    data = folder / "data" / "corpus"
    data.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        np.asarray(tokens).astype(np.uint16).tofile(data / f"{name}.bin")
    assert isinstance(corpus.tokenizer, CharTokenizer)
    stoi = {char: i for i, char in enumerate(corpus.tokenizer.chars)}
    meta = {"vocab_size": corpus.vocab_size, "itos": {i: char for char, i in stoi.items()}, "stoi": stoi}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    configurator = folder / "configurator.py"  # train.py reads it from the working directory
    if not configurator.exists():
        configurator.symlink_to(checkout.resolve() / "configurator.py")
    script, config = checkout.resolve() / "train.py", checkout.resolve() / "config" / "train_shakespeare_char.py"
    demo = [f"--{name}={value}" for name, value in DEMO.items()]
    words = [str(script), str(config), *demo, "--dataset=corpus", f"--out_dir={folder / 'theirs'}"]
    seconds = _run([sys.executable, *words], folder, {"PYTHONDONTWRITEBYTECODE": "1"})
    model, _ = restore(read(folder / "theirs" / "ckpt.pt", "nanogpt", []))
    return Finish(seconds=seconds, val_loss=_exact_loss(model, corpus))


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(f"{command[1]} ended with status {done.returncode}: {last}")
    return seconds


def _exact_loss(model: GPT, corpus: Corpus) -> float:
    device = torch.device("cpu")
    found = evaluate(
        model.eval(),
        place_tokens(corpus.val, device),
        block_size=CONTEXT,
        precision=choose_precision("fp32", device),
    )
    return found.loss


def time_to_loss(contestants: Mapping[str, Callable[[], Finish]], rounds: int) -> dict[str, list[Finish]]:
    """Every contestant's runs, in turns and in rotating order."""
    found: dict[str, list[Finish]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(contestants[name]())
    return found
