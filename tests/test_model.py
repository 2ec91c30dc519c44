"""The GPT against an independent float64 reference, against nanoGPT's own figures, and against itself with a cache."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastchargpt.attention import causal_attention
from fastchargpt.cache import KVCache
from fastchargpt.config import GPTConfig
from fastchargpt.errors import ConfigError
from fastchargpt.layers import CausalSelfAttention
from fastchargpt.model import GPT

SHAPE = dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=65)
FAMILIES = ["lecture", "nanogpt", "modern"]


def small(family: str, **fields: object) -> GPT:
    """A float64 model whose weights are all large enough to matter."""
    model = GPT(GPTConfig.family(family, **{**SHAPE, **fields})).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def batch(config: GPTConfig, size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (size, config.block_size)
    return (
        torch.randint(config.vocab_size, shape, generator=generator),
        torch.randint(config.vocab_size, shape, generator=generator),
    )


def reference_logits(model: GPT, idx: Tensor) -> Tensor:
    """The equations of the three families, written out position by position and head by head."""
    config, weights = model.config, dict(model.state_dict())
    width = config.head_dim

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def turned(x: Tensor, position: int) -> Tensor:
        y = x.clone()
        for i in range(width // 2):
            angle = position * 10000.0 ** (-2 * i / width)
            y[i] = x[i] * math.cos(angle) - x[i + width // 2] * math.sin(angle)
            y[i + width // 2] = x[i] * math.sin(angle) + x[i + width // 2] * math.cos(angle)
        return y

    rows = []
    for tokens in idx:
        x = weights["transformer.wte.weight"][tokens]
        if config.position == "learned":
            x = x + weights["transformer.wpe.weight"][: len(tokens)]
        for layer in range(config.n_layer):
            block = f"transformer.h.{layer}"
            q, k, v = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(config.n_embd, dim=-1)
            heads = []
            for head in range(config.n_head):
                part = slice(head * width, (head + 1) * width)
                qh, kh, vh = q[:, part], k[:, part], v[:, part]
                if config.qk_norm:
                    qh, kh = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in (qh, kh))
                if config.position == "rope":
                    qh, kh = (torch.stack([turned(row, t) for t, row in enumerate(y)]) for y in (qh, kh))
                outs = []
                for t in range(len(tokens)):
                    scores = kh[: t + 1] @ qh[t] / math.sqrt(width)
                    outs.append(scores.softmax(0) @ vh[: t + 1])
                heads.append(torch.stack(outs))
            x = x + linear(f"{block}.attn.c_proj", torch.cat(heads, dim=-1))
            hidden = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
            if config.activation == "gelu":
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            else:
                hidden = hidden.clamp(min=0) ** (2 if config.activation == "relu2" else 1)
            x = x + linear(f"{block}.mlp.c_proj", hidden)
        logits = linear("lm_head", norm("transformer.ln_f", x))
        if config.logit_softcap is not None:
            logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_equations(family: str) -> None:
    model = small(family, block_size=9)
    idx, targets = batch(model.config)
    logits, loss = model(idx, targets)
    expected = reference_logits(model, idx)
    # RoPE's tables are kept in float32
    tolerance = 1e-6 if family == "modern" else 1e-11
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        loss, -expected.log_softmax(-1).gather(-1, targets[..., None]).mean(), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(model(idx)[0], logits[:, -1:])


@pytest.mark.parametrize(
    ("bias", "loss", "gradient", "parameters"),
    [(True, 4.180784959994685, 532.3830920458606, 154240), (False, 4.227659758227792, 484.23058351104817, 152064)],
)
def test_nanogpt_figures(bias: bool, loss: float, gradient: float, parameters: int) -> None:
    # printed by nanoGPT's own model.py (commit 3adf61e) for this seed, shape and batch, in float64
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**SHAPE, bias=bias)).double()
    found = model(*batch(model.config))[1]
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert sum(p.grad.abs().sum().item() for p in model.parameters()) == pytest.approx(gradient, rel=1e-12)
    assert model.get_num_params() == parameters


def test_nanogpt_state_dict_names_and_shapes() -> None:
    config = GPTConfig(**SHAPE)
    width = config.n_embd
    expected = {"transformer.wte.weight": (65, width), "transformer.wpe.weight": (32, width)}
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        for name, shape in {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (3 * width, width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }.items():
            expected[f"{block}.{name}"] = shape
    expected |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,), "lm_head.weight": (65, width)}
    assert {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()} == expected
    assert list(GPT(config).state_dict()) == list(expected)


@pytest.mark.skipif("FASTCHARGPT_NANOGPT" not in os.environ, reason="FASTCHARGPT_NANOGPT names no checkout of nanoGPT")
def test_nanogpt_side_by_side() -> None:
    program = f"""
import sys; sys.path.insert(0, {os.environ["FASTCHARGPT_NANOGPT"]!r})
import torch, model as nano
from fastchargpt import GPT, GPTConfig
shape = dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=65, bias=False, dropout=0.3)
torch.manual_seed(3); theirs = nano.GPT(nano.GPTConfig(**shape))
torch.manual_seed(3); ours = GPT(GPTConfig(**shape))
assert list(theirs.state_dict()) == list(ours.state_dict())
assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters()))
x = torch.randint(65, (2, 32))
for mode in (True, False):  # dropout falls on the same places in the same order
    theirs.train(mode); ours.train(mode)
    torch.manual_seed(5); a = theirs(x, x)
    torch.manual_seed(5); b = ours(x, x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_places(family: str) -> None:
    # the lecture drops attention weights and both projections' outputs; GPT-2 the embeddings' sum as well
    model = GPT(GPTConfig.family(family, **SHAPE, dropout=0.5))  # type: ignore[arg-type]
    live = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0}
    blocks = {f"transformer.h.{i}.{part}" for i in range(3) for part in ("attn.resid_dropout", "mlp.dropout")}
    assert live == (blocks if family == "lecture" else blocks | {"transformer.drop"})
    assert all(m.dropout == 0.5 for m in model.modules() if isinstance(m, CausalSelfAttention))


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation(family: str) -> None:
    model = GPT(GPTConfig.family(family, **{**SHAPE, "n_embd": 256}))  # type: ignore[arg-type]
    weights = model.state_dict()
    projection = {"lecture": 0.02, "nanogpt": 0.02 / math.sqrt(6), "modern": 0.0}[family]
    assert weights["transformer.h.0.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert weights["transformer.h.1.mlp.c_proj.weight"].std().item() == pytest.approx(projection, rel=0.03)
    assert all((tensor == 0).all() for name, tensor in weights.items() if name.endswith("bias"))
    tied = weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    assert tied == (family == "nanogpt")
    if family == "modern":  # zero head: every token equally likely
        assert model(*batch(model.config))[1].item() == pytest.approx(math.log(65), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5, 32])
@torch.no_grad()
def test_cache_equals_recomputing(family: str, chunk: int) -> None:
    model = small(family)
    idx, targets = batch(model.config)
    cache = KVCache(model.config, 2, dtype=torch.float64)
    logits = torch.cat([model.logits(model.hidden(part, cache)) for part in idx.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx, targets)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "rope"])
@torch.no_grad()
def test_grouped_query_heads(position: str) -> None:
    # two query heads that share keys and values equal a model in which each has its own copy
    grouped = small("modern", position=position, n_kv_head=2, block_size=8)
    full = small("modern", position=position, block_size=8)
    width = grouped.config.head_dim
    weights = dict(grouped.state_dict())
    for layer in range(3):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        q, k, v = weights[name].split((4 * width, 2 * width, 2 * width))
        k, v = (y.unflatten(0, (2, width)).repeat_interleave(2, dim=0).flatten(0, 1) for y in (k, v))
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    idx, _ = batch(full.config)
    torch.testing.assert_close(grouped(idx)[0], full(idx)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_backends_agree(family: str, backend: str) -> None:
    model = small(family)
    idx, targets = batch(model.config)
    expected = torch.autograd.grad(model(idx, targets)[1], list(model.parameters()))
    model.set_attention(backend)
    found = torch.autograd.grad(model(idx, targets)[1], list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_the_models_own(family: str) -> None:
    # nothing of T x T is kept, and none is built on the way outside the naive backend
    model = small(family, block_size=31)
    assert not [name for name, buffer in model.named_buffers() if buffer.shape[-2:] == (31, 31)]
    made: list[torch.Size] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.shape)
            return out

    with Watch():
        model(*batch(model.config))
    assert made
    assert not [shape for shape in made if shape[-2:] == (31, 31)]


def test_forward_pass_makes_no_copies() -> None:
    # the projection's output goes into attention as views, and attention's output into the projection as one;
    # bias=False because torch's addmm copies the bias
    model = GPT(GPTConfig(**SHAPE, bias=False))
    idx, targets = batch(model.config)
    with torch.profiler.profile() as profile:
        model(idx, targets)
    names = {event.name for event in profile.events()}
    assert "aten::mm" in names
    assert not names & {"aten::copy_", "aten::cat", "aten::contiguous", "aten::clone"}


def test_ignored_targets_do_not_count() -> None:
    model = small("nanogpt")
    idx, targets = batch(model.config)
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))


@pytest.mark.parametrize("family", ["nanogpt", "modern"])
@torch.no_grad()
def test_crop_block_size(family: str) -> None:
    model = small(family)
    idx, _ = batch(model.config)
    before = model(idx[:, :16])[0]
    model.crop_block_size(16)
    assert model.config.block_size == 16
    torch.testing.assert_close(model(idx[:, :16])[0], before)
    with pytest.raises(ConfigError, match="does not fit in block_size 16"):
        model(idx[:, :17])
    with pytest.raises(ConfigError, match="17 is above the model's 16"):
        model.crop_block_size(17)


def test_from_state_dict_draws_nothing_and_ties() -> None:
    model = small("nanogpt")
    state = torch.get_rng_state()
    copy = GPT.from_state_dict(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert copy.lm_head.weight is copy.transformer.wte.weight
    idx, targets = batch(model.config)
    assert torch.equal(copy(idx, targets)[0], model(idx, targets)[0])
    modern = small("modern")
    idx, targets = batch(modern.config)
    assert torch.equal(GPT.from_state_dict(modern.config, modern.state_dict())(idx)[0], modern(idx)[0])


def test_flops_and_mfu() -> None:
    # PaLM's appendix B by hand: 6 N and 12 L C T per token
    model = GPT(GPTConfig(**SHAPE, bias=False))
    assert model.flops_per_token() == 6 * 152064 + 12 * 3 * 64 * 32
    # each matrix product of the forward pass by torch's own count, thrice, and nothing else
    counter = FlopCounterMode(display=False)
    model.set_attention("naive")
    with counter:
        model(*batch(model.config))
    forward = counter.get_total_flops() / (2 * 32)
    assert 3 * forward == pytest.approx(model.flops_per_token() - 6 * 3 * 64 * 2, rel=0.01)
    assert 0 < model.estimate_mfu(12, 1.0) < 1


def test_compiles_without_a_graph_break() -> None:
    for family in FAMILIES:
        model = GPT(GPTConfig.family(family, **SHAPE))  # type: ignore[arg-type]
        explained = torch._dynamo.explain(model)(*batch(model.config))
        assert explained.graph_break_count == 0, explained.break_reasons


def test_the_notebooks_head_inside_the_model() -> None:
    # one head of the notebook's cell 28, through the public function, with its own scale
    torch.manual_seed(1337)
    x = torch.randn(4, 8, 32)
    key, query, value = (torch.nn.Linear(32, 16, bias=False) for _ in range(3))
    q, k, v = (layer(x)[:, None] for layer in (query, key, value))
    out = causal_attention(q, k, v, scale=1.0)[:, 0]
    assert out[0, 0, :3].tolist() == pytest.approx([-0.1571, 0.8801, 0.1615], abs=5e-5)
    assert out[0, 1, :4].tolist() == pytest.approx([0.6764, -0.5477, -0.2478, 0.3143], abs=5e-5)
