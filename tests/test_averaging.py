"""Averaged weights: the formula, the run that evaluates and saves them, and going on exactly."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_cases import batches, make_step
from graph_stand_in import RecordedGraphs
from native_library import require
from test_trainer import CONFIG, FP32, MODEL, corpus

from fastchargpt.averaging import WeightAverage
from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.config import GPTConfig
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.evaluation import evaluate
from fastchargpt.loading import load
from fastchargpt.model import GPT
from fastchargpt.native_step import native_step_problem
from fastchargpt.step import make_train_step
from fastchargpt.trainer import Trainer

DECAY = 0.8


def expected(history: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The weighted mean of the weights after each step, in float64."""
    weights = torch.tensor([DECAY**age for age in range(len(history))][::-1], dtype=torch.float64)
    stacked = [torch.stack(each).double() for each in zip(*history, strict=True)]
    return [torch.tensordot(weights / weights.sum(), each, dims=1) for each in stacked]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("captured", [False, True])
def test_it_is_the_weighted_mean_and_the_steps_own_weights_come_back(captured: bool) -> None:
    plain, step = make_step(None), make_step(RecordedGraphs() if captured else None)
    step.average = WeightAverage(step.model, DECAY)
    history = []
    for x, y in batches(9):
        plain(x, y)
        step(x, y)
        history.append(weights(step.model))
    own = weights(step.model)
    for a, b in zip(own, plain.model.parameters(), strict=True):  # averaging does not touch the training
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    with step.averaged():
        for found, true in zip(step.model.parameters(), expected(history), strict=True):
            torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(own, step.model.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError), step.averaged():
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(own, step.model.parameters(), strict=True))
    with plain.averaged():
        pass


def test_the_native_step_keeps_it_too() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.family("modern", vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=16))
    require(native_step_problem(model))
    step = make_train_step(model, engine="native", learning_rate=1e-2, ema_decay=DECAY)
    history = []
    for x, y in batches(5):
        step(x, y)
        history.append(weights(model))
    x, y = batches(1)[0]
    assert step.native is not None
    before = step.native.loss(x, y)
    with step.averaged():
        for found, true in zip(model.parameters(), expected(history), strict=True):
            torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-6)
        inside = step.native.loss(x, y)
        torch.testing.assert_close(inside, model(x, y)[1].detach(), rtol=0, atol=1e-5)
    assert abs(inside - before) > 1e-4
    assert torch.equal(step.native.loss(x, y), before)


def test_a_run_evaluates_and_keeps_the_average(tmp_path: Path) -> None:
    fields: dict[str, Any] = dict(max_iters=20, eval_interval=20)
    plain = Trainer(MODEL, dataclasses.replace(CONFIG, **fields), corpus(), log=lambda _: None)
    plain.run()
    trainer = Trainer(
        MODEL, dataclasses.replace(CONFIG, ema_decay=DECAY, **fields), corpus(), out_dir=tmp_path, log=lambda _: None
    )
    result = trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))
    assert result.val_loss != plain.val_loss
    with trainer.step.averaged():
        assert evaluate(trainer.model, corpus().val, block_size=8, precision=FP32).loss == result.val_loss
        averaged = copy.deepcopy(trainer.model.state_dict())
    best, last = load_checkpoint(tmp_path / "best"), load_checkpoint(tmp_path / "last", with_trainer=True)
    assert all(torch.equal(best.weights[name], value) for name, value in averaged.items())
    assert all(torch.equal(last.weights[name], value) for name, value in trainer.model.state_dict().items())
    model, _ = load(tmp_path)  # what is sampled from
    assert evaluate(model, corpus().val, block_size=8, precision=FP32).loss == result.val_loss


def test_a_state_without_it_is_another_kind_of_run(tmp_path: Path) -> None:
    Trainer(MODEL, dataclasses.replace(CONFIG, max_iters=5), corpus(), out_dir=tmp_path, log=lambda _: None).run()
    other = Trainer(MODEL, dataclasses.replace(CONFIG, ema_decay=DECAY), corpus(), out_dir=tmp_path, log=lambda _: None)
    with pytest.raises(CheckpointError, match="another kind of run"):
        other.resume()
    average = WeightAverage(GPT(MODEL), DECAY)
    with pytest.raises(ValueError, match="another model's"):
        average.load_state_dict({"updates": 1, "sums": {}})
    with pytest.raises(ConfigError, match=r"ema_decay must be in \[0, 1\)"):
        dataclasses.replace(CONFIG, ema_decay=1.0)
