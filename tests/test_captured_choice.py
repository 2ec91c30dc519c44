"""Who decides that a step becomes a CUDA graph: the choice and its reason, and a run that asks for one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_cases import FP32, assert_same_weights, make_step
from graph_stand_in import RecordedGraphs
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt.choices import choose_graph
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.model import GPT
from fastchargpt.precision import Precision
from fastchargpt.step import make_train_step
from fastchargpt.trainer import Trainer


def test_the_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(None)
    model, optimizer = step.model, step.optimizer
    assert isinstance(model, GPT)

    def choose(mode: Any, chosen: Precision = FP32, opt: torch.optim.Optimizer = optimizer, **more: Any) -> Any:
        return choose_graph(mode, model, opt, chosen, **{"tokens": 16_384, **more})

    assert choose("off").reason == "asked for"
    assert choose("auto").reason == "CUDA graphs are for CUDA GPUs, and the model is on cpu"
    with pytest.raises(BackendUnavailableError, match=r"cuda_graph=on cannot be served: .* on cpu; use --cuda-"):
        choose("on")
    with pytest.raises(BackendUnavailableError, match=r"cuda_graph=True cannot be served: .* on cpu"):
        make_train_step(model, cuda_graph=True)
    with pytest.raises(ConfigError, match="cuda_graph must be auto, on or off"):
        choose("yes")
    monkeypatch.setattr("fastchargpt.choices._device_types", lambda model: {"cuda"})
    assert choose("auto").on
    assert "TFLOP" in choose("auto").reason
    assert "keep a GPU busy" in choose("auto", tokens=10**10).reason
    assert choose("on", tokens=10**10).on
    fp16 = Precision(name="fp16", reason="test")
    sgd = torch.optim.SGD(model.parameters())
    for problem, arguments in (
        ("scaler", dict(chosen=fp16)),
        ("this is SGD", dict(opt=sgd)),
        ("deterministic", dict(deterministic=True)),
    ):
        choice = choose("auto", **arguments)
        assert not choice.on
        assert problem in choice.reason
        with pytest.raises(BackendUnavailableError, match=problem):
            choose("on", **arguments)
    other = torch.nn.Linear(2, 2)
    assert "Linear" in choose_graph("auto", other, optimizer, FP32, tokens=1).reason
    assert choose_graph("on", other, optimizer, FP32, tokens=1).on


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer(MODEL, CONFIG, corpus(), log=lambda _: None)
    expected = plain.run()
    monkeypatch.setattr("fastchargpt.choices.graph_problem", lambda *_: None)
    monkeypatch.setattr("fastchargpt.step.graph_problem", lambda *_: None)
    monkeypatch.setattr("fastchargpt.step.CudaGraphs", lambda device: RecordedGraphs())
    lines: list[str] = []
    for life, steps in enumerate((13, 20)):  # and a life in between, resumed
        config = dataclasses.replace(CONFIG, cuda_graph="on", engine="torch", max_iters=steps, lr_decay_iters=20)
        run = Trainer(MODEL, config, corpus(), out_dir=tmp_path, log=lines.append)
        assert "cuda graph on: asked for" in run.describe()
        if life:
            assert run.resume() == 13
        result = run.run()
        assert run.step.captured is not None
        assert run.step.captured.captured == 1
    assert result.val_loss == pytest.approx(expected.val_loss, abs=1e-5)
    assert_same_weights(run.step, plain.step, 1e-3)
