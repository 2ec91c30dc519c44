"""The native engine: against torch, its drafting against plain decoding, and what happens where it cannot be built."""

import dataclasses
import multiprocessing
import subprocess
import warnings

import pytest
import torch
from native_library import require
from test_decode import BLOCK, FAMILIES, V, make_model

from fastchargpt import GPT, GPTConfig
from fastchargpt import engines as engines_module
from fastchargpt import native as native_module
from fastchargpt.decode import TorchEngine
from fastchargpt.engines import EngineConfig, make_engine
from fastchargpt.errors import BackendUnavailableError, SamplingError
from fastchargpt.generation import generate_tokens
from fastchargpt.kernels import cpu_build, cpu_compiler, cpu_decode
from fastchargpt.native import NativeEngine, native_problem
from fastchargpt.sampling import Sampler, SamplingConfig

START = torch.tensor([[1, 2, 3]])


@pytest.fixture(autouse=True)
def _needs_the_library():
    require(native_problem(make_model("nanogpt", torch.float32)))


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Models this small would be left to one thread."""
    monkeypatch.setattr(native_module, "BYTES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logits_after(engine, prompts, steps):
    with torch.inference_mode():
        engine.fill(range(len(prompts)), prompts)
        for step in range(steps):
            tokens = [(7 * row + step) % V for row in range(len(prompts))]
            out = engine.step(range(len(prompts)), tokens, [len(prompt) + step for prompt in prompts])
        return out.clone()


# odd widths: heads that are no multiple of a vector, a vocabulary that is no multiple of a panel, one head, many tokens
ODD = [
    {"n_head": 1, "n_embd": 6},
    {"n_head": 5, "n_embd": 60},
    {"n_head": 3, "n_embd": 99, "vocab_size": 130},
    {"n_head": 2, "n_embd": 144, "n_layer": 1},
]


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("family", ["nanogpt", "lecture"])
def test_odd_shapes_equal_torch(threads, family, shape):
    fields = {"n_layer": 2, "block_size": BLOCK, "vocab_size": V, **shape}
    model = GPT(GPTConfig.family(family, **fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for prompts in ([[1]], [[1], [2, 3]], [[row % V] * (1 + row % 4) for row in range(13)]):
        expected = logits_after(TorchEngine(model, len(prompts), BLOCK), prompts, 5)
        found = logits_after(NativeEngine(model, len(prompts), BLOCK), prompts, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_window_whose_ends_near_each_other_in_the_ring(threads):
    # 24 positions and 8 for drafts would be a ring of 32 slots: both ends of a window in one block of 16
    model = GPT(dataclasses.replace(FAMILIES["modern"], block_size=24)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    torch_engine, native = TorchEngine(model, 2, 90), NativeEngine(model, 2, 90)
    prompts = [[1], [2, 3]]
    with torch.inference_mode():
        for engine in (torch_engine, native):
            engine.fill(range(2), prompts)
        for step in range(80):
            expected, found = (
                engine.step(range(2), [step % V, 3 * step % V], [1 + step, 2 + step])
                for engine in (torch_engine, native)
            )
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda m, step=step: f"{step}: {m}")


def test_prompts_read_in_several_calls_or_one_give_the_same_bits(threads, monkeypatch):
    model = make_model("modern", torch.float32)
    prompts = [[1, 2, 3], [4], [5] * BLOCK, [6, 7]]
    whole = logits_after(NativeEngine(model, 4, 30), prompts, 3)
    monkeypatch.setattr(native_module, "MOST_TOKENS", 1)
    assert torch.equal(logits_after(NativeEngine(model, 4, 30), prompts, 3), whole)
    token_by_token = NativeEngine(model, 4, 30)
    for row, prompt in enumerate(prompts):
        token_by_token.fill([row], [prompt[:1]])
        for position, token in enumerate(prompt[1:], 1):
            token_by_token.step([row], [token], [position])
    with torch.inference_mode():
        for step in range(3):
            tokens = [(7 * row + step) % V for row in range(4)]
            out = token_by_token.step(range(4), tokens, [len(prompt) + step for prompt in prompts])
    assert torch.equal(out, whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_equals_a_model_with_rounded_weights(name):
    model = make_model(name, torch.float32)
    rounded = make_model(name, torch.float32)
    # the embedding stays as it is; only the products are rounded
    rounded.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.detach() / step).round() * step
    prompts = [[3], [4, 5]]
    expected = logits_after(TorchEngine(rounded, 2, 9), prompts, 1)
    found = logits_after(NativeEngine(model, 2, 9, int8=True), prompts, 1)
    unrounded = logits_after(TorchEngine(model, 2, 9), prompts, 1)
    spread = float(expected.std())
    assert (found - expected).abs().max() < 0.01 * spread
    assert (found - unrounded).abs().max() < 0.5 * spread


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5}], ids=str)
def test_drafting_changes_no_token(threads, name, knobs):
    model = make_model(name, torch.float32)
    config = SamplingConfig(max_new_tokens=3 * BLOCK, seed=5, **knobs)
    plain = generate_tokens(model, START, config, EngineConfig(speculate="off"))
    drafted = generate_tokens(model, START, config, EngineConfig(speculate="on"))
    assert torch.equal(drafted, plain)
    reference = generate_tokens(model, START, config, EngineConfig(engine="torch"))
    assert torch.equal(reference, plain)


def chi_square(counts, prob):
    """How many standard deviations the statistic lies above its mean, cells that expect fewer than 5 taken as one."""
    expected = prob * counts.sum()
    rare = expected < 5
    seen = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    freedom = len(seen) - 1
    return (float(((seen - wanted) ** 2 / wanted).sum()) - freedom) / (2 * freedom) ** 0.5


@torch.no_grad()
def test_speculative_sampling_follows_the_models_distribution():
    # two tokens after one, drawn with drafts, against the joint distribution by float64 passes without a cache
    model, draws = make_model("modern", torch.float32), 20_000
    exact = make_model("modern")
    history = [1, 2, 3, 4]

    def joint(temperature):
        after = [exact(torch.tensor([[*history, *more]]))[0][0, -1] for more in ([], *([token] for token in range(V)))]
        first, *second = ((logits / temperature).softmax(-1) for logits in after)
        return (first[:, None] * torch.stack(second)).flatten()

    engine, config = NativeEngine(model, 1, BLOCK, draft=True), SamplingConfig()
    engine.fill([0], [history[:3]])
    counts, refused = torch.zeros(V * V, dtype=torch.int64), 0
    for u in torch.rand(draws, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7)):
        tokens = [token for (token,) in engine.decode([0], [4], [3], V, config, u)]
        if len(tokens) == 1:
            refused += 1
            tokens += engine.decode([0], tokens, [4], V, config, u[:, 1:])[0]
        counts[tokens[0] * V + tokens[1]] += 1
    assert refused > 9, "next to no draft was refused: nothing was tried"
    assert chi_square(counts, joint(1.0)) < 4
    assert chi_square(counts, joint(1.05)) > 4


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_decoded():
    # its tensors have no version counter to tell a change by
    model = make_model("nanogpt", torch.float32)
    config = SamplingConfig(max_new_tokens=8, temperature=0)
    for _ in range(2):
        native = generate_tokens(model, START, config)
        assert torch.equal(native, generate_tokens(model, START, config, EngineConfig(engine="torch")))
        for parameter in model.parameters():
            parameter.mul_(-1.3)


def test_drafts_that_are_all_wrong_change_no_token():
    # the drafting copy is made of another model's weights: what it drafts is refused nearly every time
    model, other = make_model("modern", torch.float32), make_model("modern", torch.float32, seed=9)
    config = SamplingConfig(max_new_tokens=BLOCK + 9, seed=5)
    plain = generate_tokens(model, START, config, EngineConfig(speculate="off"))
    engine = NativeEngine(model, 1, 60, draft=True)
    wrong = NativeEngine(other, 1, 60, draft=True)
    sampler = Sampler(config, V, [5])
    with torch.inference_mode():
        tokens = sampler(engine.fill([0], START.tolist())).tolist()
        # spoil what drafting leaves behind: another model's keys and values at every place not yet judged
        while len(tokens) < config.max_new_tokens:
            wrong.memory = engine.memory
            position = 2 + len(tokens)
            for ahead in range(4):
                wrong.step([0], [ahead], [position + ahead])
            more = engine.decode([0], tokens[-1:], [position], V, config, sampler.peek_uniforms(5))
            sampler.use_uniforms(len(more))
            tokens += [token for (token,) in more]
    assert tokens[: config.max_new_tokens] == plain[0, 3:].tolist()


def test_a_token_is_the_same_alone_and_among_others(threads):
    model = make_model("nanogpt", torch.float32)
    prompts = [[row, row + 1] for row in range(9)]
    together = logits_after(NativeEngine(model, 9, BLOCK), prompts, 1)
    alone = NativeEngine(model, 9, BLOCK)
    with torch.inference_mode():
        alone.fill(range(9), prompts)
        for row in range(9):
            assert torch.equal(alone.step([row], [7 * row % V], [2])[0], together[row])


def test_native_draws_equal_the_sampler():
    model = make_model("nanogpt", torch.float32)
    engine = NativeEngine(model, 50, BLOCK)
    logits = torch.randn(50, V)
    for knobs in ({}, {"temperature": 0}, {"temperature": 0.6}, {"top_k": 3}, {"top_k": 1}, {"top_k": 99}):
        config = SamplingConfig(**knobs)
        sampler = Sampler(config, V, range(50))
        assert engine.draw(logits, V, config, sampler.peek_uniforms(1)[:, 0]) == sampler(logits).tolist(), knobs
        narrower = Sampler(config, V - 4, range(50))
        u = narrower.peek_uniforms(1)[:, 0]
        assert engine.draw(logits, V - 4, config, u) == narrower(logits[:, : V - 4]).tolist(), knobs


def test_weights_that_changed_are_packed_anew():
    model = make_model("nanogpt", torch.float32)
    config = SamplingConfig(max_new_tokens=8, temperature=0)
    first = NativeEngine(model, 1, 9).native
    assert NativeEngine(model, 1, 9).native is first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)
    assert NativeEngine(model, 1, 9).native is not first
    native = generate_tokens(model, START, config)
    assert torch.equal(native, generate_tokens(model, START, config, EngineConfig(engine="torch")))


def test_two_generations_may_take_turns():
    model = make_model("modern", torch.float32)
    alone = logits_after(NativeEngine(model, 1, 30), [[1, 2]], 5)
    one, two = NativeEngine(model, 1, 30), NativeEngine(model, 1, 30)
    with torch.inference_mode():
        one.fill([0], [[1, 2]])
        two.fill([0], [[9, 9]])
        for step in range(5):
            out = one.step([0], [step % V], [2 + step])
            two.step([0], [3], [2 + step])
    assert torch.equal(out, alone)


def _in_child(queue, model):
    # the parent's threads are not there

    queue.put(generate_tokens(model, START, SamplingConfig(max_new_tokens=8, temperature=0), EngineConfig()).tolist())


def test_a_forked_child_can_generate():
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    model = make_model("modern", torch.float32)
    config = SamplingConfig(max_new_tokens=8, temperature=0)
    expected = generate_tokens(model, START, config).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tried here
        child = context.Process(target=_in_child, args=(queue, model))
        child.start()
    assert queue.get(timeout=60) == expected
    child.join(60)
    assert child.exitcode == 0


# ---- where it cannot be had


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """A process in which nothing was built yet, with an empty cache."""
    monkeypatch.setattr(cpu_build, "_problems", {})
    monkeypatch.setattr(engines_module, "_said", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    # a library of the same names that compiles in no time
    names = ("fc_new", "fc_free", "fc_attach", "fc_step", "fc_decode", "fc_draw", "fc_speculate")
    source = tmp_path / "cpu_decode.cpp"
    source.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in names))
    monkeypatch.setattr(cpu_build, "FOLDER", tmp_path)
    _forget()
    yield tmp_path
    _forget()


def _forget():
    cpu_decode.library.cache_clear()
    cpu_build.load.cache_clear()


@pytest.mark.parametrize("broken", ["no compiler", "it fails", "CXX names nothing"])
def test_without_a_compiler_decoding_goes_on_in_torch_and_says_why_once(unbuilt, monkeypatch, broken):
    if broken == "it fails":
        script = unbuilt / "c++"
        script.write_text("#!/bin/sh\necho 'x.cpp:1: error: not today' >&2\nexit 1\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        says = "not today"
    elif broken == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(unbuilt))
        says = "needs a C\\+\\+ compiler"
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
        says = "no-such-compiler"
    model = make_model("nanogpt", torch.float32)
    config = SamplingConfig(max_new_tokens=3)
    with pytest.warns(RuntimeWarning, match=says) as caught:
        assert isinstance(make_engine(model, EngineConfig(), config, 1, 9), TorchEngine)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_tokens(model, START, config)
    for asked in (EngineConfig(engine="native"), EngineConfig(weights="int8"), EngineConfig(speculate="on")):
        with pytest.raises(BackendUnavailableError, match=says):
            make_engine(model, asked, config, 1, 9)


def test_it_is_built_once_and_found_again(unbuilt, monkeypatch):
    made = []
    run = subprocess.run
    monkeypatch.setattr(
        cpu_compiler.subprocess, "run", lambda *args, **kwargs: made.append(args) or run(*args, **kwargs)
    )
    cpu_decode.library()
    built = [args for (args, *_) in made if "-o" in args]
    assert len(built) == 1
    _forget()
    cpu_decode.library()
    assert len([args for (args, *_) in made if "-o" in args]) == 1
    assert [path.suffix for path in (unbuilt / "cache" / "fastchargpt").iterdir()] == [".so"]


def test_a_cache_that_cannot_be_written_moves_to_the_temporary_folder(unbuilt, monkeypatch):
    (unbuilt / "cache").write_text("a file where the folder should be")
    cpu_decode.library()
    assert list((unbuilt / "temporary").rglob("*.so"))


def test_other_dtypes_are_decoded_in_torch_without_a_word_only_where_asked():
    model = make_model("nanogpt")
    assert "float64" in native_problem(model)
    with pytest.raises(BackendUnavailableError, match="float64"):
        make_engine(model, EngineConfig(engine="native"), SamplingConfig(), 1, 9)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"engine": "gpu"}, "engine must be one of"),
        ({"weights": "int4"}, "weights must be one of"),
        ({"speculate": "yes"}, "speculate must be one of"),
        ({"weights": "int8", "speculate": "on"}, "drop it or weights"),
        ({"engine": "torch", "weights": "int8"}, "needs the native engine"),
        ({"engine": "torch", "speculate": "on"}, "needs the native engine"),
    ],
)
def test_bad_engine_configs_are_refused(fields, says):
    with pytest.raises(SamplingError, match=says):
        EngineConfig(**fields)


def test_drafting_for_what_it_cannot_judge_is_refused():
    model = make_model("nanogpt", torch.float32)
    for sampling, rows in ((SamplingConfig(top_p=0.9), 1), (SamplingConfig(), 2)):
        with pytest.raises(SamplingError, match="speculate='on' serves"):
            make_engine(model, EngineConfig(speculate="on"), sampling, rows, 9)


def test_auto_drafts_where_the_weights_exceed_the_cache():
    small = make_model("nanogpt", torch.float32)
    wide = dataclasses.replace(FAMILIES["nanogpt"], n_embd=384, n_layer=3, n_head=6)
    large = GPT(wide).eval()
    for model, drafts in ((small, False), (large, True)):
        assert make_engine(model, EngineConfig(), SamplingConfig(), 1, 9).draft is drafts
        assert make_engine(model, EngineConfig(), SamplingConfig(top_p=0.5), 1, 9).draft is False
        assert make_engine(model, EngineConfig(), SamplingConfig(), 2, 9).draft is False
