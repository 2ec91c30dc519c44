"""The contestants of the generation contests: the same weights and prompt, sampled as nanoGPT's sample.py does.

Each is first checked by what it writes greedily: every token must be the one that one float64 pass over the text finds
likeliest at its place. Then it is timed while it samples, because greedy text soon repeats itself, and drafts of that
are nearly always right.
"""

import contextlib
import copy
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastchargpt.bench.contest import Absent, Contestant
from fastchargpt.bench.peers import nanogpt_model
from fastchargpt.bench.settings import Settings
from fastchargpt.bench.weights import Weights, bits_per_token, load_weights, train_weights
from fastchargpt.config import GPTConfig
from fastchargpt.engines import EngineConfig
from fastchargpt.errors import ConfigError, SamplingError
from fastchargpt.generation import generate_tokens
from fastchargpt.model import GPT
from fastchargpt.native import AHEAD, NativeEngine, native_problem
from fastchargpt.roofline import measure_roof
from fastchargpt.sampling import Sampler, SamplingConfig
from fastchargpt.timing import race

__all__ = ["CONTESTANTS", "Errand", "entrants", "errands"]

# `fastchargpt` is what a user gets; those after it are what that is chosen from
ENGINES = {
    "fastchargpt-plain": EngineConfig(engine="native", speculate="off"),
    "fastchargpt-drafts": EngineConfig(speculate="on"),
    "fastchargpt-int8": EngineConfig(weights="int8"),
    "fastchargpt-fused": EngineConfig(fuse="on"),
    "fastchargpt-torch": EngineConfig(engine="torch"),
}
# on a GPU: weights in bf16, and nanoGPT under the autocast of its sample.py; the others compute in fp32
BF16 = ("fastchargpt-bf16", "peer-nanogpt-bf16")
CONTESTANTS = ("fastchargpt", *ENGINES, "uncached", "peer-nanogpt", *BF16)
# of nanoGPT's sample.py
TEMPERATURE, TOP_K = 0.8, 200
# tokens for each of 64 sequences: fewer than for one, or nanoGPT would take minutes; longer texts would suit it less
MANY = 100
# How far below the likeliest a token's logit may lie: ties that fp32 cannot tell apart, or that int8 or bf16 weights
# may turn.
TIE, TIE_ROUNDED = 1e-3, 0.3
# what int8 weights may cost, in bits per token
INT8_BITS = 0.01


@dataclass(frozen=True)
class Errand:
    """What is to be written: `tokens` more tokens for each of `batch` sequences, within the context."""

    name: str
    batch: int
    tokens: int
    # who lends the weights
    weights: Callable[[], Weights]
    # whether it is also done without a cache, and how often each is timed at least
    uncached: bool = True
    rounds: int | None = None


def errands(settings: Settings) -> list[Errand]:
    """One sequence and 64, by a small and a larger model; or by the checkpoint that the settings name."""
    device, quick = settings.device, settings.quick
    if settings.model is not None:
        lent = functools.partial(load_weights, settings.model, device)
        config = lent().model.config
        name, few = f"{config.n_layer}x{config.n_embd}", lent().model.get_num_params() < 2e6
        # 64 sequences by a larger model would take its peers minutes a call
        batch = [Errand(name, 64, MANY, lent, uncached=False, rounds=3)] if few or device.type == "cuda" else []
        return [Errand(name, 1, 250, lent, uncached=few, rounds=3), *batch]
    small = GPTConfig(vocab_size=65, block_size=256, n_layer=4, n_head=4, n_embd=128, bias=False)
    large = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
    if quick:
        return [Errand("4x128", 1, 64, functools.partial(train_weights, small, 60, device))]
    small_weights = functools.partial(train_weights, small, 300, device)
    large_weights = functools.partial(train_weights, large, 60, device)
    batches = [Errand("4x128", 64, MANY, small_weights, uncached=False, rounds=3)]
    if device.type == "cuda":
        batches.append(Errand("6x384", 64, MANY, large_weights, uncached=False, rounds=3))
    return [
        Errand("4x128", 1, 250, small_weights),
        Errand("6x384", 1, 250, large_weights, uncached=False, rounds=3),
        *batches,
    ]


def entrants(errand: Errand, settings: Settings) -> dict[str, Callable[[], Contestant]]:
    """Everybody with the same weights and the same prompt, a newline."""
    lent = functools.cache(errand.weights)
    floor = functools.cache(lambda dtype: _least_seconds(lent().model, errand, settings, dtype))

    def build(name: str) -> Contestant:
        weights = lent()
        config = weights.model.config
        if config.block_size < errand.tokens + 1:
            raise ConfigError(f"the model's context of {config.block_size} tokens is too short for {errand.tokens}")
        prompt = torch.zeros(errand.batch, 1, dtype=torch.int64, device=settings.device)
        write = _writer(name, weights.model, prompt, errand, settings)
        side = "peer" if name.startswith("peer-") else "reference" if name == "uncached" else "ours"
        facts: dict[str, Any] = {
            "tokens": errand.batch * errand.tokens,
            "side": side,
            # int8 weights are another model's, all but: not to be ranked against fp32, and neither is bf16
            "match": "int8" if name == "fastchargpt-int8" else "bf16" if name in BF16 else "",
            "weights": weights.about,
            "floor_s": floor(torch.bfloat16 if name in BF16 else torch.float32),
        }
        if name == "fastchargpt-drafts" and errand.batch == 1 and native_problem(weights.model) is None:
            facts["tokens_per_pass"] = _tokens_per_pass(weights.model, errand.tokens)
        exact = name not in ("fastchargpt-int8", *BF16)
        with contextlib.suppress(Absent):
            if name in ("fastchargpt-plain", "fastchargpt-int8"):
                facts["bits_per_token"] = bits_per_token(weights, int8=name == "fastchargpt-int8")
                facts["bits_above_fp32"] = facts["bits_per_token"] - bits_per_token(weights, int8=False)

        def check() -> str | None:
            if facts.get("bits_above_fp32", 0.0) > INT8_BITS:
                return f"int8 weights cost {facts['bits_above_fp32']:.4f} bits a token"
            return _judge(weights.model, write(1.0, 1), prompt, errand.tokens, TIE if exact else TIE_ROUNDED)

        return Contestant(call=lambda: write(TEMPERATURE, TOP_K), check=check, facts=facts)

    return {name: functools.partial(build, name) for name in CONTESTANTS}


def _writer(
    name: str, model: GPT, prompt: Tensor, errand: Errand, settings: Settings
) -> Callable[[float, int], Tensor]:
    """A call with temperature and top_k."""
    tokens = errand.tokens
    if name in BF16 and settings.device.type != "cuda":
        raise Absent("bf16 is compared on a GPU")
    if name == "fastchargpt-bf16":
        model = copy.deepcopy(model).bfloat16()
    if name in ("fastchargpt", "fastchargpt-bf16"):
        return lambda temperature, top_k: model.generate(prompt, tokens, temperature=temperature, top_k=top_k)
    if name in ENGINES:

        def ours(temperature: float, top_k: int) -> Tensor:
            config = SamplingConfig(max_new_tokens=tokens, temperature=temperature, top_k=top_k)
            try:
                return generate_tokens(model, prompt, config, ENGINES[name])
            except SamplingError as reason:
                raise Absent(str(reason)) from None

        return ours
    if name == "uncached":
        if not errand.uncached:
            raise Absent("it takes as long as nanoGPT, minutes in all")
        return lambda temperature, top_k: _uncached(model, prompt, tokens, temperature, top_k)
    if "nanogpt" not in settings.peers:
        raise Absent("give its checkout with --peer nanogpt=PATH")
    if model.config != GPTConfig.family("nanogpt", **_nanogpt_shape(model.config)):
        raise Absent("the checkpoint is not of the nanogpt family")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = nanogpt_model(settings.peers["nanogpt"], model.config).to(settings.device).eval()
    peer.load_state_dict(model.state_dict())

    def theirs(temperature: float, top_k: int) -> Tensor:
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=name in BF16):
            written: Tensor = peer.generate(prompt, tokens, temperature=temperature, top_k=top_k)  # type: ignore[operator]
        return written

    return theirs


def _nanogpt_shape(config: GPTConfig) -> dict[str, Any]:
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return {name: getattr(config, name) for name in names}


@torch.inference_mode()
def _tokens_per_pass(model: GPT, tokens: int) -> float:
    """How many tokens each pass of the fp32 weights gives where int8 weights draft; the most is AHEAD + 1."""
    config = SamplingConfig(temperature=TEMPERATURE, top_k=TOP_K)
    vocab_size = model.config.vocab_size
    engine, sampler = NativeEngine(model, 1, tokens, draft=True), Sampler(config, vocab_size, [1])
    drawn, passes = sampler(engine.fill([0], [[0]])).tolist(), 0
    while len(drawn) + AHEAD + 1 < tokens:
        u = sampler.peek_uniforms(AHEAD + 1)
        more = engine.decode([0], drawn[-1:], [len(drawn)], vocab_size, config, u)
        sampler.use_uniforms(len(more))
        drawn += [token for (token,) in more]
        passes += 1
    return (len(drawn) - 1) / passes


def _least_seconds(model: GPT, errand: Errand, settings: Settings, dtype: torch.dtype) -> float:
    """The time of reading weights and cache once for each token, or of their products where that is more.

    Bytes a second are those of the fastest sum of as many in one go, operations a second those of large matrix
    products, both measured here.
    """
    config, device = model.config, settings.device
    parameters = model.get_num_params()
    kv_bytes = 2 * dtype.itemsize * config.n_layer * config.kv_heads * config.head_dim  # of a token
    mean = (errand.tokens + 1) / 2
    bytes_read = dtype.itemsize * parameters + errand.batch * mean * kv_bytes
    attention = 4 * config.n_layer * config.n_embd * mean
    flops = errand.batch * (2 * parameters + attention)
    source = torch.zeros(int(bytes_read) // 4, device=device)
    timing = race({"read": source.sum}, device, seconds=0.3, min_rounds=5, max_rounds=200)["read"]
    return errand.tokens * max(min(timing.seconds), flops / measure_roof(device, dtype).flops)


@torch.no_grad()
def _uncached(model: GPT, idx: Tensor, tokens: int, temperature: float, top_k: int) -> Tensor:
    """The whole sequence through the model for each new token."""
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1] / temperature
        kept = logits.topk(min(top_k, logits.size(-1)), dim=-1)
        drawn = torch.multinomial(kept.values.softmax(dim=-1), 1)
        idx = torch.cat((idx, kept.indices.gather(-1, drawn)), dim=1)
    return idx


@torch.no_grad()
def _judge(model: GPT, written: Tensor, prompt: Tensor, tokens: int, tie: float) -> str | None:
    """Whether each token is the likeliest after those before it, by a float64 model."""
    if written.shape != (len(prompt), prompt.shape[1] + tokens):
        return f"it wrote {tuple(written.shape)} tokens, and {(len(prompt), prompt.shape[1] + tokens)} were asked for"
    if not torch.equal(written[:, : prompt.shape[1]], prompt):
        return "its text does not begin with the prompt"
    exact = GPT(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    exact.set_attention("naive")
    exact.to(written.device)
    rows, first = written[:, :-1].unique(dim=0, return_inverse=True)  # the same prompt gives the same greedy text
    logits = exact.logits(exact.hidden(rows))[first][:, prompt.shape[1] - 1 :]
    drawn = logits.gather(-1, written[:, prompt.shape[1] :, None])[..., 0]
    short = (logits.amax(dim=-1) - drawn).amax(dim=0) > tie
    return (
        f"token {int(short.int().argmax())} is not the one that float64 finds likeliest" if bool(short.any()) else None
    )
