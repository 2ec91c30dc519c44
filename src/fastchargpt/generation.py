"""Text from a model: `generate` for whole continuations, `stream` for text as it comes, `generate_tokens` for tensors.

    model, tokenizer = load("out")
    for piece in stream(model, tokenizer, "ROMEO:", SamplingConfig(temperature=0.8, stop=("\\n\\n",))):
        print(piece, end="", flush=True)

An empty prompt starts from a newline where the vocabulary has one and from token 0 elsewhere (as nanoGPT's samples do);
that token is not part of the text.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastchargpt.decode import DecodeSession, resolve_context
from fastchargpt.engines import EngineConfig, drawing_engine, make_engine
from fastchargpt.errors import SamplingError, TokenizerError
from fastchargpt.model import GPT
from fastchargpt.sampling import Sampler, SamplingConfig
from fastchargpt.stopping import StopFilter
from fastchargpt.tokenizers import Tokenizer

__all__ = ["Generation", "TokenLogprob", "generate", "generate_tokens", "stream"]


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own opinion of a token it was to follow with: before every knob."""

    # the token
    token: int
    # its natural logarithm of probability
    logprob: float
    # the likeliest tokens at this place and their log-probabilities, likeliest first
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """One continuation of one prompt."""

    prompt: str
    # the continuation, without the prompt and without the stop string
    text: str
    # every token that was drawn, those of the stop string included
    tokens: tuple[int, ...]
    # why it ended: max_new_tokens were drawn, or a stop string came
    finish: Literal["length", "stop"]
    # one entry per token, where the config asks for it
    logprobs: tuple[TokenLogprob, ...] | None


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    config: SamplingConfig | None = None,
    engine: EngineConfig | None = None,
) -> list[Generation]:
    """Continue one or several prompts, all in one batch.

    Args:
        model: the model.
        tokenizer: the tokenizer it was trained with.
        prompt: a text or several, of any lengths; each gives what it would give alone from the same stream of draws.
        config: the knobs; the defaults draw 500 tokens from the model's own distribution.
        engine: what computes; the default is the fastest that keeps the model's distribution.

    Returns:
        The continuations, `config.num_samples` of the first prompt, then of the second, and so on. The one at place i
        of this list draws from stream `config.seed + i`.

    Raises:
        SamplingError: knobs that this model or tokenizer cannot serve.
        BackendUnavailableError: an engine asked for by name that cannot serve.
        TokenizerError: a prompt has a character outside the vocabulary.
    """
    config = config or SamplingConfig()
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    config = _resolve(config, tokenizer)
    starts = [_tokens(text, tokenizer) for text in prompts]
    run = _Run(
        model, [start for start in starts for _ in range(config.num_samples)], config, engine, tokenizer.vocab_size
    )
    texts = [_Text(tokenizer, config.stop) for _ in range(run.batch_size)]
    for row, token in run:
        if not texts[row].push(token):
            run.finish(row)
    return [
        Generation(
            prompt=prompts[row // config.num_samples],
            text=text.shown + text.flush(),
            tokens=tuple(text.tokens),
            finish="stop" if text.stopped else "length",
            logprobs=None if config.logprobs is None else tuple(run.logprobs[row]),
        )
        for row, text in enumerate(texts)
    ]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    config: SamplingConfig | None = None,
    engine: EngineConfig | None = None,
) -> Iterator[str]:
    """Continue a prompt, piece by piece as it is drawn: the pieces, joined, are `generate(...)[0].text`.

    A piece never ends inside a character, and text that may be the beginning of a stop string is held back until it is
    known not to be. On Ctrl-C what is held back is given out before KeyboardInterrupt goes on.

    Args:
        model: the model.
        tokenizer: the tokenizer it was trained with.
        prompt: the text to continue.
        config: the knobs, with num_samples=1.
        engine: as in `generate`.

    Raises:
        SamplingError: knobs that this model or tokenizer cannot serve; more than one sample.
        TokenizerError: the prompt has a character outside the vocabulary.
    """
    config = config or SamplingConfig()
    if config.num_samples != 1:
        raise SamplingError(
            f"stream gives one text and num_samples is {config.num_samples}: use generate, or one stream for each seed"
        )
    config = _resolve(config, tokenizer)
    # all that can be wrong is said here, at the call, and not when the first piece is asked for
    run = _Run(model, [_tokens(prompt, tokenizer)], config, engine, tokenizer.vocab_size)
    return _pieces(run, _Text(tokenizer, config.stop))


def _pieces(run: "_Run", text: "_Text") -> Iterator[str]:
    try:
        for _, token in run:
            before = len(text.shown)
            going_on = text.push(token)
            if len(text.shown) > before:
                yield text.shown[before:]
            if not going_on:
                return
    except KeyboardInterrupt:
        yield text.flush()
        raise
    if rest := text.flush():
        yield rest


@torch.no_grad()
def generate_tokens(model: GPT, idx: Tensor, config: SamplingConfig, engine: EngineConfig | None = None) -> Tensor:
    """Continue idx (B, T) int64 to (B, T + max_new_tokens); an empty idx (B, 0) starts from token 0.

    Raises:
        SamplingError: a knob that needs text (stop, a str in banned or logit_bias) or more than one sample per row; or
            tokens outside the vocabulary.
    """
    if config.stop or config.num_samples != 1 or config.logprobs is not None:
        name = "stop" if config.stop else "num_samples" if config.num_samples != 1 else "logprobs"
        raise SamplingError(f"{name} needs text around the tokens: use fastchargpt.generate, which takes a tokenizer")
    if idx.dim() != 2 or idx.shape[0] == 0 or idx.is_floating_point():
        raise SamplingError(f"idx must be (B, T) token numbers, not {tuple(idx.shape)} {idx.dtype}")
    vocab_size = model.config.vocab_size
    if idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < vocab_size:
        raise SamplingError(f"idx has tokens outside the vocabulary of {vocab_size} tokens")
    run = _Run(model, [row or [0] for row in idx.tolist()], config, engine, vocab_size)
    # no row ends before the others, so a step has a token of each
    drawn = torch.tensor([tokens for _, tokens in run.steps()], dtype=idx.dtype, device=idx.device)
    return torch.cat((idx, drawn.view(-1, run.batch_size).T), dim=1)


def _tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    if text:
        return [int(token) for token in tokenizer.encode(text)]
    try:
        return [int(token) for token in tokenizer.encode("\n")]
    except TokenizerError:
        return [0]


def _resolve(config: SamplingConfig, tokenizer: Tokenizer) -> SamplingConfig:
    """The config with texts in `banned` and `logit_bias` made tokens."""

    def token(name: str, text: str | int) -> int:
        if isinstance(text, int):
            return text
        tokens = tokenizer.encode(text)
        if len(tokens) != 1:
            raise SamplingError(f"{name} takes single tokens, and {text!r} is {len(tokens)} of them")
        return int(tokens[0])

    if not config.banned and not config.logit_bias:
        return config
    return dataclasses.replace(
        config,
        banned=tuple(token("banned", text) for text in config.banned),
        logit_bias={token("logit_bias", text): bias for text, bias in config.logit_bias.items()},
    )


class _Text:
    """The text of one continuation as it grows: whole characters only, and nothing of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.tokens: list[int] = []
        self.shown = ""
        self._decoder = tokenizer.stream_decoder()
        self._filter = StopFilter(stop) if stop else None

    @property
    def stopped(self) -> bool:
        return self._filter is not None and self._filter.stopped

    def push(self, token: int) -> bool:
        """Add a token; False once a stop string is complete."""
        self.tokens.append(token)
        piece = self._decoder.push(token)
        self.shown += self._filter.push(piece) if self._filter else piece
        return not self.stopped

    def flush(self) -> str:
        """What is still held back when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decoder.flush()
        return self._filter.push(rest) + self._filter.flush() if self._filter else rest


class _Run:
    """The loop: yields (row, token) as they are drawn, until every row has its tokens or was finished."""

    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        config: SamplingConfig,
        engine: EngineConfig | None,
        vocab_size: int,
    ) -> None:
        model = getattr(model, "_orig_mod", model)
        if vocab_size > model.config.vocab_size:
            raise SamplingError(
                f"the tokenizer has {vocab_size} tokens and the model {model.config.vocab_size}: "
                "they are not of one run"
            )
        if not prompts:
            raise SamplingError("there is no prompt: give at least one text, which may be empty")
        self.config, self.batch_size, self.vocab_size = config, len(prompts), vocab_size
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in prompts]
        self._model, self._prompts = model, prompts
        self._context = resolve_context(config.context, model)
        seed = config.seed if config.seed is not None else int(torch.randint(2**62, ()))
        device = model.lm_head.weight.device
        self._sampler = Sampler(config, vocab_size, range(seed, seed + len(prompts)), prompts, device)
        self._open = dict.fromkeys(range(self.batch_size))
        total = max(map(len, prompts)) + config.max_new_tokens
        self._engine = make_engine(model, engine or EngineConfig(), config, self.batch_size, total)
        self._session = DecodeSession(self._engine, model.config.block_size, self._context, prompts)
        self._drawing = drawing_engine(self._engine, config)

    def finish(self, row: int) -> None:
        """Draw no more for this row."""
        self._open.pop(row, None)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for rows, tokens in self.steps():
            for row, token in zip(rows, tokens, strict=True):
                if row in self._open:
                    yield row, token

    def steps(self) -> Iterator[tuple[list[int], list[int]]]:
        """Rows and the token of each; of rows that were finished a few more than they need."""
        if self.config.max_new_tokens == 0:
            return
        rows = list(self._open)
        with _evaluating(self._model):
            logits = self._session.start()
        left = self.config.max_new_tokens
        while True:
            tokens = self._draw(logits, rows)
            left -= 1
            yield rows, tokens
            while left and self._open and (more := self._ahead(rows, tokens, left)):
                for tokens in more:
                    left -= 1
                    yield rows, tokens
                    if not self._open:
                        return
                if len(self._open) < len(rows):
                    break
            if not left or not self._open:
                return
            if len(self._open) < len(rows):
                places = [place for place, row in enumerate(rows) if row in self._open]
                rows, tokens = [rows[place] for place in places], [tokens[place] for place in places]
                self._sampler.select(places)
            with _evaluating(self._model):
                logits = self._session.advance(rows, tokens)

    def _ahead(self, rows: list[int], tokens: list[int], left: int) -> list[list[int]]:
        """The rows' tokens after these, several steps at once; none where that cannot be.

        A row that ends among them has drawn the rest in vain: its tokens and its cache are not read any more.
        """
        drawing = self._drawing
        if drawing is None:
            return []
        windows = [self._session.windows[row] for row in rows]
        longest = max(map(len, windows))
        room = left if self._context == "slide" else self._session.block_size - longest
        count = min(drawing.at_once, left, room)
        if count < 2:
            return []
        u = self._sampler.peek_uniforms(count)
        drawn = drawing.decode(rows, tokens, list(map(len, windows)), self.vocab_size, self.config, u)
        for step in drawn:
            self._check(step)
        self._sampler.use_uniforms(len(drawn))
        for window, *row in zip(windows, tokens, *drawn[:-1], strict=True):
            window += row
        return drawn

    def _draw(self, logits: Tensor, rows: list[int]) -> list[int]:
        if self._drawing is not None:
            u = self._sampler.peek_uniforms(1)[:, 0]
            tokens = self._drawing.draw(logits, self.vocab_size, self.config, u)
            self._sampler.use_uniforms(1)
        else:
            # a model padded to a round vocabulary has logits for tokens that the tokenizer does not have
            logits = logits[:, : self.vocab_size]
            with torch.inference_mode():
                tokens = self._sampler(logits).tolist()
            if self.config.logprobs is not None:
                self._note(logits, rows, tokens, self.config.logprobs)
        self._check(tokens)
        return tokens

    def _check(self, tokens: list[int]) -> None:
        if max(tokens) >= self.vocab_size:
            raise SamplingError("the model's logits are not finite: its training diverged or its weights are damaged")

    def _note(self, logits: Tensor, rows: list[int], tokens: list[int], count: int) -> None:
        logprobs = logits.double().log_softmax(dim=-1)
        top = logprobs.topk(min(count, self.vocab_size), dim=-1)
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        for row, token, logprob, ids, values in zip(
            rows, tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            self.logprobs[row].append(TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))))


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Without gradients, and without dropout where the model is in training."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()
