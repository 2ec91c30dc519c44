"""Numbers that are no longer finite and memory that runs out: what is said, what is skipped, what is saved."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.errors import TrainingError
from fastchargpt.faults import first_not_finite, is_out_of_memory
from fastchargpt.model import GPT
from fastchargpt.precision import Precision
from fastchargpt.step import TrainStep
from fastchargpt.trainer import Trainer

NAME = "transformer.h.0.mlp.c_fc.weight"


def trainer(out_dir: Path | None = None, log: Callable[[str], None] = lambda line: None, **fields: Any) -> Trainer:
    return Trainer(MODEL, dataclasses.replace(CONFIG, **fields), corpus(), out_dir=out_dir, log=log)


def poison(run: Trainer, when: Callable[[int], bool], value: float = math.nan) -> None:
    """Spoil one entry of one parameter's gradient in some steps; the losses stay finite until the next step."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if when(run.step.iteration):
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    dict(run.model.named_parameters())[NAME].register_hook(spoil)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_interval", [1, 3, 100])
def test_a_gradient_that_is_not_finite_names_its_parameter(tmp_path: Path, value: float, log_interval: int) -> None:
    run = trainer(tmp_path, log_interval=log_interval)
    poison(run, lambda iteration: iteration == 7, value)
    with pytest.raises(TrainingError) as caught:
        run.run()
    said = str(caught.value)
    # however late it is read, the gradient is what was wrong first
    assert said.startswith(f"the gradient of {NAME} is not finite at step 7 (learning rate 0.00")
    assert f"gradient norm {value}" in said
    assert f"the last good checkpoint is {tmp_path / 'last'}, of step 5" in said
    last = load_checkpoint(tmp_path / "last", with_trainer=True)
    assert last.info["iteration"] == 5
    assert all(torch.isfinite(weight).all() for weight in last.weights.values())


def test_norms_are_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = GPT(MODEL), GPT(MODEL)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(5, (4, 8))
    step = TrainStep(
        ours.eval(),
        torch.optim.SGD(ours.parameters(), lr=1.0),
        precision=Precision(name="fp32", reason="test"),
        grad_clip=0.01,
        gradient_accumulation_steps=1,
        compile=False,
        learning_rate=None,
    )
    step(x, x)
    theirs.eval()(x, x)[1].backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    assert step.grad_norm is not None
    assert step.grad_norms is not None
    assert torch.equal(step.grad_norm, norm)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert step.norm_names == [name for name, _ in ours.named_parameters()]
    assert len(step.grad_norms) == len(step.norm_names)


def scaled(run: Trainer) -> list[int]:
    """Give a run on a CPU a real gradient scaler, fp16's but for the number format; the steps that updated."""
    updated: list[int] = []
    run.step.precision = run.precision = dataclasses.replace(run.precision, name="fp16")
    run.step._scaler = torch.amp.GradScaler("cpu", enabled=True)
    original, weight = run.step.optimizer.step, run.model.lm_head.weight

    def step(*arguments: Any, **named: Any) -> Any:
        before = weight.detach().clone()
        result = original(*arguments, **named)  # torch's fused optimisers skip inside
        if not torch.equal(before, weight):
            updated.append(run.step.iteration)
        return result

    run.step.optimizer.step = step  # type: ignore[method-assign]
    return updated


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr(Precision, "autocast", lambda self, device: contextlib.nullcontext())


def test_the_scaler_skips_and_says_so(tmp_path: Path, no_autocast: None) -> None:
    lines: list[str] = []
    run = trainer(tmp_path, lines.append, log_interval=5)
    updated = scaled(run)
    poison(run, lambda iteration: iteration in (6, 7), math.inf)
    assert run.run().iterations == 20
    assert updated == [i for i in range(20) if i not in (6, 7)]
    told = [line for line in lines if line.startswith("skipped")]
    assert len(told) == 1
    assert f"skipped 2 of 4 steps, the last at 7: the scaled gradient of {NAME} left fp16's range" in told[0]
    assert first_not_finite(run.model) is None
    assert run.step.state_dict()["scaler"]["scale"] == 2.0**16 / 4


def test_a_run_that_only_skips_is_stopped(no_autocast: None) -> None:
    run = trainer(max_iters=1000, eval_interval=1000)
    updated = scaled(run)
    poison(run, lambda iteration: iteration >= 3, math.inf)
    with pytest.raises(TrainingError, match=rf"the gradient of {NAME} is not finite at step 43 "):
        run.run()
    assert updated == [0, 1, 2]


def test_weights_that_overflow_are_never_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_interval=5)
    original = run.step.optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if run.step.iteration == 9:  # a position that nothing is read at in a split this short would do the same
            with torch.no_grad():
                dict(run.model.named_parameters())["transformer.wte.weight"][0, 0] = math.inf
        return result

    run.step.optimizer.step = step  # type: ignore[method-assign]
    run.model.eval()
    with pytest.raises(TrainingError, match=r"of step 5"):
        run.run()
    assert load_checkpoint(tmp_path / "last").info["iteration"] == 5
    with pytest.raises(TrainingError, match=r"the weight \S+ is not finite after step 9 .*of step 5"):
        run._save_last()


def test_out_of_memory_saves_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    plain = run.step._loss

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if run.step.iteration == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x, y)

    run.step._loss = loss
    with pytest.raises(TrainingError, match=r"out of memory at step 7: lower --batch-size .*last, of step 7$"):
        run.run()
    assert load_checkpoint(tmp_path / "last", with_trainer=True).info["iteration"] == 7
    smaller = trainer(tmp_path, batch_size=2, gradient_accumulation_steps=2)
    assert smaller.resume() == 7
    assert smaller.run().iterations == 20


def test_out_of_memory_in_the_middle_of_an_update_saves_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    original = run.step.optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        if run.step.iteration == 7:
            raise MemoryError
        return original(*arguments, **named)

    run.step.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"out of memory at step 7: .*last, of step 5$"):
        run.run()
    assert load_checkpoint(tmp_path / "last").info["iteration"] == 5


def test_which_errors_are_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


def test_the_loss_is_looked_at_on_log_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a GPU each look waits for the device: none may come between two log lines
    run = trainer(log_interval=10, max_iters=100, eval_interval=1000)
    looks: list[int] = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def look(tensor: torch.Tensor, *rest: Any, original: Any = original, **named: Any) -> Any:
            if tensor.is_floating_point() and 0 < run.step.iteration < 100:
                looks.append(run.step.iteration - 1)
            return original(tensor, *rest, **named)

        monkeypatch.setattr(torch.Tensor, name, look)
    run.run()
    assert looks
    assert {iteration % 10 for iteration in looks} == {0}
