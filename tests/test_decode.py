"""Cached decoding against computing everything anew: every family, every rule past block_size, any prompts."""

import dataclasses

import pytest
import torch
from native_library import require

from fastchargpt import GPT, GPTConfig
from fastchargpt.decode import DecodeSession, TorchEngine, resolve_context
from fastchargpt.errors import SamplingError
from fastchargpt.layers import rope_tables
from fastchargpt.native import NativeEngine, native_problem

BLOCK = 12
V = 17
FAMILIES = {
    "lecture": GPTConfig.family("lecture", n_layer=2, n_head=2, n_embd=24, block_size=BLOCK, vocab_size=V),
    "nanogpt": GPTConfig.family("nanogpt", n_layer=2, n_head=3, n_embd=24, block_size=BLOCK, vocab_size=V, dropout=0.3),
    "gpt2": GPTConfig(n_layer=2, n_head=2, n_embd=24, block_size=BLOCK, vocab_size=V, activation="gelu_tanh"),
    "modern": GPTConfig.family("modern", n_layer=3, n_head=2, n_embd=40, block_size=BLOCK, vocab_size=V),
    "grouped": GPTConfig.family(
        "modern", n_layer=2, n_head=4, n_kv_head=2, n_embd=24, block_size=BLOCK, vocab_size=V, bias=True
    ),
}
RULES = [(name, rule) for name in FAMILIES for rule in ("crop", "rechunk", "slide")]
RULES = [(name, rule) for name, rule in RULES if rule != "slide" or FAMILIES[name].position == "rope"]


def make_model(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(FAMILIES[name])
    for parameter in model.parameters():  # the modern family starts from zero, which would hide every mistake
        torch.nn.init.normal_(parameter, std=0.25)
    return model.to(dtype).eval()


def make_engine(kind, model, batch_size, positions):
    if kind == "torch":
        return TorchEngine(model, batch_size, positions)
    require(native_problem(model))
    return NativeEngine(model, batch_size, positions)


def banded(model, tokens, width=BLOCK):
    """Logits after the last token of one pass in which position p sees p - width + 1 .. p, written with a mask."""
    config, parts = model.config, model.transformer
    n = len(tokens)
    x = parts.wte(torch.tensor([tokens]))
    rope = rope_tables(n, config.head_dim, config.rope_base)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    visible = (distance >= 0) & (distance < width)
    for block in parts.h:
        q, k, v = (t.transpose(1, 2) for t in block.attn._split(block.attn.c_attn(block.ln_1(x)), rope))
        k, v = (t.repeat_interleave(config.n_head // config.kv_heads, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) / config.head_dim**0.5).masked_fill(~visible, -torch.inf)
        x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.logits(parts.ln_f(x))[0, -1]


def anew(model, tokens, rule, prompt_length):
    """The same logits from the definition of the rule and nothing cached."""
    start = max(0, prompt_length - BLOCK)
    if rule == "slide":
        return banded(model, tokens[start:])
    if rule == "crop":
        return model(torch.tensor([tokens[-BLOCK:]]))[0][0, -1]
    window = tokens[start:prompt_length]
    for token in tokens[prompt_length:]:
        window = [*window, token] if len(window) < BLOCK else [*window, token][-(BLOCK // 2) :]
    return model(torch.tensor([window]))[0][0, -1]


@torch.no_grad()
def check(kind, model, rule, prompts, steps, tolerance):
    generator = torch.Generator().manual_seed(1)
    histories = [list(prompt) for prompt in prompts]
    engine = make_engine(kind, model, len(prompts), max(map(len, prompts)) + steps + 1)
    session = DecodeSession(engine, BLOCK, rule, prompts)
    logits = session.start()
    for step in range(steps + 1):
        for row, (prompt, history) in enumerate(zip(prompts, histories, strict=True)):
            torch.testing.assert_close(
                logits[row].double(),
                anew(model, history, rule, len(prompt)).double(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, step=step, row=row: f"step {step}, row {row}: {text}",
            )
        tokens = torch.randint(V, (len(prompts),), generator=generator).tolist()
        for history, token in zip(histories, tokens, strict=True):
            history.append(token)
        logits = session.advance(range(len(prompts)), tokens)


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_cached_equals_anew_in_float64(name, rule):
    check("torch", make_model(name), rule, [[3]], 3 * BLOCK, 1e-10)


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_native_equals_anew(name, rule):
    check("native", make_model(name, torch.float32), rule, [[3]], 3 * BLOCK, 3e-4)


@pytest.mark.parametrize(("name", "rule"), RULES)
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_prompts_of_different_lengths_give_what_each_gives_alone(kind, name, rule):
    prompts = [[1, 2, 3], [4], list(range(BLOCK)), [5] * (BLOCK + 7), [6] * (BLOCK - 1)]
    dtype, tolerance = (torch.float64, 1e-10) if kind == "torch" else (torch.float32, 3e-4)
    check(kind, make_model(name, dtype), rule, prompts, BLOCK + 3, tolerance)


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("rule", ["crop", "rechunk", "slide"])
@torch.no_grad()
def test_rows_that_ended_do_not_disturb_the_others(kind, rule):
    model = make_model("modern", torch.float64 if kind == "torch" else torch.float32)
    session = DecodeSession(make_engine(kind, model, 3, 40), BLOCK, rule, [[1, 2], [3] * 10, [4]])
    session.start()
    session.advance([0, 1, 2], [5, 6, 7])
    history = [3] * 10 + [6]
    for token in (1, 2, 3, 4, 5, 6):
        history.append(token)
        logits = session.advance([1], [token])
    tolerance = 1e-10 if kind == "torch" else 3e-4
    expected = anew(model, history, rule, 10)
    torch.testing.assert_close(logits[0].double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["nanogpt", "modern"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4]], [[1, 2, 3]]], ids=["two", "one"])
@torch.no_grad()
def test_under_autocast_it_is_what_one_pass_under_autocast_gives(name, prompts):
    model = make_model(name, torch.float32)
    session = DecodeSession(TorchEngine(model, len(prompts), 40), BLOCK, "rechunk", prompts)
    with torch.autocast("cpu", torch.bfloat16):
        session.start()
        logits = session.advance(range(len(prompts)), [7] * len(prompts))
        for row, prompt in enumerate(prompts):
            expected = model(torch.tensor([[*prompt, 7]]))[0][0, -1]
            assert (logits[row] - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_block_of_one_token_works_under_every_rule():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(FAMILIES["modern"], block_size=1)).double().eval()
    for rule in ("crop", "rechunk", "slide"):
        session = DecodeSession(TorchEngine(model, 1, 9), 1, rule, [[1]])
        session.start()
        for token in (2, 3, 4):
            with torch.no_grad():
                logits = session.advance([0], [token])
                torch.testing.assert_close(logits, model(torch.tensor([[token]]))[0][:, 0], msg=rule)


def test_auto_is_slide_for_rope_and_crop_for_learned_positions():
    assert resolve_context("auto", make_model("modern")) == "slide"
    assert resolve_context("auto", make_model("nanogpt")) == "crop"
    assert resolve_context("rechunk", make_model("modern")) == "rechunk"
    with pytest.raises(SamplingError, match=r"slide.*learned.*crop"):
        resolve_context("slide", make_model("lecture"))


@torch.no_grad()
def test_the_cache_is_allocated_once():
    model = make_model("modern", torch.float32)
    engine = TorchEngine(model, 2, 50)
    session = DecodeSession(engine, BLOCK, "slide", [[1], [2, 3]])
    session.start()
    place, size = engine.cache.kv_L2BHSD.data_ptr(), engine.cache.kv_L2BHSD.shape
    for token in range(V):
        session.advance([0, 1], [token, token])
    assert (engine.cache.kv_L2BHSD.data_ptr(), engine.cache.kv_L2BHSD.shape) == (place, size)


@torch.no_grad()
def test_the_oracle_of_the_band_sees_one_position_more_or_less():
    model = make_model("modern")
    tokens = torch.randint(V, (3 * BLOCK,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = banded(model, tokens, BLOCK)
    for width in (BLOCK - 1, BLOCK + 1):
        assert (banded(model, tokens, width) - expected).abs().max() > 1e-3
