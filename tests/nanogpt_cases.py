"""What the tests beside nanoGPT share: a shape, a run with the losses that nanoGPT printed, and a toy text."""

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PINNED", "SHAPE", "TRAIN", "load_module", "toy_tokens"]

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 29}
TRAIN = [
    *("--dataset=toy", "--device=cpu", "--compile=False", "--dtype=float32", "--out_dir=out", "--dropout=0.0"),
    *(
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--batch_size=8",
        "--gradient_accumulation_steps=2",
    ),
    *("--max_iters=100", "--warmup_iters=10", "--lr_decay_iters=100", "--learning_rate=3e-3", "--min_lr=3e-4"),
    *("--eval_interval=50", "--eval_iters=2", "--log_interval=1"),
]
# What nanoGPT's own train.py and model.py (commit 3adf61e) print with TRAIN on `toy_tokens`: iteration -> loss
PINNED = {0: 3.383, 10: 3.0722, 20: 2.6368, 30: 2.2717, 40: 2.0343, 50: 1.8539}
PINNED |= {60: 1.7471, 70: 1.7288, 80: 1.6572, 90: 1.6437, 100: 1.6533}


def toy_tokens(count: int = 6000) -> np.ndarray:
    """A text of 29 letters with something to learn in it, the same everywhere."""
    tokens, token, state = np.empty(count, np.uint16), 1, 42
    for i in range(count):
        state = (1103515245 * state + 12345) % 2**31
        token = (3 * token + (state >> 16) % 4) % 29
        tokens[i] = token
    return tokens


def load_module(path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
