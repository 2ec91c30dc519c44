"""The native training step: losses and gradients against float64, updates against torch.optim, and its limits."""

import copy
import math

import pytest
import torch
from native_library import require

from fastchargpt import GPT, GPTConfig, TrainConfig, make_train_step, native_step
from fastchargpt.batches import place_tokens
from fastchargpt.choices import choose_engine
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.evaluation import evaluate
from fastchargpt.kernels import cpu_train
from fastchargpt.kernels.philox import draw_seeds, keep_mask, keep_probability
from fastchargpt.native_step import NativeStep, native_step_problem, native_update_problem
from fastchargpt.optim import Muon, make_muon, make_optimizer, orthogonalise, shape_factor
from fastchargpt.precision import choose_precision

V = 65
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


def make_model(family="nanogpt", **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "block_size": 40, "n_layer": 3, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig.family(family, **{**sizes, **fields}))
    for parameter in model.parameters():  # zeros and ones would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_batch(model, rows, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (2, rows, length), generator=generator).unbind()


def gradients(model):
    return {name: parameter.grad.double().clone() for name, parameter in model.named_parameters()}


def reference(model, x, y):
    """Loss and gradients in float64, by autograd over the naive attention."""
    wide = GPT(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.train(model.training)
    if wide.rope is not None:
        wide.rope = wide.rope.double()
    wide.set_attention("naive")
    loss = wide(x, y)[1]
    loss.backward()
    return float(loss), gradients(wide)


def assert_near(found, expected, tolerance):
    for name, grad in found.items():
        off = (grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert off < tolerance, f"{name} is {off:.2g} off"


@pytest.fixture(autouse=True)
def _needs_the_library():
    require(native_step_problem(make_model()))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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


# ---- Muon


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
    model = make_model("modern", n_kv_head=2)
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
    model = make_model("lecture")
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


# ---- dropout


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


# ---- where it does not serve


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
