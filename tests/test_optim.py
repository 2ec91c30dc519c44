"""Parameter groups, AdamW and schedules against their definitions."""

import math

import pytest
import torch

from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.model import GPT
from fastchargpt.optim import learning_rate_at, make_adamw, parameter_groups


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5))
    decay, rest = parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)].rsplit(".", 1)[1] for p in rest["params"]} == {
        "weight",
        "bias",
    }  # LayerNorm's weights, and biases
    assert all(p.dim() >= 2 for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    model.transformer.wpe.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.3)[0]["params"]) == len(decay["params"]) - 1


def test_adamw_equals_its_definition() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = make_adamw(model, weight_decay=0.1, learning_rate=0.01, betas=(0.9, 0.95))
    expected = weight.detach().double().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 6):
        gradient = torch.randn(3, 4)
        weight.grad = gradient
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        expected -= 0.01 * 0.1 * expected
        expected -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_cosine_is_nanogpts() -> None:
    config = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, max_iters=100)
    for iteration in range(120):
        if iteration < 10:
            expected = 1e-3 * (iteration + 1) / 11
        elif iteration > 100:
            expected = 1e-4
        else:
            expected = 1e-4 + 0.5 * (1 + math.cos(math.pi * (iteration - 10) / 90)) * 9e-4
        assert learning_rate_at(iteration, config) == pytest.approx(expected, rel=1e-15)


def test_other_schedules() -> None:
    shared = dict(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=110, cooldown_fraction=0.25)
    linear = TrainConfig(schedule="linear", **shared)  # type: ignore[arg-type]
    assert [learning_rate_at(i, linear) for i in (10, 60, 110, 500)] == [1.0, 0.5, 0.0, 0.0]
    stable = TrainConfig(schedule="wsd", **shared)  # type: ignore[arg-type]
    assert [learning_rate_at(i, stable) for i in (10, 85, 110)] == [1.0, 1.0, 0.0]
    assert learning_rate_at(97, stable) == pytest.approx(1 - 12 / 25)
    constant = TrainConfig(schedule="constant", **shared)  # type: ignore[arg-type]
    assert [learning_rate_at(i, constant) for i in (0, 10, 10_000)] == [1 / 11, 1.0, 1.0]
    short = TrainConfig(schedule="cosine", warmup_iters=50, max_iters=20)
    assert all(0 < learning_rate_at(i, short) <= 1e-3 for i in range(60))
