"""Decoding by CUDA graphs against plain torch: the same tokens. On a CPU a recorder keeps a graph's rules."""

import dataclasses
import gc
import warnings
import weakref

import pytest
import torch
from graph_stand_in import RecordedGraphs
from strict_interpreter import strict_interpreter
from test_decode import BLOCK, FAMILIES, RULES, V, make_model

from fastchargpt import GPT, CharTokenizer, SamplingConfig, generate, stream
from fastchargpt import engines as engines_module
from fastchargpt import graph_engine as module
from fastchargpt.decode import TorchEngine
from fastchargpt.engines import EngineConfig, make_engine
from fastchargpt.errors import BackendUnavailableError, SamplingError
from fastchargpt.generation import generate_tokens
from fastchargpt.graph_engine import WARM_UP_STEPS, GraphEngine, graph_problem
from fastchargpt.kernels import token_step

TOKENIZER = CharTokenizer("\n abcdefghijklmno")
PROMPTS = ["abc", "", "a bcd efgh ijkl mnabc", "m" * (BLOCK - 1)]  # the third is longer than the context
GRAPH, TORCH = EngineConfig(engine="graph"), EngineConfig(engine="torch")
KNOBS = [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}, {"top_k": 1}]


@pytest.fixture
def made(monkeypatch):
    """Recorders that were made in place of CUDA's; graphs look at 4, 8 or 12 slots."""
    made = []

    def make(device):
        made.append(RecordedGraphs())
        return made[-1]

    monkeypatch.setattr(module, "CudaGraphs", make)
    monkeypatch.setattr(module, "LEAST_SEEN", 4)
    monkeypatch.setattr(engines_module, "graph_problem", lambda model: None)
    return made


def total(made, name):
    return sum(getattr(graphs, name) for graphs in made)


def both(model, prompts, config):
    """What the graph engine and the torch engine write."""
    return [generate(model, TOKENIZER, prompts, config, engine) for engine in (GRAPH, TORCH)]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_the_same_tokens_as_in_torch(made, name, rule, knobs):
    model = make_model(name, torch.float32)
    config = SamplingConfig(max_new_tokens=2 * BLOCK + 5, seed=4, context=rule, **knobs)
    graph, plain = both(model, PROMPTS, config)
    assert graph == plain
    graph, plain = both(model, "abc", config)
    assert graph == plain
    assert total(made, "replays") > BLOCK


@pytest.mark.parametrize("rule", ["crop", "slide"])
def test_rows_that_finish_early(made, rule):
    model = make_model("modern", torch.float32)
    config = SamplingConfig(max_new_tokens=70, seed=3, num_samples=3, stop=("b", "fa"), context=rule)
    graph, plain = both(model, ["abc", "", "m"], config)
    assert graph == plain
    assert {found.finish for found in graph} == {"stop", "length"}
    assert len({len(found.tokens) for found in graph}) > 3


@pytest.mark.parametrize("name", ["nanogpt", "grouped"])
def test_knobs_that_it_cannot_draw_are_one_replay_a_token(made, name):
    model = make_model(name, torch.float32)
    knobs = dict(top_p=0.8, repetition_penalty=1.2, logprobs=2, stop=("b",))
    graph, plain = both(model, ["ab", "c"], SamplingConfig(max_new_tokens=BLOCK - 3, seed=1, **knobs))
    for one, other in zip(graph, plain, strict=True):
        assert (one.tokens, one.text) == (other.tokens, other.text)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert total(made, "replays") > 3


def test_one_replay_a_token_and_one_read_back_a_call(made, monkeypatch):
    model = make_model("modern", torch.float32)
    reads = []
    read_back = GraphEngine._read_back
    monkeypatch.setattr(GraphEngine, "_read_back", lambda self, count: reads.append(count) or read_back(self, count))
    generate_tokens(model, torch.tensor([[1]]), SamplingConfig(max_new_tokens=150, seed=1), GRAPH)
    assert reads == [64, 64, 21]  # the first token comes from the prompt
    [graphs] = made
    # 4, 8 and 12 slots
    assert (graphs.captures, graphs.warm_ups) == (3, 3 * WARM_UP_STEPS)
    assert graphs.replays == 149 - 3 * WARM_UP_STEPS


@pytest.mark.parametrize("fuse", ["off", "on"])
def test_past_the_context_a_cropped_text_is_one_replay_a_token_too(made, monkeypatch, fuse):
    """Two texts, then one of them alone: the same logits as in torch."""
    monkeypatch.setattr(engines_module, "fused_problem", lambda model: None)
    model = make_model("nanogpt", torch.float32)
    engine, plain = GraphEngine(model, 2, 3 * BLOCK, fused=fuse == "on"), TorchEngine(model, 2, 3 * BLOCK)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(V, (9, 2, BLOCK), generator=generator).tolist()
    for step, (left, right) in enumerate(windows):
        rows, texts = ([1], [right]) if step > 5 else ([0, 1], [left, right])
        got = engine.fill(rows, texts, keep=False)
        assert torch.allclose(got, plain.fill(rows, texts, keep=False), atol=1e-5)
    [graphs] = made
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, WARM_UP_STEPS, len(windows) - WARM_UP_STEPS)
    model.set_attention("naive")  # another computation is another graph
    for _ in range(WARM_UP_STEPS + 1):
        assert torch.allclose(engine.fill([1], [right], keep=False), got, atol=1e-5)
    assert graphs.captures == 2
    model.set_attention("auto")
    config = SamplingConfig(max_new_tokens=3 * BLOCK, seed=1, context="crop")
    before = total(made, "replays")
    generate_tokens(model, torch.tensor([[1]]), config, GRAPH)
    assert total(made, "replays") - before > 3 * BLOCK - 3 - 4 * WARM_UP_STEPS  # 4, 8 and 12 slots, and the crop


@pytest.mark.parametrize(("positions", "slots"), [([0, 1, 3, 4, 7, 8, 11, 12, 99], [4, 4, 4, 8, 8, 12, 12, 12, 12])])
def test_the_slots_looked_at_hold_every_position_seen(made, positions, slots):
    engine = GraphEngine(make_model("modern", torch.float32), 1, 100)
    assert [engine._seen(position) for position in positions] == slots


def test_a_failed_capture_says_why_and_decoding_goes_on(made, monkeypatch):
    model = make_model("modern", torch.float32)
    config = SamplingConfig(max_new_tokens=30, seed=1)

    def capture(self, body):
        raise RuntimeError("not today\nmore of CUDA's words")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    engine = GraphEngine(model, 1, 40)
    expected = generate_tokens(model, torch.tensor([[1]]), config, TORCH)
    monkeypatch.setattr("fastchargpt.generation.make_engine", lambda *_: engine)
    with pytest.warns(RuntimeWarning, match="not today; decoding goes on without") as caught:
        assert torch.equal(generate_tokens(model, torch.tensor([[1]]), config), expected)
    assert len(caught) == 1
    assert engine.problem == "not today"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate_tokens(model, torch.tensor([[1]]), config), expected)
    monkeypatch.undo()


def test_asked_for_by_name_it_is_not_replaced(made, monkeypatch):
    model = make_model("modern", torch.float32)

    def capture(self, body):
        raise RuntimeError("not today")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    with pytest.raises(BackendUnavailableError, match="not today: take engine='torch'"):
        generate_tokens(model, torch.tensor([[1]]), SamplingConfig(max_new_tokens=30), GRAPH)


@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}], ids=str)
def test_logits_that_are_not_finite_are_an_error(made, knobs):
    model = make_model("nanogpt", torch.float32)
    config = SamplingConfig(max_new_tokens=9, seed=1, **knobs)
    engine = GraphEngine(model, 1, BLOCK)
    logits = engine.fill([0], [[1, 2]])
    u = torch.full((1, 5), 0.5, dtype=torch.float64)
    [token] = engine.draw(logits, V, config, u[:, 0])
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    # a token that is none is told, and is not looked up in the embedding
    assert engine.decode([0], [token], [2], V, config, u) == [[V]] * 5
    with pytest.raises(SamplingError, match="not finite"):
        generate(model, TOKENIZER, "abc", config, GRAPH)


def test_graphs_are_kept_for_the_next_call(made):
    model, start = make_model("modern", torch.float32), torch.tensor([[1, 2], [3, 4]])
    config = SamplingConfig(max_new_tokens=20, seed=1)
    first = generate_tokens(model, start, config, GRAPH)
    captures = total(made, "captures")
    assert torch.equal(generate_tokens(model, start, config, GRAPH), first)
    assert (len(made), total(made, "captures")) == (1, captures)
    # weights changed where they lie are seen by the same graphs; not finite ones leave nothing behind
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for value in (torch.nan, 0.1, before):
        with torch.no_grad():
            weight.copy_(torch.as_tensor(value).expand_as(weight))
        if value is torch.nan:
            with pytest.raises(SamplingError, match="not finite"):
                generate_tokens(model, start.repeat(1, 4), config, GRAPH)
        else:
            graph, plain = (generate_tokens(model, start, config, engine) for engine in (GRAPH, TORCH))
            assert torch.equal(graph, plain)
    assert torch.equal(graph, first)
    assert len(made) == 1
    # weights that lie elsewhere, or another batch, are other graphs
    kept = weight.data
    weight.data = kept.clone().mul_(-1)
    graph, plain = (generate_tokens(model, start, config, engine) for engine in (GRAPH, TORCH))
    assert torch.equal(graph, plain)
    assert len(made) == 2
    generate_tokens(model, start[:1], config, GRAPH)
    assert len(made) == 3


def test_two_texts_of_one_model_may_take_turns(made):
    model = make_model("modern", torch.float32)
    configs = [SamplingConfig(max_new_tokens=90, seed=seed) for seed in (1, 2)]
    alone = [list(stream(model, TOKENIZER, "ab", config, TORCH)) for config in configs]
    generate(model, TOKENIZER, "ab", configs[0], GRAPH)
    assert model in module._idle
    streams = [stream(model, TOKENIZER, "ab", config, GRAPH) for config in configs]
    together = list(zip(*streams, strict=True))
    assert [list(pieces) for pieces in zip(*together, strict=True)] == alone


def test_a_model_with_graphs_can_be_forgotten(made):
    model = make_model("modern", torch.float32)
    generate_tokens(model, torch.tensor([[1]]), SamplingConfig(max_new_tokens=20), GRAPH)
    assert model in module._idle
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


def test_no_more_graphs_than_the_limit(made, monkeypatch):
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    model = make_model("modern", torch.float32)
    for temperature in (0.5, 0.6, 0.7):
        config = SamplingConfig(max_new_tokens=30, seed=1, temperature=temperature)
        graph, plain = (generate_tokens(model, torch.tensor([[1]]), config, engine) for engine in (GRAPH, TORCH))
        assert torch.equal(graph, plain)
    [(_, desk)] = module._idle.values()
    assert len(desk.recordings) <= 2


def test_who_takes_it(made, monkeypatch):
    model = make_model("nanogpt", torch.float32)
    long, short = SamplingConfig(max_new_tokens=50), SamplingConfig(max_new_tokens=3)
    auto, fuse = EngineConfig(), EngineConfig(fuse="on")
    for engine, config, kind in ((auto, long, GraphEngine), (auto, short, TorchEngine), (GRAPH, short, GraphEngine)):
        assert type(engines_module._on_cuda(model, engine, config, 1, 9)) is kind
    # Triton's kernels where they are asked for, or where very many tokens pay for compiling them
    many = SamplingConfig(max_new_tokens=engines_module.FUSED_TOKENS)
    monkeypatch.setattr(engines_module, "fused_problem", lambda model: None)
    for engine, config, fused in ((auto, long, False), (auto, many, True), (fuse, short, True)):
        assert engines_module._on_cuda(model, engine, config, 1, 9).fused is fused
    assert engines_module._on_cuda(model, EngineConfig(fuse="off"), many, 1, 9).fused is False
    monkeypatch.setattr(engines_module, "fused_problem", lambda model: "Triton is not installed")
    assert engines_module._on_cuda(model, auto, many, 1, 9).fused is False
    with pytest.raises(BackendUnavailableError, match=r"Triton is not installed: take fuse='off'"):
        engines_module._on_cuda(model, fuse, long, 1, 9)
    monkeypatch.undo()
    with pytest.raises(BackendUnavailableError, match=r"need a CUDA device.*: leave out fuse='on'"):
        make_engine(model, fuse, long, 1, 9)
    assert "on cpu" in graph_problem(model)
    with pytest.raises(BackendUnavailableError, match=r"need a CUDA device.*engine='torch'"):
        make_engine(model, GRAPH, long, 1, 9)
    monkeypatch.setattr(engines_module, "_said", set())
    with pytest.warns(RuntimeWarning, match="decoding in torch, which is slower"):
        assert type(engines_module._on_cuda(model, auto, long, 1, 9)) is TorchEngine
    with pytest.raises(SamplingError, match="drop it or engine='graph'"):
        EngineConfig(engine="graph", weights="int8")
    for other in ({"engine": "torch"}, {"engine": "native"}, {"weights": "int8"}, {"speculate": "on"}):
        with pytest.raises(SamplingError, match="fuse='on' is for the graph engine"):
            EngineConfig(fuse="on", **other)


class Repeated(RecordedGraphs):
    """A graph of kernels that torch does not see: what was recorded is done by doing all of it again."""

    def capture(self, body):
        self.captures += 1
        return body


@pytest.mark.parametrize(("knobs", "drawn"), [({"temperature": 0.8}, True), ({"top_k": 5}, False)], ids=str)
def test_fused_it_writes_the_same(made, monkeypatch, knobs, drawn):
    monkeypatch.setattr(module, "CudaGraphs", lambda device: Repeated())
    monkeypatch.setattr(engines_module, "fused_problem", lambda model: None)
    kernels = []
    draw = token_step.draw
    monkeypatch.setattr(token_step, "draw", lambda *args, **kwargs: kernels.append(1) or draw(*args, **kwargs))
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(FAMILIES["grouped"], n_layer=1, block_size=4)).eval()
    start, config = torch.tensor([[1], [2]]), SamplingConfig(max_new_tokens=6, seed=1, **knobs)  # slots wrap around
    with strict_interpreter():
        fused = generate_tokens(model, start, config, EngineConfig(fuse="on"))
    assert torch.equal(fused, generate_tokens(model, start, config, TORCH))
    assert bool(kernels) == drawn


# ---- on a GPU


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu(name, **fields):
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_embd=128, block_size=160, **fields)
    model = GPT(dataclasses.replace(FAMILIES[name], **shape)).cuda().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("knobs", [pytest.param(knobs, marks=gpu, id=str(knobs)) for knobs in (KNOBS[0], KNOBS[2])])
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_on_a_gpu_the_same_tokens_as_in_torch(name, rule, knobs):
    model = on_gpu(name)
    config = SamplingConfig(max_new_tokens=170, seed=4, context=rule, **knobs)
    for prompts in (PROMPTS, "abc"):
        plain = generate(model, TOKENIZER, prompts, config, TORCH)
        for fuse in ("off", "on"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # a capture that fails says so
                graph = generate(model, TOKENIZER, prompts, config, EngineConfig(fuse=fuse))
            # a draw within rounding of a boundary may fall on the other side, and the text goes on from there
            same = [one.tokens == other.tokens for one, other in zip(graph, plain, strict=True)]
            assert sum(same) >= len(same) - 1, fuse
            assert all(one.tokens[:50] == other.tokens[:50] for one, other in zip(graph, plain, strict=True)), fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nanogpt", "grouped"])
@pytest.mark.parametrize("fuse", [pytest.param("auto", marks=gpu), pytest.param("on", marks=gpu)])
def test_on_a_gpu_nothing_waits_between_read_backs(name, dtype, fuse, monkeypatch):
    model = on_gpu(name).to(dtype)
    config = SamplingConfig(temperature=0.8, top_k=5)
    engine = make_engine(model, EngineConfig(fuse=fuse), config, 3, 160)
    assert isinstance(engine, GraphEngine)
    engine.fill(range(3), [[1], [2, 3], [4]])
    u = torch.rand(3, 64, dtype=torch.float64, device="cuda")
    first = engine.decode(range(3), [1, 2, 3], [1, 2, 1], V, config, u[:, :9])
    read_back = GraphEngine._read_back

    def read(self, count):
        torch.cuda.set_sync_debug_mode("default")
        return read_back(self, count)

    monkeypatch.setattr(GraphEngine, "_read_back", read)
    try:
        for rows in ([0, 1, 2], [0, 2]):
            positions, uniforms = [[1, 2, 1][row] for row in rows], u[rows]
            torch.cuda.set_sync_debug_mode("error")
            again = engine.decode(rows, [row + 1 for row in rows], positions, V, config, uniforms)
            assert [[step[row] for row in rows] for step in first] == again[:9]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("_", [pytest.param(0, marks=gpu, id="gpu")])
def test_on_a_gpu_graphs_are_kept_and_memory_does_not_grow(_):
    model, start = on_gpu("modern"), torch.tensor([[1], [2]], device="cuda")
    config = SamplingConfig(max_new_tokens=140, seed=1)
    first = generate_tokens(model, start, config)
    [(_, desk)] = [kept for owner, kept in module._idle.items() if owner is model]
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        assert torch.equal(generate_tokens(model, start, config), first)
    assert torch.cuda.memory_reserved() == before
    assert module._idle[model][1] is desk


@pytest.mark.parametrize("_", [pytest.param(0, marks=gpu, id="gpu")])
def test_on_a_gpu_autocast_keeps_to_torch_and_says_so(monkeypatch, _):
    monkeypatch.setattr(engines_module, "_said", set())
    model, start = on_gpu("nanogpt"), torch.tensor([[1]], device="cuda")
    with torch.autocast("cuda", torch.bfloat16), pytest.warns(RuntimeWarning, match="autocast"):
        generate_tokens(model, start, SamplingConfig(max_new_tokens=20, seed=1))
