"""The contestants of the training contests: one optimiser step, ours and the peers', from the same weights."""

import contextlib
import copy
import functools
import io
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastchargpt.bench.contest import Absent, Contestant, allow_recompiles
from fastchargpt.bench.peers import lecture_model, nanogpt_model
from fastchargpt.bench.settings import Settings
from fastchargpt.choices import choose_compile
from fastchargpt.config import Family, GPTConfig
from fastchargpt.errors import BackendUnavailableError
from fastchargpt.model import GPT
from fastchargpt.precision import choose_precision
from fastchargpt.roofline import measure_roof
from fastchargpt.step import TrainStep, make_train_step

__all__ = ["Recipe", "Work", "contestants", "entrants", "works"]

Batch = tuple[Tensor, Tensor]

# By how much a loss may differ from the oracle's in each precision: the last holds what 16-bit products cost a run of a
# few steps, with room to spare.
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2, "fp16": 2e-2}
LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 1e-3, 0.1, (0.9, 0.99), 1.0


@dataclass(frozen=True)
class Work:
    """What a step is taken on."""

    name: str
    batch_size: int
    # of the nanogpt family, without dropout: with it no two contestants compute the same
    shape: GPTConfig
    # first steps whose losses must be the oracle's
    checked_steps: int = 5

    def checked(self, family: Family) -> int:
        """How many steps of a family are checked: no more than five where rounding flips units of a ReLU.

        Its kink makes runs of the lecture's model in float32 differ by 1e-4 after ten steps and by 1e-2 after forty,
        whoever computes them; those of the smooth families stay within 1e-5.
        """
        return min(5, self.checked_steps) if family == "lecture" else self.checked_steps


@dataclass(frozen=True)
class Recipe:
    """How a step of ours is taken."""

    family: Family
    precision: str
    # native, eager (torch's engine as it is), compiled (torch.compile), or graphed (that as one CUDA graph)
    engine: str

    def __str__(self) -> str:
        return f"{self.family}-{self.precision}-{self.engine}"


def works(device: torch.device, *, quick: bool) -> list[Work]:
    """The CPU demo of nanoGPT's README; shakespeare-char too, where it does not take minutes."""
    small = GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False)
    large = GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)
    demo, char = Work("cpu-demo", 12, small, 5 if quick else 50), Work("shakespeare-char", 64, large)
    if device.type == "cuda":
        return [char] if quick else [demo, char]
    return [demo] if quick else [demo, Work("shakespeare-char-b16", 16, large)]


def contestants(device: torch.device, *, quick: bool) -> list[str]:
    """Names of the contestants, the peers' at the end."""
    gpu = device.type == "cuda"
    families: tuple[Family, ...] = ("nanogpt", "lecture", "modern")
    if quick:  # a cold compile takes half a minute on a CPU
        how = [("bf16", "compiled"), ("bf16", "graphed")] if gpu else [("fp32", "native"), ("fp32", "eager")]
    else:
        # on a CPU without AMX bf16 is ten times slower than fp32, and auto says so
        precisions = ("fp32", "tf32", "bf16") if gpu else sorted({"fp32", choose_precision("auto", device).name})
        engines = ("eager", "compiled", "graphed") if gpu else ("eager", "compiled")
        how = [*([] if gpu else [("fp32", "native")]), *itertools.product(precisions, engines)]
    recipes = [Recipe(family, *each) for family in families for each in how]
    peers = (
        ["peer-nanogpt", "peer-lecture"] if quick or gpu else ["peer-nanogpt", "peer-nanogpt-compiled", "peer-lecture"]
    )
    return [*map(str, recipes), *peers]


def entrants(work: Work, settings: Settings) -> dict[str, Callable[[], Contestant]]:
    """Every contestant for a piece of work, on the same batches."""
    device = settings.device
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(work.shape.vocab_size, (4, work.batch_size, work.shape.block_size + 1), generator=generator)
    batches = [(row[:, :-1].contiguous().to(device), row[:, 1:].contiguous().to(device)) for row in rows]
    roof_flops = functools.cache(functools.partial(_roof_flops, device))
    oracle = functools.cache(functools.partial(_oracle, work, tuple(batches)))

    def build(name: str) -> Contestant:
        if name.startswith("peer-"):
            make = functools.partial(_peer, name.removeprefix("peer-"), work, settings)
        else:
            make = functools.partial(_ours, name, work, device)
        compile_facts = _compile_seconds(make, batches[0]) if name.endswith("compiled") else {}
        step, family, precision, flops = make()
        losses = [float(step(*batch)) for batch in itertools.islice(itertools.cycle(batches), work.checked(family))]
        turn = itertools.cycle(batches)
        tokens = work.batch_size * work.shape.block_size
        side = "peer" if name.startswith("peer-") else "ours"
        facts = {
            "side": side,
            "match": family,
            "flops": flops * tokens,
            "tokens": tokens,
            "precision": precision,
            "roof_flops": roof_flops(precision),
        }
        return Contestant(
            call=lambda: step(*next(turn)),
            other_bytes=_native_bytes(step),
            check=lambda: _judge(losses, oracle(family), TOLERANCE[precision]),
            facts={**facts, **compile_facts, "loss": losses[-1], "loss_after_steps": len(losses)},
        )

    return {name: functools.partial(build, name) for name in contestants(device, quick=settings.quick)}


def _native_bytes(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], int] | None:
    native = step.native if isinstance(step, TrainStep) else None
    return None if native is None else lambda: native.held_bytes


def _compile_seconds(make: Callable[[], "Step"], batch: Batch) -> dict[str, float]:
    """Seconds of the first step: with an empty cache of compiled code, and with that of an earlier process."""
    import torch._dynamo
    from torch._inductor.utils import fresh_cache

    seconds = {}
    with fresh_cache():
        for name in ("compile_cold_s", "compile_warm_s"):
            torch._dynamo.reset()  # forgets what this process has compiled; the cache on disk stays
            step, *_ = make()
            start = time.perf_counter()
            float(step(*batch))
            seconds[name] = time.perf_counter() - start
    torch._dynamo.reset()
    return seconds


def _roof_flops(device: torch.device, precision: str) -> float:
    chosen = choose_precision(precision, device)
    with chosen.matmuls():
        return measure_roof(device, chosen.dtype).flops


def _judge(losses: Sequence[float], truth: Sequence[float], tolerance: float) -> str | None:
    worst = max(abs(loss - true) for loss, true in zip(losses, truth, strict=True))
    if worst <= tolerance:  # NaN is not
        return None
    return f"within {len(truth)} steps its loss is {worst:.2g} nats off the oracle's; allowed are {tolerance:g}"


def _model(family: Family, work: Work) -> GPT:
    """Ours at the work's shape, weights from a fixed seed. Zero-initialised parts are drawn too, to give them work."""
    shape = work.shape
    sizes = {name: getattr(shape, name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    config = shape if family == "nanogpt" else GPTConfig.family(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1337)
        return GPT(replace(config, proj_init="normal"))


def _oracle(work: Work, batches: Sequence[Batch], family: Family) -> list[float]:
    """The losses of plain float64 training on the naive attention: forward, backward, clip, AdamW, nothing fused."""
    model = _model(family, work).double()
    model.set_attention("naive")
    step = _plain_step(model, clip=True, decay_all=False)
    turn = itertools.cycle([(x.cpu(), y.cpu()) for x, y in batches])
    return [float(step(x, y)) for x, y in itertools.islice(turn, work.checked(family))]


def _plain_step(model: nn.Module, *, clip: bool, decay_all: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A step as one writes it by hand; matrices alone decay unless `decay_all`."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if decay_all or p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if not decay_all and p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LEARNING_RATE, betas=BETAS)
    return _loop_body(model, optimizer, clip=clip)


def _loop_body(model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(x, y)[1]
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


Step = tuple[Callable[[Tensor, Tensor], Tensor], Family, str, int]


def _ours(name: str, work: Work, device: torch.device) -> Step:
    family, precision, engine = name.split("-")
    compiled = engine in ("compiled", "graphed")
    if compiled:
        try:
            choose_compile("on", device)
        except BackendUnavailableError as error:
            raise Absent(str(error)) from None
        allow_recompiles()
    model = _model(family, work).to(device)  # type: ignore[arg-type]
    step = make_train_step(
        model,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        grad_clip=GRAD_CLIP,
        precision=choose_precision(precision, device),
        compile=compiled,
        cuda_graph=engine == "graphed",
        engine="native" if engine == "native" else "torch",
    )
    return step, family, precision, model.flops_per_token()  # type: ignore[return-value]


def _peer(name: str, work: Work, settings: Settings) -> Step:
    """A peer's model under the statements of its own training loop, in fp32, eager: as its script runs on a CPU.

    nanoGPT is also there under torch.compile, its own option. On a GPU both scripts differ: its default is bf16
    autocast and torch.compile, so it gets them.
    """
    name, _, how = name.partition("-")
    if name not in settings.peers:
        raise Absent(f"give its checkout with --peer {name}=PATH")
    checkout, device = settings.peers[name], settings.device
    if name == "nanogpt":
        ours = _model("nanogpt", work)
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its parameter count
            model = nanogpt_model(checkout, work.shape).to(device)
            optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device.type)  # type: ignore[operator]
        model.load_state_dict(ours.state_dict())
        if device.type == "cuda":
            allow_recompiles()
            model.compile()
            return _autocast_step(model, optimizer), "nanogpt", "bf16", ours.flops_per_token()
        if how == "compiled":
            allow_recompiles()
            model.compile()
        return _loop_body(model, optimizer, clip=True), "nanogpt", "fp32", ours.flops_per_token()
    from fastchargpt.integrations.lecture import to_lecture

    ours = _model("lecture", work)
    model = lecture_model(checkout, ours.config, str(device)).to(device)
    model.load_state_dict(copy.deepcopy(to_lecture(ours)))
    # its script neither clips nor spares the biases from decay; both are set to the oracle's here, at no cost to it
    return _plain_step(model, clip=True, decay_all=False), "lecture", "fp32", ours.flops_per_token()


def _autocast_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    plain = _loop_body(model, optimizer, clip=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return plain(x, y)

    return step
