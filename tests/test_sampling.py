"""Each knob against a plain reference, written from its definition, and the draws against a chi-square test."""

import math
import random
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchargpt import sampling
from fastchargpt.errors import SamplingError
from fastchargpt.knobs import (
    add_bias,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_counts,
    penalise_repeats,
    uniforms,
)
from fastchargpt.sampling import Sampler, SamplingConfig

V = 11
rows = st.lists(st.floats(-8, 8).map(lambda x: round(x, 2)), min_size=V, max_size=V)


def softmax(row):
    top = max(row)
    weight = [math.exp(x - top) for x in row]
    return [w / sum(weight) for w in weight]


def kept(logits):
    return [set(torch.nonzero(row > -math.inf)[:, 0].tolist()) for row in logits]


# ---- the references: lists, loops and the definitions


def plain_top_k(row, k):
    kth = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return {i for i, x in enumerate(row) if x >= kth}


def plain_nucleus(order, prob, p):
    """Take tokens in this order until they hold the mass p."""
    taken, mass = set(), 0.0
    for i in order:
        if taken and mass >= p - 1e-12:
            break
        taken.add(i)
        mass += prob[i]
    return taken


def plain_top_p(row, p):
    return plain_nucleus(sorted(range(V), key=lambda i: -row[i]), softmax(row), p)


def plain_typical(row, p):
    prob = softmax(row)
    entropy = -sum(q * math.log(q) for q in prob)
    return plain_nucleus(sorted(range(V), key=lambda i: round(abs(-math.log(prob[i]) - entropy), 9)), prob, p)


def plain_min_p(row, p):
    prob = softmax(row)
    return {i for i, q in enumerate(prob) if q >= p * max(prob) * (1 - 1e-12)}


@settings(deadline=None, max_examples=60)
@given(a=rows, b=rows, k=st.integers(1, 2 * V))
def test_top_k_keeps_the_k_likeliest_and_ties(a, b, k):
    assert kept(keep_top_k(torch.tensor([a, b]).double(), k)) == [plain_top_k(a, k), plain_top_k(b, k)]


@settings(deadline=None, max_examples=60)
@given(a=rows, b=rows, p=st.sampled_from([0.013, 0.107, 0.333, 0.61, 0.9003, 0.991]))
def test_top_p_keeps_the_smallest_nucleus(a, b, p):
    assert kept(keep_top_p(torch.tensor([a, b]).double(), p)) == [plain_top_p(a, p), plain_top_p(b, p)]


@settings(deadline=None, max_examples=60)
@given(a=rows, p=st.sampled_from([0.0, 0.0101, 0.0507, 0.2003, 0.9001, 1.0]))
def test_min_p_keeps_what_is_near_the_likeliest(a, p):
    assert kept(keep_min_p(torch.tensor([a]).double(), p)) == [plain_min_p(a, p)]


@settings(deadline=None, max_examples=60)
@given(a=st.lists(st.integers(0, 4000), min_size=V, max_size=V, unique=True), p=st.sampled_from([0.107, 0.503, 0.9003]))
def test_typical_keeps_what_is_nearest_the_mean_surprise(a, p):
    row = [x / 997 for x in a]
    assert kept(keep_typical(torch.tensor([row]).double(), p)) == [plain_typical(row, p)]


@pytest.mark.parametrize("cut", [keep_top_p, keep_typical])
def test_a_cut_leaves_logits_it_keeps_as_they_are_and_never_revives_a_dropped_token(cut):
    logits = torch.tensor([[1.0, -math.inf, 3.0, 2.0, -math.inf]])
    out = cut(logits, 1.0)
    assert torch.equal(out, logits)
    assert kept(cut(logits, 0.01))[0] <= {0, 2, 3}


def test_cuts_do_not_change_their_argument():
    logits = torch.randn(3, V)
    before = logits.clone()
    for result in (keep_top_k(logits, 2), keep_top_p(logits, 0.5), keep_min_p(logits, 0.5), keep_typical(logits, 0.5)):
        assert not torch.equal(result, before)
    draw(logits, torch.rand(3).double())
    assert torch.equal(logits, before)


def test_penalties_equal_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repeats(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    counts = torch.tensor([[0, 1, 3, 0]])
    assert penalise_counts(logits, counts, 0.5, 0.25).tolist() == [[2.0, -2.75, 1.75, -3.0]]
    assert add_bias(logits, torch.tensor([0.0, 1.0, -math.inf, 0.0])).tolist() == [[2.0, -1.0, -math.inf, -3.0]]


# ---- draws


def plain_draw(row, u):
    total = 0.0
    for token, q in enumerate(softmax(row)):
        total += q
        if u < total:
            return token
    raise AssertionError("u was not below 1")


@settings(deadline=None, max_examples=100)
@given(a=rows, b=rows, u=st.floats(0.0005, 0.9995), w=st.floats(0.0005, 0.9995))
def test_draw_inverts_the_distribution_function(a, b, u, w):
    logits = torch.tensor([a, b]).double()
    edges = logits.softmax(-1).cumsum(-1)
    if (edges - torch.tensor([[u], [w]])).abs().min() < 1e-9:
        return
    assert draw(logits, torch.tensor([u, w]).double()).tolist() == [plain_draw(a, u), plain_draw(b, w)]


def test_draw_at_the_ends_never_takes_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    ends = torch.tensor([0.0, 0.5 - 2.0**-32, 0.5, 1 - 2.0**-32], dtype=torch.float64)
    assert [int(draw(logits, u[None])) for u in ends] == [1, 1, 3, 3]
    # total is 3 ulp-unlucky weights: the largest u still falls inside
    logits = torch.full((1, 50257), 0.1)
    assert int(draw(logits, ends[3:])) == 50256


# 99.99% points of chi-square at 1 .. 10 degrees of freedom (any table)
CHI2_9999 = [15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56]


def chi_square_holds(counts, prob):
    n = sum(counts)
    assert all(c == 0 for c, q in zip(counts, prob, strict=True) if q == 0), "an impossible token was drawn"
    used = [(c, n * q) for c, q in zip(counts, prob, strict=True) if q > 0]
    statistic = sum((c - e) ** 2 / e for c, e in used)
    return statistic < CHI2_9999[len(used) - 2]


KNOBS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"typical_p": 0.7},
    {"repetition_penalty": 1.5},
    {"logit_bias": {3: 1.5, 4: -1.0}, "banned": (0, 7)},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95},
]


def plain_distribution(row, config, prompt):
    """The whole pipeline again, on lists."""
    row = list(row)
    for i in set(prompt):
        row[i] = row[i] / config.repetition_penalty if row[i] > 0 else row[i] * config.repetition_penalty
    for i, bias in config.logit_bias.items():
        row[i] += bias
    for i in config.banned:
        row[i] = -1e9
    row = [x / config.temperature for x in row]
    for value, cut in (
        (config.top_k, plain_top_k),
        (config.top_p, plain_top_p),
        (config.min_p, plain_min_p),
        (config.typical_p, plain_typical),
    ):
        if value is not None:
            keep = cut(row, value)
            row = [x if i in keep else -1e2 for i, x in enumerate(row)]
    prob = [q if q > 1e-30 else 0.0 for q in softmax(row)]
    return [q / sum(prob) for q in prob]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "+".join(knobs) or "plain")
def test_draws_follow_the_distribution(knobs):
    config = SamplingConfig(**knobs)
    row = [random.Random(5).gauss(0, 1.2) for _ in range(V)]
    prompt = [2, 5]
    sampler = Sampler(config, V, seeds=range(20_000), prompts=[prompt] * 20_000)
    tokens = sampler(torch.tensor([row]).double().expand(20_000, V))
    assert chi_square_holds(torch.bincount(tokens, minlength=V).tolist(), plain_distribution(row, config, prompt))


def test_one_sequence_over_many_steps_follows_the_distribution_too():
    row = torch.tensor([[0.3, -1.0, 2.0, 0.0]]).double()
    sampler = Sampler(SamplingConfig(), 4, seeds=[7])
    counts = torch.bincount(torch.cat([sampler(row) for _ in range(5000)]), minlength=4).tolist()
    assert chi_square_holds(counts, softmax(row[0].tolist()))


def test_the_chi_square_test_sees_a_wrong_distribution():
    row = torch.tensor([[0.3, -1.0, 2.0, 0.0]]).double()
    tokens = draw(row.expand(20_000, 4), uniforms(range(20_000), 0, 1)[:, 0])
    counts = torch.bincount(tokens, minlength=4).tolist()
    assert chi_square_holds(counts, softmax(row[0].tolist()))
    assert not chi_square_holds(counts, softmax((row[0] * 1.08).tolist()))


# ---- streams of uniforms


def test_a_stream_is_fixed_by_its_seed_alone():
    alone = uniforms([42], 0, 100)
    assert torch.equal(uniforms([1, 42, 7], 0, 100)[1:2], alone)
    for start in (1, 2, 3, 4, 50):
        assert torch.equal(uniforms([42], start, 9), alone[:, start : start + 9])
    assert alone.min() >= 0
    assert alone.max() < 1
    assert torch.equal((alone * 2**32).round(), alone * 2**32)


def test_streams_are_the_same_on_every_machine():
    numbers = (uniforms([0, 2**63 - 1], 0, 2) * 2**32).long().tolist()
    assert numbers == [[49592932, 1037445899], [3976309568, 779838286]]


def test_neighbouring_seeds_are_not_alike():
    table = uniforms(range(200), 0, 200)
    assert abs(float(torch.corrcoef(table).fill_diagonal_(0).abs().max())) < 0.4
    assert abs(float(table.mean()) - 0.5) < 0.01


def test_a_draw_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(70, 3, V)
    together = Sampler(SamplingConfig(top_k=7, repetition_penalty=1.2, frequency_penalty=0.3), V, seeds=[3, 9, 4])
    alone = Sampler(together.config, V, seeds=[9])
    for step in logits:
        assert int(together(step)[1]) == int(alone(step[1:2]))


# ---- the sampler as a whole


def test_knobs_that_are_off_cost_nothing(monkeypatch):
    for name in ("keep_top_k", "keep_top_p", "keep_min_p", "keep_typical", "penalise_repeats", "penalise_counts"):
        monkeypatch.setattr(sampling, name, None)
    config = SamplingConfig(top_k=V, top_p=1.0, min_p=0.0, typical_p=1.0)
    sampler = Sampler(config, V, seeds=[0])
    logits = torch.randn(1, V)
    assert sampler.shape(logits) is logits
    sampler(logits)


def test_penalties_count_what_was_drawn():
    # a large presence penalty: no token comes twice before all have come once
    sampler = Sampler(SamplingConfig(presence_penalty=100.0), V, seeds=[3])
    assert sorted(int(sampler(torch.zeros(1, V))) for _ in range(V)) == list(range(V))
    # the repetition penalty sees the prompt, the presence penalty does not
    prompts = [[0, 1]]
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert int(Sampler(SamplingConfig(temperature=0, repetition_penalty=10.0), 4, [0], prompts)(logits)) == 2
    assert int(Sampler(SamplingConfig(temperature=0, presence_penalty=10.0), 4, [0], prompts)(logits)) == 0


def test_greedy_takes_the_likeliest_after_penalties_and_bans():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert Sampler(SamplingConfig(temperature=0), 3, [0, 1])(logits).tolist() == [0, 1]
    assert Sampler(SamplingConfig(temperature=0, banned=(0,)), 3, [0, 1])(logits).tolist() == [1, 1]
    assert Sampler(SamplingConfig(top_k=1), 3, [0, 1])(logits).tolist() == [0, 1]


def test_low_temperature_nears_greedy():
    logits = torch.randn(4, V)
    tokens = Sampler(SamplingConfig(temperature=1e-6), V, range(4))(logits)
    assert torch.equal(tokens, logits.argmax(-1))


BAD = [
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": 2.5}, "whole number"),
    ({"num_samples": 0}, "num_samples"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e-300}, "temperature"),
    ({"temperature": math.nan}, "finite"),
    ({"temperature": "hot"}, "finite"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"typical_p": 0.0}, "typical_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": math.inf}, "presence_penalty"),
    ({"frequency_penalty": 1e9}, "frequency_penalty"),
    ({"seed": -1}, "seed"),
    ({"logprobs": -1}, "logprobs"),
    ({"context": "swim"}, "context"),
    ({"stop": ("",)}, "stop string"),
    ({"stop": "end"}, "tuple"),
    ({"banned": "abc"}, "tuple"),
    ({"logit_bias": {1: -math.inf}}, "banned"),
    ({"logit_bias": {1: 2.0}, "banned": (1,)}, "both banned and"),
    ({"temperature": 0, "top_p": 0.9}, "drop top_p"),
    ({"temperature": 0, "top_k": 40}, "drop top_k"),
    ({"temperature": 0, "num_samples": 2}, "copies"),
]


@pytest.mark.parametrize(("knobs", "says"), BAD, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_bad_knobs_are_refused_in_one_sentence(knobs, says):
    with pytest.raises(SamplingError, match=says) as caught:
        SamplingConfig(**knobs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"banned": (V,)}, "outside the vocabulary of 11"),
        ({"logit_bias": {-1: 1.0}}, "outside the vocabulary"),
        ({"banned": ("e",)}, "without a tokenizer"),
        ({"banned": tuple(range(V))}, "leave at least one"),
    ],
)
def test_tokens_that_the_vocabulary_cannot_serve_are_refused(knobs, says):
    with pytest.raises(SamplingError, match=says):
        Sampler(SamplingConfig(**knobs), V, seeds=[0])


def test_every_field_has_its_meaning_in_a_comment():
    lines = Path(sampling.__file__).read_text(encoding="utf-8").splitlines()
    for f in fields(SamplingConfig):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {f.name}: "))
        assert lines[at - 1].startswith("    # "), f.name
