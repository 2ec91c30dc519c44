"""The notebook this project grew from, fact by fact."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastchargpt.attention import causal_attention
from fastchargpt.batches import TokenBatches
from fastchargpt.bigram import BigramLanguageModel
from fastchargpt.evaluation import evaluate
from fastchargpt.precision import Precision
from fastchargpt.step import make_train_step
from fastchargpt.tokenizers import CharTokenizer


@pytest.fixture(scope="module")
def tokens(shakespeare: str) -> np.ndarray:
    return CharTokenizer.from_text(shakespeare).encode(shakespeare)


def test_corpus_and_encoding(shakespeare: str, tokens: np.ndarray) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    assert (len(shakespeare), tokenizer.vocab_size) == (1115394, 65)
    greeting = [20, 43, 50, 50, 53, 1, 35, 53, 56, 50, 42, 1, 58, 46, 47, 57, 1, 47, 57, 1, 19, 28, 32]
    assert tokenizer.encode("Hello World this is GPT").tolist() == greeting
    assert tokenizer.decode(greeting) == "Hello World this is GPT"
    assert tokens[:18].tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47, 64, 43, 52, 10, 0, 14, 43, 44]


def test_first_batch_and_the_bigrams_first_loss(tokens: np.ndarray) -> None:
    train = tokens[: int(0.9 * len(tokens))]
    torch.manual_seed(1337)
    x, y = TokenBatches(train, batch_size=4, block_size=8).next_batch()
    assert x[:, :4].tolist() == [[24, 43, 58, 5], [44, 53, 56, 1], [52, 58, 1, 58], [25, 17, 27, 10]]
    assert torch.equal(x[:, 1:], y[:, :-1])
    torch.manual_seed(1337)
    logits, loss = BigramLanguageModel(65)(x, y)
    assert logits.shape == (4, 8, 65)
    assert loss.item() == pytest.approx(4.8786, abs=5e-5)
    assert BigramLanguageModel(65)(x)[1] is None
    assert math.log(65) == pytest.approx(4.174387269895637)


def test_bigram_learns_in_10_000_steps(tokens: np.ndarray) -> None:
    cut = int(0.9 * len(tokens))
    batches = TokenBatches(tokens[:cut], batch_size=32, block_size=8, seed=1337)
    torch.manual_seed(1337)
    model = BigramLanguageModel(65)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = make_train_step(model, optimizer=optimizer, learning_rate=1e-3, grad_clip=0.0)
    for _ in range(10_000):
        step(*batches.next_batch())
    precision = Precision(name="fp32", reason="test")
    found = evaluate(model, tokens[cut:], block_size=8, precision=precision)
    assert found.tokens == len(tokens) - cut - 1
    assert found.loss < 2.52
    # no bigram table can do better than the split's own bigram counts
    pairs = np.zeros((65, 65))
    np.add.at(pairs, (tokens[cut:-1], tokens[cut + 1 :]), 1)
    bound = -(pairs * np.log(np.where(pairs, pairs / pairs.sum(1, keepdims=True).clip(1), 1))).sum() / pairs.sum()
    assert found.loss > bound
    text = CharTokenizer.from_text("".join(map(chr, range(65)))).decode(
        model.generate(torch.zeros(1, 1, dtype=torch.long), 50)[0]
    )
    assert len(text) == 51


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize(
    ("scale", "row"),
    [
        (32**-0.5, [0.4103, -0.0919, -0.1171, -0.0358]),  # what the cell's code says
        (1.0, [0.6764, -0.5477, -0.2478, 0.3143]),  # what the cell printed
        (None, [0.4397, -0.1423, -0.1316, 0.0029]),  # the usual one, head_size**-0.5
    ],
)
def test_single_head(backend: str, scale: float | None, row: list[float]) -> None:
    torch.manual_seed(1337)
    x = torch.randn(4, 8, 32)
    key, query, value = (nn.Linear(32, 16, bias=False) for _ in range(3))
    q, k, v = (layer(x)[:, None] for layer in (query, key, value))  # one head: (B, 1, T, D)
    out = causal_attention(q, k, v, scale=scale, backend=backend)[:, 0]
    assert out[0, 0, :3].tolist() == pytest.approx([-0.1571, 0.8801, 0.1615], abs=6e-5)
    assert out[0, 1, :4].tolist() == pytest.approx(row, abs=6e-5)
