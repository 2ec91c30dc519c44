"""Activation checkpointing: the same losses, gradients and dropout for less memory."""

import dataclasses
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, MODEL, corpus
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastchargpt.choices import choose_engine, graph_problem
from fastchargpt.config import GPTConfig
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.model import GPT
from fastchargpt.precision import Precision
from fastchargpt.trainer import Trainer

SHAPE: dict[str, Any] = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, proj_init="normal")


def make(on: bool, family: str = "nanogpt", attention: str = "naive", **fields: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.family(family, **{**SHAPE, **fields}))  # type: ignore[arg-type]
    model.set_attention(attention)
    model.checkpoint_activations = on
    return model


def data(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randint(11, (2, batch, 16), generator=torch.Generator().manual_seed(1))
    return x, y


@pytest.mark.parametrize("attention", ["naive", "sdpa"])  # the first drops by Philox, the second by torch's own
@pytest.mark.parametrize(("family", "dropout"), [("nanogpt", 0.0), ("nanogpt", 0.3), ("modern", 0.3)])
def test_losses_gradients_and_generator_are_equal(family: str, dropout: float, attention: str) -> None:
    found = []
    for on in (False, True):
        model = make(on, family, attention, dropout=dropout)
        torch.manual_seed(5)
        losses = []
        for _ in range(2):  # gradients add up; the second pass drops other activations than the first
            loss = model(*data())[1]
            loss.backward()
            losses.append(loss.detach())
        found.append((losses, [p.grad for p in model.parameters()], torch.get_rng_state()))
    for plain, again in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        assert torch.equal(plain, again)
    assert torch.equal(found[0][2], found[1][2])
    assert (not torch.equal(*found[1][0])) == (dropout > 0.0)


class Live(TorchDispatchMode):
    """The most bytes that the results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.held())
        return result

    def held(self) -> int:
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        return sum(size for _, size in self._storages.values())


def test_it_holds_less() -> None:
    held, peak = [], []
    for on in (False, True):
        model = make(on, n_layer=8, attention="sdpa")
        for parameter in model.parameters():  # what the gradients take is the same in both
            parameter.grad = torch.zeros_like(parameter)
        with Live() as live:
            loss = model(*data(batch=16))[1]
            held.append(live.held())
            loss.backward()
        peak.append(live.peak)
    # eight blocks' activations against eight inputs, and at the worst moment one block's besides
    assert held[1] < held[0] / 4
    assert peak[1] < peak[0] / 2


def test_nothing_is_computed_twice_without_gradients() -> None:
    model, calls = make(True), []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(*data())
    assert len(calls) == 1
    model(*data())[1].backward()
    assert len(calls) == 3


def test_it_can_be_compiled() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    plain, model = (make(on, n_layer=1, attention="sdpa", dropout=0.3) for on in (False, True))
    # the whole graph, with gradients, but no machine code: that takes half a minute
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one in (plain, compiled):
        torch.manual_seed(5)
        one(*data())[1].backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch._dynamo.reset()


def test_a_run_is_the_same_and_says_who_steps_aside() -> None:
    runs = []
    for on in (False, True):
        trainer = Trainer(
            MODEL, dataclasses.replace(CONFIG, checkpoint_activations=on), corpus(), log=lambda line: None
        )
        runs.append((trainer.run().val_loss, list(trainer.model.parameters())))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    fp32, model = Precision(name="fp32", reason="test"), make(True)
    choice = choose_engine("auto", model, fp32, compile=False)
    assert not choice.native
    assert choice.reason == "activation checkpointing was asked for, and the native step keeps every activation"
    with pytest.raises(BackendUnavailableError, match="engine=native cannot be served: activation checkpointing"):
        choose_engine("native", model, fp32, compile=False)


def test_its_dropout_keeps_a_step_out_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastchargpt.choices._device_types", lambda model: {"cuda"})
    fp32 = Precision(name="fp32", reason="test")
    for dropout, on, says in ((0.0, True, None), (0.1, False, None), (0.1, True, "the generator's state")):
        model = make(on, dropout=dropout)
        found = graph_problem(model, torch.optim.AdamW(model.parameters()), fp32)
        assert found == says or (says and found and says in found)
