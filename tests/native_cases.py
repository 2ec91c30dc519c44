"""What the tests of the native training step share: a small model, a batch, and the gradients that float64 finds."""

import pytest
import torch
from native_library import require

from fastchargpt import GPT, GPTConfig
from fastchargpt.native_step import native_step_problem

__all__ = [
    "V",
    "assert_near",
    "gradients",
    "make_batch",
    "make_model",
    "needs_the_library",
    "reference",
    "some_threads",
]

V = 65


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
def needs_the_library():
    require(native_step_problem(make_model()))


@pytest.fixture(name="threads", params=[1, 3])
def some_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
