"""accelerate and restore: live models written as nanoGPT's, nanoGPT's own among them, with our attention and back."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from nanogpt_cases import SHAPE, load_module
from peers import checkout
from torch import Tensor, nn
from torch.nn import functional as F

from fastchargpt.errors import ConfigError
from fastchargpt.integrations.nanogpt import GPT, AcceleratedAttention, GPTConfig, accelerate, restore


class PlainAttention(nn.Module):
    """Attention with the parts that nanoGPT's has, written from its definition; `power` makes it something else."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, mask: bool = False, power: float = 1.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.power = heads, width, dropout, power
        if mask:
            self.register_buffer("bias", torch.ones(1, 1, 64, 64).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        weights = q @ k.mT / math.sqrt(q.shape[-1]) * self.power
        weights = weights.masked_fill(~torch.ones(weights.shape[-2:]).tril().bool(), -math.inf).softmax(-1)
        y = (self.attn_dropout(weights) @ v).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y))


class Plain(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(29, 32)
        self.h = nn.ModuleList([PlainAttention(32, 2, **options) for _ in range(2)])
        self.head = nn.Linear(32, 29)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx)
        for layer in self.h:
            x = x + layer(x)
        logits = self.head(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def check_accelerated(model: nn.Module) -> None:
    model.double()
    x = torch.randint(29, (2, 16), generator=torch.Generator().manual_seed(2))
    expected, before = model(x, x)[0], list(model.modules())
    names, parameters, state = list(model.state_dict()), list(model.parameters()), torch.get_rng_state()
    assert accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(isinstance(module, AcceleratedAttention) for module in model.modules()) == 2
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model(x, x)[0], expected, rtol=0, atol=1e-10)
    # the same parameters under the same names: optimisers and checkpoints go on
    assert sorted(model.state_dict()) == sorted(names)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(x, x)[1].backward()
    optimizer.step()
    stepped = model(x, x)[0]
    assert not torch.equal(stepped, expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if type(model) is Plain else model):
        torch.testing.assert_close(again(x, x)[0], stepped, rtol=0, atol=0)
    accelerate(model, backend="naive")
    assert {m.backend for m in model.modules() if isinstance(m, AcceleratedAttention)} == {"naive"}
    model.eval()
    assert restore(model) is model
    assert list(model.modules()) == before
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x, x)[0], stepped, rtol=0, atol=1e-10)
    assert list(model.modules()) == list(restore(model).modules())


@pytest.mark.parametrize("mask", [False, True])
def test_accelerate_and_restore(mask: bool) -> None:
    check_accelerated(Plain(mask=mask))


def test_accelerate_nanogpts_own_model() -> None:
    theirs_module = load_module(checkout("FASTCHARGPT_NANOGPT") / "model.py")
    check_accelerated(theirs_module.GPT(theirs_module.GPTConfig(**SHAPE)))


def test_accelerated_dropout() -> None:
    model = accelerate(Plain(dropout=0.5))
    x = torch.zeros(1, 16, dtype=torch.int64)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert [m.dropout for m in model.modules() if isinstance(m, AcceleratedAttention)] == [0.5, 0.5]
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_accelerate_leaves_our_own_model_alone() -> None:
    model = GPT(GPTConfig(**SHAPE))
    before = list(model.modules())
    assert restore(accelerate(model, backend="naive")) is model
    assert list(model.modules()) == before
    assert {block.attn.backend for block in model.transformer.h} == {"naive"}


def test_accelerate_refuses_what_it_cannot_replace() -> None:
    odd = Plain(power=1.5)
    before = list(odd.modules())
    with pytest.raises(ConfigError, match=r"h\.0 computes something else"):
        accelerate(odd)
    assert list(odd.modules()) == before
    with pytest.raises(ConfigError, match="found no attention"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="pass the model that holds this layer"):
        accelerate(PlainAttention(8, 2))
    with pytest.raises(ConfigError, match="backend must be one of"):
        accelerate(Plain(), backend="sdap")
