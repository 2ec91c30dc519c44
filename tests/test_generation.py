"""From a prompt to text: generate, stream and generate_tokens, their knobs and what they refuse."""

import os
import sys
from pathlib import Path

import pytest
import torch

import fastchargpt
from fastchargpt import GPT, ByteTokenizer, CharTokenizer, GPTConfig, SamplingConfig, generate, stream
from fastchargpt.decode import DecodeSession
from fastchargpt.engines import EngineConfig
from fastchargpt.errors import SamplingError, TokenizerError
from fastchargpt.generation import generate_tokens
from fastchargpt.native import AT_ONCE, NativeEngine

CHARS = "\n abcdefghijklmn"
VOCAB = len(CHARS)
TOKENIZER = CharTokenizer(CHARS)
ENGINES = [EngineConfig(), EngineConfig(engine="torch")]


def make_model(family="nanogpt", vocab_size=VOCAB, dtype=torch.float32, **fields):
    torch.manual_seed(3)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 10, "vocab_size": vocab_size, **fields}
    model = GPT(GPTConfig.family(family, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def uncached(model, idx, count):
    """nanoGPT's rule, one full forward a token, greedy."""
    for _ in range(count):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.filterwarnings("ignore:the native decoder is for float32")
@pytest.mark.parametrize("family", ["nanogpt", "lecture", "modern"])
@torch.no_grad()
def test_greedy_equals_the_uncached_path_in_float64(family):
    model = make_model(family, dtype=torch.float64)
    idx = torch.randint(len(CHARS), (3, 4))
    found = model.generate(idx, 25, temperature=0, context="crop")
    assert torch.equal(found, uncached(model, idx, 25))


@pytest.mark.filterwarnings("ignore:the native decoder is for float32")
@torch.no_grad()
def test_greedy_equals_nanogpt(monkeypatch):
    folder = os.environ.get("FASTCHARGPT_NANOGPT", "")
    if not (Path(folder) / "model.py").is_file():
        pytest.skip("needs a checkout of nanoGPT in the folder that FASTCHARGPT_NANOGPT names")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    import model as peer

    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 10, "vocab_size": 16, "bias": True, "dropout": 0.0}
    ours = make_model(**config, dtype=torch.float64)
    theirs = peer.GPT(peer.GPTConfig(**config)).double().eval()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(16, (2, 3))
    # top_k=1 is greedy there, where temperature 0 divides by it
    assert torch.equal(ours.generate(idx, 40, temperature=0), theirs.generate(idx, 40, top_k=1))
    monkeypatch.delitem(sys.modules, "model")


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.engine)
@pytest.mark.parametrize("family", ["nanogpt", "modern"])
def test_a_batch_gives_what_each_prompt_gives_alone(family, engine):
    model = make_model(family)
    prompts = ["abc", "", "a bcd efgh ijkl mnabc", "m"]  # the third is longer than the model's context
    knobs = {"top_p": 0.95, "repetition_penalty": 1.1} if engine.engine == "torch" else {}
    config = SamplingConfig(max_new_tokens=23, seed=40, num_samples=2, stop=("b",), logprobs=2, **knobs)
    together = generate(model, TOKENIZER, prompts, config, engine)
    assert [found.prompt for found in together] == [prompt for prompt in prompts for _ in range(2)]
    for place, found in enumerate(together):
        lone = SamplingConfig(max_new_tokens=23, seed=40 + place, stop=("b",), logprobs=2, **knobs)
        (alone,) = generate(model, TOKENIZER, found.prompt, lone, engine)
        assert (alone.text, alone.tokens, alone.finish) == (found.text, found.tokens, found.finish)
        for mine, theirs in zip(alone.logprobs, found.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert {found.finish for found in together} == {"stop", "length"}
    assert len({found.text for found in together}) > 4


def test_rows_that_stop_in_the_middle_of_a_native_call():
    model = make_model("modern")
    config = SamplingConfig(max_new_tokens=45, seed=40, num_samples=3, stop=("b", "fa"))
    one, two = (generate(model, TOKENIZER, ["abc", "", "m"], config, engine) for engine in ENGINES)
    assert one == two
    assert {found.finish for found in one} == {"stop", "length"}
    assert len({len(found.tokens) % AT_ONCE for found in one}) > 2


def test_native_and_torch_write_the_same_text():
    model = make_model("modern")
    for knobs in ({}, {"temperature": 0.8, "top_k": 4}, {"top_p": 0.8}, {"banned": ("a",), "presence_penalty": 0.5}):
        config = SamplingConfig(max_new_tokens=30, seed=2, **knobs)
        one, two = (generate(model, TOKENIZER, "abc", config, engine)[0] for engine in ENGINES)
        assert one == two, knobs


@pytest.mark.parametrize("stop", [(), ("e",), ("fa", "ij\n"), ("never there",)])
def test_streamed_pieces_joined_are_the_text(stop):
    model = make_model("modern")
    for seed in range(6):
        config = SamplingConfig(max_new_tokens=40, seed=seed, stop=stop)
        (whole,) = generate(model, TOKENIZER, "abc", config)
        pieces = list(stream(model, TOKENIZER, "abc", config))
        assert "".join(pieces) == whole.text
        assert all(pieces)
        assert not any(text in whole.text for text in stop)
        full = TOKENIZER.decode(whole.tokens)
        assert full.startswith(whole.text)
        if whole.finish == "stop":
            assert full[len(whole.text) :] in stop
        else:
            assert full == whole.text


def test_streaming_never_cuts_a_character():
    # a byte model that can only write the bytes of two-byte characters, and sometimes gets them wrong
    model = make_model(vocab_size=256)
    bytes_of = tuple(set(range(256)) - set("é".encode()) - {65})
    pieces = list(stream(model, ByteTokenizer(), "", SamplingConfig(max_new_tokens=60, seed=1, banned=bytes_of)))
    assert set("".join(pieces)) <= set("éA\ufffd")
    assert "é" in pieces


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.engine)
def test_ctrl_c_gives_out_what_was_held_back(engine, monkeypatch):
    model = make_model("modern")
    plain = generate(model, TOKENIZER, "a", SamplingConfig(max_new_tokens=30, seed=1))[0].text
    # the native engine draws several tokens in a call
    owner, name = (DecodeSession, "advance") if engine.engine == "torch" else (NativeEngine, "decode")
    once, calls = getattr(owner, name), iter(range(99))

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(owner, name, interrupted)
    drawn = 2 if engine.engine == "torch" else 1 + AT_ONCE
    stop = plain[drawn - 2 : drawn] + "never"
    pieces = stream(model, TOKENIZER, "a", SamplingConfig(max_new_tokens=30, seed=1, stop=(stop,)), engine)
    shown: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        shown.extend(pieces)
    assert "".join(shown) == plain[:drawn]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.engine)
def test_log_probabilities_are_the_models_own(engine):
    model = make_model("modern")
    config = SamplingConfig(max_new_tokens=6, seed=4, temperature=0.5, top_k=3, logprobs=4)
    (found,) = generate(model, TOKENIZER, "abc", config, engine)
    idx = torch.tensor([[*TOKENIZER.encode("abc").tolist(), *found.tokens]])
    with torch.no_grad():
        hidden = model.hidden(idx[:, :-1])
        expected = model.logits(hidden)[0, 2:].log_softmax(-1)
    for row, token, noted in zip(expected, found.tokens, found.logprobs, strict=True):
        assert noted.token == token
        assert noted.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(4)
        assert [place for place, _ in noted.top] == best.indices.tolist()
        assert [value for _, value in noted.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_seeds_and_samples():
    model = make_model()
    config = SamplingConfig(max_new_tokens=20, seed=9, num_samples=3)
    found = generate(model, TOKENIZER, "abc", config)
    assert found == generate(model, TOKENIZER, "abc", config)
    assert len({each.text for each in found}) == 3
    # without a seed, torch's decides
    torch.manual_seed(5)
    first = model.generate(torch.zeros(2, 1, dtype=torch.int64), 20)
    torch.manual_seed(5)
    assert torch.equal(first, model.generate(torch.zeros(2, 1, dtype=torch.int64), 20))
    assert not torch.equal(first, model.generate(torch.zeros(2, 1, dtype=torch.int64), 20))
    assert not torch.equal(first[0], first[1])


def test_edges_of_prompts_and_lengths():
    model = make_model()
    config = SamplingConfig(max_new_tokens=12, seed=1)
    text = generate(model, TOKENIZER, "", config)[0].text
    assert text == generate(model, TOKENIZER, "\n", config)[0].text
    without_newline = CharTokenizer(CHARS.replace("\n", "z"))
    assert (
        generate(model, without_newline, "", config)[0].tokens
        == generate(model, without_newline, "z", config)[0].tokens
    )
    # only the last block_size tokens of a long prompt count
    assert (
        generate(model, TOKENIZER, "abcdefgh" * 9, config)[0].text
        == generate(model, TOKENIZER, ("abcdefgh" * 9)[-10:], config)[0].text
    )
    assert generate(model, TOKENIZER, "abc", SamplingConfig(max_new_tokens=0))[0].text == ""
    assert list(stream(model, TOKENIZER, "abc", SamplingConfig(max_new_tokens=0))) == []
    assert model.generate(torch.zeros(2, 0, dtype=torch.int64), 3).shape == (2, 3)
    assert model.generate(torch.zeros(2, 4, dtype=torch.int64), 0).shape == (2, 4)


def test_a_model_in_training_is_sampled_without_dropout_and_left_in_training():
    model = make_model(dropout=0.5)
    config = SamplingConfig(max_new_tokens=25, seed=1)
    for engine in ENGINES:
        expected = generate(model.eval(), TOKENIZER, "abc", config, engine)
        assert generate(model.train(), TOKENIZER, "abc", config, engine) == expected
        assert model.training
        assert all(module.training for module in model.modules())


def test_tokens_that_only_padding_has_are_never_drawn():
    model = make_model(vocab_size=64)
    with torch.no_grad():
        model.lm_head.weight[len(CHARS) :] *= 50
    for engine in ENGINES:
        (found,) = generate(model, TOKENIZER, "abc", SamplingConfig(max_new_tokens=30, seed=1, logprobs=60), engine)
        assert max(found.tokens) < len(CHARS)
        assert len(found.logprobs[0].top) == len(CHARS)


def test_banned_and_biased_text():
    model = make_model()
    config = SamplingConfig(max_new_tokens=60, seed=1, banned=("a", 3), logit_bias={"m": 4.0})
    text = generate(model, TOKENIZER, "abc", config)[0].text
    assert "a" not in text
    assert CHARS[3] not in text
    assert text.count("m") > 10


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: generate(m, TOKENIZER, "aZb"), TokenizerError, "'Z'"),
        (lambda m: stream(m, TOKENIZER, "aZb"), TokenizerError, "'Z'"),
        (lambda m: generate(m, TOKENIZER, []), SamplingError, "no prompt"),
        (lambda m: generate(m, TOKENIZER, "a", SamplingConfig(banned=("ab",))), SamplingError, "single tokens"),
        (lambda m: generate(m, TOKENIZER, "a", SamplingConfig(banned=(99,))), SamplingError, "outside the vocabulary"),
        (lambda m: generate(m, TOKENIZER, "a", SamplingConfig(context="slide")), SamplingError, "RoPE"),
        (lambda m: generate(m, ByteTokenizer(), "a"), SamplingError, "not of one run"),
        (lambda m: stream(m, TOKENIZER, "a", SamplingConfig(num_samples=2)), SamplingError, "one text"),
        (lambda m: m.generate(torch.zeros(1, 1), 3), SamplingError, "token numbers"),
        (lambda m: m.generate(torch.tensor([[99]]), 3), SamplingError, "outside the vocabulary"),
        (lambda m: m.generate(torch.tensor([[1]]), -3), SamplingError, "max_new_tokens"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, temperature=-1.0), SamplingError, "temperature"),
        (lambda m: m.generate(torch.tensor([[1]]), 3, stop=("x",)), SamplingError, "takes a tokenizer"),
    ],
)
def test_mistakes_are_named_in_one_sentence(call, error, says):
    with pytest.raises(error, match=says) as caught:
        call(make_model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.engine)
@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_logits_that_are_not_finite_are_an_error_not_a_crash(engine, knobs):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(SamplingError, match="not finite"):
        generate(model, TOKENIZER, "abc", SamplingConfig(max_new_tokens=5, **knobs), engine)


def test_top_k_over_the_vocabulary_is_clamped_as_nanogpt_does():
    model = make_model()
    idx = torch.zeros(1, 1, dtype=torch.int64)
    one, two = (
        generate_tokens(model, idx, SamplingConfig(max_new_tokens=9, seed=1, top_k=k)) for k in (len(CHARS), 10**6)
    )
    assert torch.equal(one, two)


def test_it_is_public():
    assert fastchargpt.generate is generate
    assert fastchargpt.stream is stream
