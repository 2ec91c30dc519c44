"""The native training step equals torch: losses and gradients against float64, updates against torch.optim."""

import copy
import math

import pytest
import torch
from native_cases import (
    V,
    assert_near,
    gradients,
    make_batch,
    make_model,
    needs_the_library,  # noqa: F401 (a fixture, used by every test)
    reference,
    some_threads,  # noqa: F401 (a fixture, used by name)
)

from fastchargpt import TrainConfig, make_train_step
from fastchargpt.batches import place_tokens
from fastchargpt.evaluation import evaluate
from fastchargpt.native_step import NativeStep, native_update_problem
from fastchargpt.optim import make_muon, make_optimizer
from fastchargpt.precision import choose_precision

SWITCHES = [
    {},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "n_head": 2, "n_embd": 96},
    {"activation": "gelu_tanh"},
    {"activation": "relu"},
    {"activation": "relu2"},
    {"bias": True},
    {"qk_norm": True, "position": "rope"},
    {"qk_norm": True},
    {"norm": "rmsnorm"},
    {"logit_softcap": 3.0},
    {"tie_weights": False, "vocab_size": 16},
    {"n_layer": 1, "vocab_size": 130},
    {"n_layer": 2, "n_embd": 48, "n_head": 1},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("family", ["nanogpt", "lecture", "modern"])
def test_loss_and_gradients_equal_float64(threads, family, switches):
    model = make_model(family, **switches)
    step = NativeStep(model)
    for rows, length in ((3, 40), (2, 17), (5, 33), (1, 1)):
        x, y = make_batch(model, rows, length)
        if length > 1:
            y[0, :2] = -1
        loss, grads = reference(model, x, y)
        assert float(step(x, y)) == pytest.approx(loss, abs=3e-6)
        assert_near(gradients(model), grads, 5e-6)
        assert float(step.loss(x, y)) == pytest.approx(loss, abs=3e-6)


def test_long_sequences_pass_several_blocks_of_queries():
    model = make_model("modern", block_size=230)
    x, y = make_batch(model, 2, 230)
    loss, grads = reference(model, x, y)
    assert float(NativeStep(model)(x, y)) == pytest.approx(loss, abs=3e-6)
    assert_near(gradients(model), grads, 5e-6)


def test_many_tokens_pass_several_blocks_of_the_weight_gradient():
    model = make_model(block_size=40)
    x, y = make_batch(model, 15, 40)
    _, grads = reference(model, x, y)
    NativeStep(model)(x, y)
    assert_near(gradients(model), grads, 5e-6)


def test_the_same_bits_from_any_number_of_threads():
    x, y = make_batch(make_model(), 5, 40)
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 8):
            torch.set_num_threads(count)
            model = make_model("nanogpt", bias=True)
            optimizer = make_muon(
                model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95)
            )
            step = make_train_step(model, engine="native", optimizer=optimizer)
            losses = [float(step(x, y)) for _ in range(3)]
            found.append((losses, float(step.grad_norm), model.state_dict()))
    finally:
        torch.set_num_threads(before)
    for losses, norm, weights in found[1:]:
        assert losses == found[0][0]
        assert norm == found[0][1]
        assert all(torch.equal(weights[name], found[0][2][name]) for name in weights)


def test_gradients_are_scaled_and_added():
    model = make_model()
    step = NativeStep(model)
    x, y = make_batch(model, 4, 20)
    step(x, y)
    whole = gradients(model)
    step(x[:2], y[:2], scale=0.5)
    step(x[2:], y[2:], scale=0.5, add=True)
    assert_near(gradients(model), whole, 1e-5)


def test_large_logits_and_activations_stay_finite():
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    x, y = make_batch(model, 2, 40)
    loss, grads = reference(model, x, y)
    assert float(NativeStep(model)(x, y)) == pytest.approx(loss, rel=1e-4)
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    assert_near(gradients(model), grads, 0.05)


def test_a_weight_that_is_not_finite_is_not_hidden():
    model = make_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = math.nan
    step = make_train_step(model, engine="native")
    assert not torch.isfinite(step(*make_batch(model, 2, 20)))
    assert not torch.isfinite(step.grad_norms).all()


@pytest.mark.parametrize("family", ["nanogpt", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_steps_equal_torch(family, optimizer):
    config = TrainConfig(optimizer=optimizer, learning_rate=3e-3, matrix_learning_rate=0.02)
    runs = {}
    for engine in ("torch", "native"):
        model = make_model(family, n_layer=2)
        step = make_train_step(
            model,
            engine=engine,
            optimizer=make_optimizer(model, config),
            learning_rate=lambda iteration: 3e-3 * (1 - iteration / 60),
            gradient_accumulation_steps=2,
        )
        assert (step.native is not None) == (engine == "native")
        losses, norms = [], []
        for number in range(50):
            losses.append(float(step(*make_batch(model, 4, 24, seed=number % 7))))
            norms.append(float(step.grad_norm))
        runs[engine] = losses, norms
    assert runs["native"][0] == pytest.approx(runs["torch"][0], abs=1e-4)
    assert runs["native"][1] == pytest.approx(runs["torch"][1], rel=1e-3)
    assert runs["torch"][0][-1] < runs["torch"][0][0] - 0.1  # it did learn


def test_without_clipping_no_norm_is_kept():
    model = make_model()
    step = make_train_step(model, engine="native", grad_clip=0.0)
    plain = make_model()
    other = make_train_step(plain, engine="torch", grad_clip=0.0)
    x, y = make_batch(model, 3, 20)
    for _ in range(3):
        assert float(step(x, y)) == pytest.approx(float(other(x, y)), abs=1e-5)
    assert step.grad_norm is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_changes_engines_in_the_middle(optimizer):
    """The optimiser's state is torch's own, so a checkpoint knows no engine."""
    config = TrainConfig(optimizer=optimizer)

    def begin(engine):
        model = make_model("modern", n_layer=2)
        return model, make_train_step(model, engine=engine, optimizer=make_optimizer(model, config))

    model, whole = begin("torch")
    batches = [make_batch(model, 3, 24, seed=number) for number in range(8)]
    expected = [float(whole(*batch)) for batch in batches]
    first, native = begin("native")
    found = [float(native(*batch)) for batch in batches[:4]]
    second, torch_step = begin("torch")
    second.load_state_dict(first.state_dict())
    torch_step.load_state_dict(copy.deepcopy(native.state_dict()))
    found += [float(torch_step(*batch)) for batch in batches[4:6]]
    # back into the first one, whose plan of addresses is now out of date
    first.load_state_dict(second.state_dict())
    native.load_state_dict(copy.deepcopy(torch_step.state_dict()))
    found += [float(native(*batch)) for batch in batches[6:]]
    assert found == pytest.approx(expected, abs=2e-4)


def test_an_optimiser_of_another_kind_steps_in_torch():
    losses = []
    for engine in ("native", "torch"):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        assert "SGD" in native_update_problem(optimizer)
        step = make_train_step(model, engine=engine, optimizer=optimizer, learning_rate=0.1)
        losses.append([float(step(*make_batch(model, 3, 20))) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_evaluation_is_the_same_figure():
    model = make_model("modern")
    tokens = place_tokens(
        torch.randint(V, (1003,), generator=torch.Generator().manual_seed(3)).numpy(), torch.device("cpu")
    )
    precision = choose_precision("fp32", torch.device("cpu"))
    plain = evaluate(model, tokens, block_size=40, precision=precision)
    native = evaluate(model, tokens, block_size=40, precision=precision, native=NativeStep(model))
    assert native.loss == pytest.approx(plain.loss, abs=1e-6)
    assert native.tokens == plain.tokens
