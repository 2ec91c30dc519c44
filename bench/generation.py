"""The contestants of the generation contests: greedy continuations, so that everybody must write the same tokens."""

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastchargpt.bench.contest import Absent, Contestant
from fastchargpt.bench.peers import nanogpt_model
from fastchargpt.bench.settings import Settings
from fastchargpt.config import GPTConfig
from fastchargpt.engines import EngineConfig
from fastchargpt.generation import generate_tokens
from fastchargpt.model import GPT
from fastchargpt.sampling import SamplingConfig

__all__ = ["CONTESTANTS", "Errand", "entrants", "errands"]

# `fastchargpt` is what a user gets; the two after it are what that is made of
CONTESTANTS = ("fastchargpt", "fastchargpt-no-drafts", "fastchargpt-torch", "uncached", "peer-nanogpt")
ENGINES = {"fastchargpt-no-drafts": EngineConfig(speculate="off"), "fastchargpt-torch": EngineConfig(engine="torch")}
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Errand:
    """What is to be written: `tokens` more tokens for each of `batch` sequences."""

    name: str
    batch: int
    tokens: int
    config: GPTConfig


def errands(device: torch.device, *, quick: bool) -> list[Errand]:
    """One sequence and many, within the context, by a small and a larger model."""
    small = GPTConfig(vocab_size=65, block_size=256, n_layer=4, n_head=4, n_embd=128, bias=False)
    large = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
    if quick:
        return [Errand("4x128", 1, 64, small)]
    models = [("4x128", small), ("6x384", large)]
    return [
        Errand(name, batch, 240, config) for name, config in models for batch in (1, 64 if device.type == "cuda" else 8)
    ]


def entrants(errand: Errand, settings: Settings) -> dict[str, Callable[[], Contestant]]:
    """Everybody with the same weights and the same prompt."""
    device = settings.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        model = GPT(errand.config).eval()
        for parameter in model.parameters():  # far from initial weights, whose likeliest tokens are all but ties
            parameter.data += 0.1 * torch.randn_like(parameter)
        prompt = torch.randint(errand.config.vocab_size, (errand.batch, PROMPT_TOKENS)).to(device)
    model = model.to(device)
    truth = functools.cache(lambda: _uncached(_double(model), prompt, errand.tokens))

    def build(name: str) -> Contestant:
        write = _write(name, model, prompt, errand, settings)
        side = "peer" if name.startswith("peer-") else "reference" if name == "uncached" else "ours"
        facts = {"tokens": errand.batch * errand.tokens, "side": side}
        return Contestant(call=write, check=lambda: _judge(write(), truth()), facts=facts)

    return {name: functools.partial(build, name) for name in CONTESTANTS}


def _write(name: str, model: GPT, prompt: Tensor, errand: Errand, settings: Settings) -> Callable[[], Tensor]:
    if name == "fastchargpt":
        return lambda: model.generate(prompt, errand.tokens, top_k=1)
    if name in ENGINES:
        greedy = SamplingConfig(max_new_tokens=errand.tokens, top_k=1)
        return lambda: generate_tokens(model, prompt, greedy, ENGINES[name])
    if name == "uncached":
        return lambda: _uncached(model, prompt, errand.tokens)
    if "nanogpt" not in settings.peers:
        raise Absent("give its checkout with --peer nanogpt=PATH")
    with contextlib.redirect_stdout(io.StringIO()):
        peer = nanogpt_model(settings.peers["nanogpt"], errand.config).to(settings.device).eval()
    peer.load_state_dict(model.state_dict())
    return lambda: peer.generate(prompt, errand.tokens, top_k=1)  # type: ignore[operator]


def _double(model: GPT) -> GPT:
    copy = GPT(model.config).double().eval()
    copy.load_state_dict(model.state_dict())
    copy.set_attention("naive")
    return copy.to(next(model.parameters()).device)


@torch.no_grad()
def _uncached(model: GPT, idx: Tensor, tokens: int) -> Tensor:
    """The whole sequence through the model for each new token, and the likeliest taken."""
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size :])[0]
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def _judge(written: Tensor, truth: Tensor) -> str | None:
    if written.shape != truth.shape:
        return f"it wrote {tuple(written.shape)} tokens, and {tuple(truth.shape)} were asked for"
    different = int((written != truth).any(dim=0).int().argmax())
    return None if torch.equal(written, truth) else f"token {different} is not the one that float64 finds likeliest"
