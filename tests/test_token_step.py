"""The kernels of a decoding step, interpreted, against the step in torch and against the sampler; and compiled."""

import dataclasses

import pytest
import torch
from aot import compile_launch, record_launches
from gate import problems
from strict_interpreter import strict_interpreter
from test_decode import BLOCK, FAMILIES, V

from fastchargpt import GPT, GPTConfig
from fastchargpt import fused_step as module
from fastchargpt.decode import DecodeMemory
from fastchargpt.decode_step import decode_step, place_at
from fastchargpt.fused_step import fused_step
from fastchargpt.kernels import token_step
from fastchargpt.sampling import Sampler, SamplingConfig


def make_model(name, dtype):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(FAMILIES[name], n_layer=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.to(dtype).eval()


@torch.no_grad()
def steps(model, positions, count, fused):
    """Logits after each of a few steps, and the cache at the end."""
    memory = DecodeMemory.allocate(model, len(positions), 3 * BLOCK)
    kv = memory.cache.kv_L2BHSD
    kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(3)))
    at, found = torch.tensor(positions), []
    for step in range(count):
        tokens = torch.tensor([(5 * row + 3 * step) % V for row in range(len(positions))])
        if fused:
            with strict_interpreter(seed=step):
                found.append(fused_step(model, kv, memory.rope, tokens, at))
        else:
            seen = min(int(at.max()) + 1, BLOCK)
            place = place_at(at, memory.rows, memory.slots, seen, kv.dtype)
            found.append(decode_step(model, kv, memory.rope, tokens, place))
        at = at + 1
    return torch.stack(found), kv


@pytest.mark.parametrize("most", [4, 0], ids=["kernels", "cublas"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_step_is_the_step(monkeypatch, name, most):
    monkeypatch.setattr(module, "MOST_ROWS", most)
    monkeypatch.setattr(token_step, "TILE", 128)  # several tiles of slots and of outputs
    monkeypatch.setattr(token_step, "PROGRAMS", 9)
    rope = FAMILIES[name].position == "rope"
    positions = [0, 17 if rope else 8]  # the last wraps around
    want, want_kv = steps(make_model(name, torch.float64), positions, 2, fused=False)
    got, got_kv = steps(make_model(name, torch.float32), positions, 2, fused=True)
    torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got_kv, want_kv.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nanogpt", "grouped"])
def test_in_bf16_it_is_as_good_as_torch(name):
    want, _ = steps(make_model(name, torch.float64), [1, 7], 1, fused=False)
    plain, _ = steps(make_model(name, torch.bfloat16), [1, 7], 1, fused=False)
    got, _ = steps(make_model(name, torch.bfloat16), [1, 7], 1, fused=True)
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max()


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("vocab_size", [V, V - 4, 1])
def test_draws_equal_the_sampler(knobs, vocab_size):
    rows, config = 9, SamplingConfig(**knobs)
    sampler = Sampler(config, vocab_size, range(rows))
    logits, u = 3 * torch.randn(rows, V), sampler.peek_uniforms(4).T.contiguous()
    tokens, positions, done = torch.zeros(3, rows, dtype=torch.int64)
    done += 2
    positions += torch.arange(rows)
    drawn = torch.full((4, rows), -1)
    with strict_interpreter():
        token_step.draw(
            logits,
            u,
            drawn,
            tokens,
            positions,
            done,
            vocab_size=vocab_size,
            temperature=config.temperature,
            greedy=sampler.greedy,
        )
    want = sampler.choose(logits[:, :vocab_size], u[2])
    assert torch.equal(drawn[2], want)
    assert torch.equal(tokens, want)
    assert (drawn[[0, 1, 3]] == -1).all()
    assert torch.equal(positions, torch.arange(rows) + 1)
    assert (done == 3).all()


def test_a_draw_on_the_boundary_is_the_next_token():
    state, drawn = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    u = torch.tensor([[0.0, 0.5, 0.75]], dtype=torch.float64)
    with strict_interpreter():
        token_step.draw(torch.zeros(3, 4), u, drawn, *state, vocab_size=4, temperature=1.0, greedy=False)
    assert drawn.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_draw_what_is_no_token(value):
    logits = torch.randn(2, V)
    logits[1, slice(None) if value == -torch.inf else 3] = value
    state, drawn = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    u = torch.full((1, 2), 0.5, dtype=torch.float64)
    with strict_interpreter():
        token_step.draw(logits, u, drawn, *state, vocab_size=V, temperature=1.0, greedy=False)
    assert drawn[0, 0] < V
    assert drawn[0, 1] == V
    assert state[0, 1] == V - 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("family", "dtype"), [("nanogpt", torch.float32), ("modern", torch.bfloat16)])
def test_compiled_it_spills_nothing(target, family, dtype):
    shape = dict(vocab_size=65, block_size=256, n_layer=1, n_head=6, n_embd=384)
    model = GPT(GPTConfig.family(family, **shape)).to(dtype)
    memory, state = DecodeMemory.allocate(model, 1, 256), torch.zeros(3, 1, dtype=torch.int64)
    tokens, positions, _ = state
    with torch.no_grad(), record_launches(target) as launches:
        logits = fused_step(model, memory.cache.kv_L2BHSD, memory.rope, tokens, positions)
        u, drawn = torch.zeros(64, 1, dtype=torch.float64), torch.zeros(64, 1, dtype=torch.int64)
        token_step.draw(logits, u, drawn, *state, vocab_size=65, temperature=0.8, greedy=False)
    names = ["embed", "linear", "attend", "linear", "linear", "linear", "linear", "draw"]
    assert [launch.name for launch in launches] == [f"{name}_kernel" for name in names]
    for launch in launches:
        assert problems(launch, compile_launch(launch, target)) == []
