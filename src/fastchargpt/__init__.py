"""fastchargpt: the fastest way to train and sample a small GPT.

Importing it changes nothing: no environment, no device, no logging. Names are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastchargpt.attention import causal_attention, causal_attention_packed, explain_attention
    from fastchargpt.batches import TokenBatches
    from fastchargpt.bigram import BigramLanguageModel
    from fastchargpt.checkpoint import load_checkpoint, save_checkpoint
    from fastchargpt.config import GPTConfig, TrainConfig
    from fastchargpt.corpus import Corpus, load_corpus
    from fastchargpt.errors import FastchargptError
    from fastchargpt.evaluation import evaluate
    from fastchargpt.generation import generate, stream
    from fastchargpt.loading import load
    from fastchargpt.model import GPT
    from fastchargpt.presets import PRESETS, preset
    from fastchargpt.sampling import SamplingConfig
    from fastchargpt.step import make_train_step
    from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer
    from fastchargpt.trainer import Trainer, TrainResult

_HOME = {
    "BPETokenizer": "tokenizers",
    "BigramLanguageModel": "bigram",
    "ByteTokenizer": "tokenizers",
    "CharTokenizer": "tokenizers",
    "Corpus": "corpus",
    "FastchargptError": "errors",
    "GPT": "model",
    "GPTConfig": "config",
    "PRESETS": "presets",
    "SamplingConfig": "sampling",
    "TokenBatches": "batches",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "causal_attention": "attention",
    "causal_attention_packed": "attention",
    "evaluate": "evaluation",
    "explain_attention": "attention",
    "generate": "generation",
    "load": "loading",
    "load_checkpoint": "checkpoint",
    "load_corpus": "corpus",
    "load_tokenizer": "tokenizers",
    "make_train_step": "step",
    "preset": "presets",
    "save_checkpoint": "checkpoint",
    "stream": "generation",
}

__all__ = [
    "GPT",
    "PRESETS",
    "BPETokenizer",
    "BigramLanguageModel",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "FastchargptError",
    "GPTConfig",
    "SamplingConfig",
    "TokenBatches",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "causal_attention",
    "causal_attention_packed",
    "evaluate",
    "explain_attention",
    "generate",
    "load",
    "load_checkpoint",
    "load_corpus",
    "load_tokenizer",
    "make_train_step",
    "preset",
    "save_checkpoint",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastchargpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastchargpt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
