"""The step as one CUDA graph. On a CPU all that surrounds the graph is exercised: a recorder keeps a graph's rules."""

import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captured_cases import FP32, assert_same_weights, batches, make_step, rate, run
from graph_stand_in import RecordedGraphs

from fastchargpt.batches import TokenBatches
from fastchargpt.captured import MAX_GRAPHS, WARM_UP_STEPS
from fastchargpt.config import TrainConfig
from fastchargpt.faults import NumberWatch
from fastchargpt.optim import make_optimizer
from fastchargpt.step import TrainStep


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("parts", "clip", "dropout"), [(1, 0.5, 0.0), (2, 0.0, 0.2), (2, 0.5, 0.2)])
def test_equals_the_plain_step(optimizer: str, parts: int, clip: float, dropout: float) -> None:
    settings: dict[str, Any] = dict(optimizer=optimizer, parts=parts, clip=clip, dropout=dropout)
    graphs, data = RecordedGraphs(), batches(12)
    plain, captured = make_step(None, **settings), make_step(graphs, **settings)
    expected, norms = [], []
    for x, y in data:
        expected.append(plain(x, y).item())
        norms.append(plain.grad_norms)
    torch.manual_seed(3)
    losses = []
    for (x, y), norm in zip(data, norms, strict=True):
        losses.append(captured(x, y))
        if norm is not None:
            torch.testing.assert_close(captured.grad_norms, norm, rtol=1e-4, atol=1e-6)
            assert captured.grad_norm == pytest.approx(norm.norm().item(), rel=1e-4)
    assert [loss.item() for loss in losses] == pytest.approx(expected, abs=1e-6)
    assert_same_weights(plain, captured)
    assert (graphs.warm_ups, graphs.captures, graphs.replays) == (WARM_UP_STEPS, 1, len(data) - WARM_UP_STEPS)
    assert captured.norm_names == plain.norm_names
    assert captured.iteration == plain.iteration == len(data)
    assert captured.learning_rate == plain.learning_rate
    assert (captured.grad_norm is None) == (clip == 0.0)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_dropout_differs_from_replay_to_replay(attention: str) -> None:
    step = make_step(RecordedGraphs(), dropout=0.3, schedule=lambda _: 0.0, attention=attention)
    [data] = batches(1)
    losses = run(step, [data] * 9)
    assert len(set(losses)) == 9
    still = make_step(RecordedGraphs(), dropout=0.0, schedule=lambda _: 0.0, attention=attention)
    assert len(set(run(still, [data] * 9))) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("target", ["captured", "plain"])
def test_state_goes_on_in_either_kind_of_step(optimizer: str, target: str) -> None:
    data = batches(14)
    whole = make_step(None, optimizer=optimizer)
    expected = run(whole, data)
    first = make_step(RecordedGraphs(), optimizer=optimizer)
    run(first, data[:6])
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(first.model.state_dict())
    plain = make_step(None, optimizer=optimizer)
    run(plain, data[:6])
    for ours, theirs in zip(
        state["optimizer"]["param_groups"], plain.state_dict()["optimizer"]["param_groups"], strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert type(ours["lr"]) is float
        assert ours == {**theirs, "lr": pytest.approx(theirs["lr"])}
    second = make_step(RecordedGraphs() if target == "captured" else None, optimizer=optimizer)
    run(second, data[6:12])  # until it has a graph of its own, of the state that is now replaced
    second.model.load_state_dict(weights)
    second.load_state_dict(state)
    assert run(second, data[6:]) == pytest.approx(expected[6:], abs=1e-5)
    assert second.iteration == 14


def test_a_state_loaded_behind_its_back_is_seen() -> None:
    data, graphs = batches(6), RecordedGraphs()
    step = make_step(graphs)
    run(step, data)
    assert graphs.captures == 1
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    run(step, data)
    assert graphs.captures == 2


def test_each_shape_has_its_graph_until_there_are_too_many() -> None:
    graphs = RecordedGraphs()
    plain, captured = make_step(None), make_step(graphs)
    lengths = range(4, 4 + MAX_GRAPHS)
    data = list(itertools.chain.from_iterable(zip(*(batches(6, length=length) for length in lengths), strict=True)))
    assert run(captured, data) == pytest.approx(run(plain, data), abs=1e-6)
    assert graphs.captures == MAX_GRAPHS
    assert captured.captured is not None
    assert captured.captured.problem is None
    more = batches(5, length=3)
    with pytest.warns(RuntimeWarning, match=f"without a CUDA graph: the batches have had more than {MAX_GRAPHS} shape"):
        found = run(captured, more)
    assert found == pytest.approx(run(plain, more), abs=1e-6)
    replays = graphs.replays
    run(captured, data[: len(lengths)])  # the graphs that are there still serve
    assert graphs.replays == replays + MAX_GRAPHS


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_capture_that_fails_changes_nothing_but_the_way(where: str) -> None:
    def look(*tensors: Any) -> None:
        tensors[-1].sum().item()  # a GPU would have to be waited for

    def spoil(step: TrainStep) -> TrainStep:
        if where == "forward":
            step.model.transformer.ln_f.register_forward_hook(look)
        else:  # the embedding's gradient comes last: the others are there already
            step.model.transformer.wte.weight.register_hook(look)
        return step

    data, settings = batches(10), dict(optimizer="muon", dropout=0.2)
    expected = run(spoil(make_step(None, **settings)), data)  # type: ignore[arg-type]
    graphs = RecordedGraphs()
    step = spoil(make_step(graphs, **settings))  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted when stream is capturing$"):
        found = run(step, data)
    assert found == pytest.approx(expected, abs=1e-6)
    assert (graphs.warm_ups, graphs.captures) == (WARM_UP_STEPS, 0)


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_a_supplys_batches_are_gathered_in_the_graph(order: Any) -> None:
    tokens = torch.randint(11, (40,), generator=torch.Generator().manual_seed(5)).numpy().astype(np.uint16)
    plain, captured = make_step(None), make_step(RecordedGraphs())
    expected, found = [], []
    for step, losses in ((plain, expected), (captured, found)):
        supply = TokenBatches(tokens, batch_size=3, block_size=8, order=order, seed=4)
        losses += [step.take(supply) for _ in range(9)]
        state = supply.state_dict()
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-6)
    assert len({round(loss.item(), 6) for loss in found}) == 9
    other = TokenBatches(tokens, batch_size=3, block_size=8, order=order, seed=4)
    for _ in range(9):
        other.next_batch()
    assert torch.equal(state["rng"], other.state_dict()["rng"])
    assert {**state, "rng": 0} == {**other.state_dict(), "rng": 0}


def test_a_rate_that_somebody_else_sets() -> None:
    data = batches(12)
    for make in (
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i),
        lambda optimizer: _ByHand(optimizer),
    ):
        losses = []
        for graphs in (None, RecordedGraphs()):
            step = make_step(graphs, schedule=None)
            schedule = make(step.optimizer)
            found = []
            for x, y in data:
                found.append(step(x, y).item())
                schedule.step()
            losses.append(found)
        assert losses[1] == pytest.approx(losses[0], abs=1e-6)


class _ByHand:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = float(group["lr"]) / 2


@pytest.mark.parametrize("order", ["random", "epochs"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("captured", [False, True])
def test_nothing_is_read_from_the_device(
    order: Any, optimizer: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are no values: whatever a step would read of its tensors is an error.

    What is drawn on the host and sent there is not, nor is holding the losses for the next log line.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_adamw_.tensor_lr", lambda *_, **__: None, "Meta")  # the one kernel that torch lacks there
        adam = importlib.import_module("torch.optim.adam")
        monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)
        meta = make_step(None, optimizer=optimizer, dropout=0.1).model.to("meta")
        step = TrainStep(
            meta,
            make_optimizer(meta, TrainConfig(optimizer=optimizer)),  # type: ignore[arg-type]
            precision=FP32,
            grad_clip=1.0,
            gradient_accumulation_steps=2,
            compile=False,
            learning_rate=rate,
            graphs=_Again() if captured else None,
        )
        if captured:
            for group in step.optimizer.param_groups:
                group.update(fused=True, foreach=False)
        supply = TokenBatches(
            np.arange(50, dtype=np.uint16) % 11, batch_size=4, block_size=8, order=order, device="meta", seed=1
        )
        watch = NumberWatch(step, last_good=lambda: "", log=print)
        for _ in range(8):
            watch.note(step.take(supply))
        assert step.iteration == 8
        with pytest.raises(RuntimeError, match="meta"):
            watch.read()  # a log line does read


class _Again:
    """A graph's place with nothing recorded: the recorder itself would look at memory that meta tensors lack."""

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        return body
