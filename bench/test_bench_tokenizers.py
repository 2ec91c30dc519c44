"""Tokenizer speed on one core, in millions of UTF-8 bytes a second."""

from typing import Any

import pytest
import torch

from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer

ASCII = "The quick brown fox, jumps over the lazy dog; 0123456789!\n" * 100_000
UNICODE = "Съешь ещё этих мягких французских булок, 中文字符 🙂\n" * 50_000


def run(benchmark: Any, tokenizer: Tokenizer, text: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(tokenizer.encode, args=(text,), rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["MB_per_s"] = round(len(text.encode()) / benchmark.stats.stats.median / 1e6, 1)


@pytest.mark.parametrize("text", [ASCII, UNICODE], ids=["ascii", "unicode"])
def test_char_encode(benchmark: Any, text: str) -> None:
    run(benchmark, CharTokenizer.from_text(text), text)


@pytest.mark.parametrize("text", [ASCII, UNICODE], ids=["ascii", "unicode"])
def test_byte_encode(benchmark: Any, text: str) -> None:
    run(benchmark, ByteTokenizer(), text)


def test_bpe_encode(benchmark: Any) -> None:
    run(benchmark, BPETokenizer.train(ASCII[:100_000], 512), ASCII[:500_000])


@pytest.mark.parametrize("text", [ASCII, UNICODE], ids=["ascii", "unicode"])
def test_char_vocabulary(benchmark: Any, text: str) -> None:
    benchmark.pedantic(CharTokenizer.from_text, args=(text,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["MB_per_s"] = round(len(text.encode()) / benchmark.stats.stats.median / 1e6, 1)
