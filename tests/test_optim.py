"""Parameter groups, AdamW and schedules against their definitions; Muon against float64 and torch's own."""

import math

import pytest
import torch

from fastchargpt.config import GPTConfig, TrainConfig
from fastchargpt.model import GPT
from fastchargpt.optim import (
    Muon,
    learning_rate_at,
    make_adamw,
    make_muon,
    orthogonalise,
    parameter_groups,
    shape_factor,
)


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


# -- Muon

SIZES = {"vocab_size": 65, "block_size": 40, "n_layer": 3, "n_head": 4, "n_embd": 64}


def test_orthogonalising_equals_the_iteration_in_float64():
    for shape in ((3, 64, 64), (2, 64, 256), (2, 256, 64)):
        matrices = torch.randn(shape, dtype=torch.float64)
        found = orthogonalise(matrices.float()).double()
        expected = orthogonalise(matrices)
        assert (found - expected).norm() / expected.norm() < 1e-4
        values = torch.linalg.svdvals(expected)
        assert values.max() < 1.3
        assert (values > 0.3).double().mean() > 0.95  # the iteration takes most of them into about [0.7, 1.2]


def test_muon_is_torchs_own_for_one_matrix():
    torch.manual_seed(0)
    for shape in ((96, 48), (48, 96), (64, 64)):
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)) for _ in range(2))
        mine = Muon([(ours, (shape[0],))], [], lr=1.0, matrix_lr=0.02, momentum=0.95, weight_decay=0.1)
        other = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True)
        for _ in range(4):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            before = theirs.detach().clone()
            mine.step()
            other.step()
            # torch's iterates in bfloat16
            change = (theirs - before).norm()
            assert (ours - theirs).norm() < 0.03 * change * 4


def test_stacked_matrices_are_orthogonalised_one_by_one():
    model = GPT(GPTConfig.family("modern", n_kv_head=2, **SIZES))
    optimizer = make_muon(
        model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, betas=(0.9, 0.95), momentum=0.0
    )
    weight = model.transformer.h[0].attn.c_attn.weight
    assert optimizer.blocks(weight) == (64, 32, 32)
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for part, grad in zip((before - weight.detach()).split((64, 32, 32)), weight.grad.split((64, 32, 32)), strict=True):
        expected = 0.02 * shape_factor(*part.shape) * orthogonalise(grad[None])[0]
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-5)


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    model = GPT(GPTConfig.family("lecture", **SIZES))
    optimizer = make_muon(model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    matrices = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert names == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    others = {id(p) for group in optimizer.param_groups if not group["muon"] for p in group["params"]}
    assert others | matrices == {id(p) for p in model.parameters()}
