"""Where the native step does not serve: what is left to torch and why, what is refused, and what memory it takes."""

import pytest
import torch
from native_cases import V, make_batch, make_model, needs_the_library  # noqa: F401 (a fixture, used by every test)

from fastchargpt import make_train_step
from fastchargpt.choices import choose_engine
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels import cpu_train
from fastchargpt.native_step import NativeStep, native_step_problem
from fastchargpt.precision import choose_precision


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: make_model().double(), "float64"),
        (lambda: make_model(n_embd=72, n_head=3), "multiples of 16"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_what_it_cannot_do_is_said_and_left_to_torch(change, says):
    model = change()
    assert says in native_step_problem(model)
    precision = choose_precision("fp32", torch.device("cpu"))
    choice = choose_engine("auto", model, precision, compile=False)
    assert not choice.native
    assert says in choice.reason
    with pytest.raises(BackendUnavailableError, match=says):
        choose_engine("native", model, precision, compile=False)


def test_frozen_weights_hooks_and_named_backends_are_left_to_torch():
    model = make_model()
    model.transformer.wte.weight.requires_grad_(False)
    assert "frozen" in native_step_problem(model)
    model = make_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "hooks" in native_step_problem(model)
    model = make_model()
    model.set_attention("naive")
    assert "by name" in native_step_problem(model)


def test_other_precisions_and_compiled_steps_are_left_to_torch():
    model = make_model()
    cpu = torch.device("cpu")
    assert "bf16" in choose_engine("auto", model, choose_precision("bf16", cpu), compile=False).reason
    assert "compiled" in choose_engine("auto", model, choose_precision("fp32", cpu), compile=True).reason
    assert choose_engine("torch", model, choose_precision("fp32", cpu), compile=False).reason == "asked for"
    with pytest.raises(ConfigError, match="engine must be"):
        choose_engine("gpu", model, choose_precision("fp32", cpu), compile=False)


def test_without_a_library_the_step_is_torchs(monkeypatch):
    def missing():
        raise BackendUnavailableError("no compiler today")

    monkeypatch.setattr("fastchargpt.native_step.library", missing)
    model = make_model()
    step = make_train_step(model)
    assert step.native is None
    assert torch.isfinite(step(*make_batch(model, 2, 20)))
    with pytest.raises(BackendUnavailableError, match="no compiler today"):
        make_train_step(model, engine="native")


def test_bad_batches_are_refused():
    model = make_model()
    step = NativeStep(model)
    x, y = make_batch(model, 2, 20)
    for bad in (x.clone().fill_(V), x.clone().fill_(-1)):
        with pytest.raises(IndexError, match="vocabulary of 65"):
            step(bad, y)
    with pytest.raises(IndexError, match="vocabulary"):
        step(x, y.clone().fill_(V))
    with pytest.raises(ConfigError, match="does not fit in block_size"):
        step(*make_batch(model, 2, 41))


def test_memory_that_cannot_be_had_is_an_error(monkeypatch):
    model = make_model()
    step = NativeStep(model)
    monkeypatch.setattr(step._native._lib, "ft_run", lambda *_: 1)
    with pytest.raises(MemoryError, match="2 x 20 tokens"):
        step(*make_batch(model, 2, 20))
    assert cpu_train.WIDTH == 16


def test_its_memory_is_told():
    step = NativeStep(make_model())
    few, many = (make_batch(step.model, rows, 20) for rows in (2, 40))
    step(*few)
    small = step.held_bytes
    step(*many)
    assert small > 0
    assert step.held_bytes > small
