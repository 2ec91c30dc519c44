"""The lecture's GPTLanguageModel into ours and back, and its training loop on our model with one line changed."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import checkout
from torch import Tensor, nn
from torch.nn import functional as F

from fastchargpt import GPT, GPTConfig
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.integrations.lecture import from_lecture, lecture_to_weights, to_lecture

WIDTH, HEADS, LAYERS, CONTEXT, LETTERS = 24, 3, 2, 16, 11


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("key", "query", "value"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH // HEADS, bias=False))
        self.register_buffer("tril", torch.ones(CONTEXT, CONTEXT).tril())

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / (WIDTH // HEADS) ** 0.5
        length = x.shape[1]
        return scores.masked_fill(self.tril[:length, :length] == 0, -torch.inf).softmax(-1) @ self.value(x)


class AllHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([OneHead() for _ in range(HEADS)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sa, self.ffwd, self.ln1, self.ln2 = AllHeads(), Wide(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class Reference(nn.Module):
    """A model with the lecture's equations and names, written for this test."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(LETTERS, WIDTH)
        self.position_embedding_table = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, LETTERS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(idx.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(x)))


def tokens() -> Tensor:
    return torch.randint(LETTERS, (3, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_are_equal(dtype: torch.dtype, tolerance: float) -> None:
    theirs = Reference().to(dtype)
    ours = from_lecture(theirs)
    assert ours.config == GPTConfig.family(
        "lecture", vocab_size=LETTERS, block_size=CONTEXT, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH
    )
    torch.testing.assert_close(ours(tokens(), tokens())[0], theirs(tokens()), rtol=0, atol=tolerance)


def test_gradients_are_equal() -> None:
    theirs = Reference().double()
    ours = from_lecture(theirs)
    ours(tokens(), tokens().roll(1))[1].backward()
    F.cross_entropy(theirs(tokens()).flatten(0, 1), tokens().roll(1).flatten()).backward()
    for name, parameter in theirs.named_parameters():  # ours, as if it were a state dict of the lecture's
        parameter.data = parameter.grad
        assert parameter.data is not None, name
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    for (name, a), b in zip(to_lecture(ours).items(), map(theirs.state_dict().get, to_lecture(ours)), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=1e-12, msg=name)


def test_there_and_back_loses_nothing() -> None:
    theirs = Reference()
    back = to_lecture(from_lecture(theirs))
    assert back.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor), name
    other = Reference()
    other.load_state_dict(back)
    assert torch.equal(other(tokens()), theirs(tokens()))


def test_the_copy_is_its_own() -> None:
    theirs = Reference().eval()
    ours, before = from_lecture(theirs, dropout=0.2), copy.deepcopy(theirs.state_dict())
    assert not ours.training
    assert ours.config.dropout == 0.2
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


def test_from_ours_to_the_lecture() -> None:
    shape = {"vocab_size": LETTERS, "block_size": CONTEXT, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
    for changes in ({}, {"bias": False, "head_bias": False}):  # a bias that is not there becomes zero
        ours, theirs = GPT(GPTConfig.family("lecture", **shape, **changes)), Reference()
        theirs.load_state_dict(to_lecture(ours))
        torch.testing.assert_close(theirs(tokens()), ours(tokens(), tokens())[0], rtol=0, atol=1e-5)
    refused = {
        "tie_weights": GPTConfig(**shape, activation="relu", qkv_bias=False),
        "activation": GPTConfig.family("lecture", **{**shape, "activation": "gelu"}),
        "qkv_bias": GPTConfig.family("lecture", **shape, qkv_bias=True),
        "position": GPTConfig.family("modern", **shape),
    }
    for name, config in refused.items():
        with pytest.raises(ConfigError, match=f"the lecture's model has {name}"):
            to_lecture(GPT(config))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lm_head.bias", None, r"lacks the weight lm_head\.bias"),
        ("blocks.1.sa.heads.2.key.weight", None, "lacks the weight blocks.1.sa.heads.2.key.weight"),
        ("blocks.1.sa.heads.2.key.weight", torch.ones(8, 3), r"has the shape \(8, 3\), not \(8, 24\)"),
        ("blocks.0.ln1.weight", torch.ones(3), r"has the shape \(3,\)"),
        ("position_embedding_table.weight", None, "lacks a table"),
        ("blocks.0.extra.weight", torch.ones(3), "blocks.0.extra.weight that the lecture's model does not"),
        ("ln_f.bias", torch.ones(24, dtype=torch.int64), "must be a dense floating-point tensor"),
        ("ln_f.bias", "text", "is no tensor"),
        ("token_embedding_table.weight", None, "does not hold the lecture's"),
        ("token_embedding_table.weight", torch.ones(11, 25), "n_embd must be a multiple of n_head"),
    ],
)
def test_damaged_weights_are_refused(name: str, value: Tensor | None, sentence: str) -> None:
    state = dict(Reference().state_dict())
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(CheckpointError, match=sentence):
        lecture_to_weights(state)


OUR_LINE = (
    'import fastchargpt; model = fastchargpt.GPT(fastchargpt.GPTConfig.family("lecture", vocab_size=vocab_size, '
    "block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout))"
)


def test_the_lectures_training_loop(tmp_path: Path) -> None:
    """gpt.py as it is, with the line that makes the model replaced (and the sizes made small)."""
    source = checkout("FASTCHARGPT_LECTURE")
    program = (source / "gpt.py").read_text(encoding="utf-8")
    assert program.count("model = GPTLanguageModel()") == 1
    for name, value in {
        "batch_size": 8,
        "block_size": 16,
        "max_iters": 60,
        "eval_interval": 30,
        "eval_iters": 2,
    }.items():
        program = re.sub(rf"^{name} = \d+", f"{name} = {value}", program, flags=re.M)
    for name, value in {"n_embd": 24, "n_head": 3, "n_layer": 2, "learning_rate": "3e-3"}.items():
        program = re.sub(rf"^{name} = \S+", f"{name} = {value}", program, flags=re.M)
    text = "To be, or not to be, that is the question:\n" * 60
    (tmp_path / "input.txt").write_text(text)
    losses = []
    for line in ("model = GPTLanguageModel()", OUR_LINE):
        (tmp_path / "gpt.py").write_text(program.replace("model = GPTLanguageModel()", line))
        done = subprocess.run([sys.executable, "gpt.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1000:]
        losses.append([float(x) for x in re.findall(r"val loss (\S+)", done.stdout)])
        assert "M parameters" in done.stdout
        assert len(done.stdout.split("val loss")[-1]) > 400  # the sample at the end
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[1][-1] < losses[1][0] - 0.5
    assert abs(losses[0][-1] - losses[1][-1]) < 0.4  # the two draw different initial weights
