"""Dropout in the native step: masks of Philox at every site, seeds from torch's generator, none in evaluation."""

import copy

import pytest
import torch
from native_cases import (
    assert_near,
    gradients,
    make_batch,
    make_model,
    needs_the_library,  # noqa: F401 (a fixture, used by every test)
    reference,
    some_threads,  # noqa: F401 (a fixture, used by name)
)

from fastchargpt import native_step
from fastchargpt.kernels.philox import draw_seeds, keep_mask, keep_probability
from fastchargpt.native_step import NativeStep


class Dropped(torch.nn.Module):
    """Dropout whose mask comes from a seed."""

    def __init__(self, seed, dropout_p):
        super().__init__()
        self.seed, self.dropout_p = seed, dropout_p

    def forward(self, x):
        keep = keep_mask(self.seed, x.shape[0], 1, x.shape[1], x.shape[2], self.dropout_p)[:, 0]
        return x * keep / keep_probability(self.dropout_p)


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("switches", [{}, {"n_kv_head": 2}, {"family": "modern"}, {"n_embd": 48, "n_head": 1}], ids=str)
def test_dropout_is_philox_at_every_site(threads, monkeypatch, switches, embedded):
    dropout_p = 0.3
    model = make_model(**{**switches, "dropout": dropout_p, "embd_dropout": embedded, "block_size": 115}).train()
    seeds = draw_seeds(3 * model.config.n_layer + 1)
    monkeypatch.setattr(native_step, "draw_seeds", lambda count: seeds.clone() if count == len(seeds) else None)
    step = NativeStep(model)
    for rows, length in ((3, 115), (5, 17), (2, 1)):
        x, y = make_batch(model, rows, length)
        wide = copy.deepcopy(model).double()
        wide.set_attention("naive")
        if wide.rope is not None:
            wide.rope = wide.rope.double()
        if embedded:
            wide.transformer.drop = Dropped(seeds[:1], dropout_p)
        for layer, block in enumerate(wide.transformer.h):
            block.attn.resid_dropout = Dropped(seeds[3 * layer + 2].view(1), dropout_p)
            block.mlp.dropout = Dropped(seeds[3 * layer + 3].view(1), dropout_p)
        of_weights = iter(seeds[1::3])
        with monkeypatch.context() as patch:
            patch.setattr("fastchargpt.attention.draw_seed", lambda device, left=of_weights: next(left).view(1))
            loss = wide(x, y)[1]
        loss.backward()
        assert float(step(x, y)) == pytest.approx(float(loss.detach()), abs=3e-6)
        assert_near(gradients(model), gradients(wide), 5e-6)


def test_dropout_follows_torchs_generator_and_is_off_in_evaluation():
    model = make_model(dropout=0.5)
    step, (x, y) = NativeStep(model), make_batch(model, 4, 40)

    def losses(count):
        torch.manual_seed(5)
        return [float(step(x, y)) for _ in range(count)]

    first = losses(3)
    assert first == losses(3)
    assert len(set(first)) == 3
    plain, _ = reference(model.eval(), x, y)
    assert float(step.loss(x, y)) == pytest.approx(plain, abs=3e-6)
    state = torch.get_rng_state()
    assert float(step(x, y)) == pytest.approx(plain, abs=3e-6)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert float(step.loss(x, y)) == pytest.approx(plain, abs=3e-6)
