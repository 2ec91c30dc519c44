"""nanoGPT's model.py in one line: its scripts unmodified, its losses, and its live models with our attention."""

import copy
import dataclasses
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import checkout
from torch import Tensor, nn
from torch.nn import functional as F

import fastchargpt
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.integrations.nanogpt import GPT, AcceleratedAttention, GPTConfig, accelerate, restore

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 29}
ONE_LINE = "from fastchargpt.integrations.nanogpt import GPT, GPTConfig\n"
TRAIN = [
    *("--dataset=toy", "--device=cpu", "--compile=False", "--dtype=float32", "--out_dir=out", "--dropout=0.0"),
    *(
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--batch_size=8",
        "--gradient_accumulation_steps=2",
    ),
    *("--max_iters=100", "--warmup_iters=10", "--lr_decay_iters=100", "--learning_rate=3e-3", "--min_lr=3e-4"),
    *("--eval_interval=50", "--eval_iters=2", "--log_interval=1"),
]
# What nanoGPT's own train.py and model.py (commit 3adf61e) print with TRAIN on `toy_tokens`: iteration -> loss
PINNED = {0: 3.383, 10: 3.0722, 20: 2.6368, 30: 2.2717, 40: 2.0343, 50: 1.8539}
PINNED |= {60: 1.7471, 70: 1.7288, 80: 1.6572, 90: 1.6437, 100: 1.6533}


def toy_tokens(count: int = 6000) -> np.ndarray:
    """A text of 29 letters with something to learn in it, the same everywhere."""
    tokens, token, state = np.empty(count, np.uint16), 1, 42
    for i in range(count):
        state = (1103515245 * state + 12345) % 2**31
        token = (3 * token + (state >> 16) % 4) % 29
        tokens[i] = token
    return tokens


def toy_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokens = toy_tokens()
    tokens[:5000].tofile(folder / "train.bin")
    tokens[5000:].tofile(folder / "val.bin")
    letters = [chr(97 + i) for i in range(26)] + ["\n", " ", "."]
    meta = {"vocab_size": 29, "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_one_line_trains_as_nanogpt_does() -> None:
    """The loop of train.py with TRAIN's options, on the one-line model, gives the losses that nanoGPT printed."""
    tokens = torch.from_numpy(toy_tokens()[:5000].astype(np.int64))
    val = torch.from_numpy(toy_tokens()[5000:].astype(np.int64))

    def get_batch(data: Tensor) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - 32, (8,))
        return torch.stack([data[i : i + 32] for i in starts]), torch.stack([data[i + 1 : i + 33] for i in starts])

    torch.manual_seed(1337)
    model = GPT(GPTConfig(**SHAPE, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
    x, y = get_batch(tokens)
    for iteration in range(101):
        rate = 3e-3 * (iteration + 1) / 11
        if iteration >= 10:
            rate = 3e-4 + 0.5 * (1 + math.cos(math.pi * (iteration - 10) / 90)) * (3e-3 - 3e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if iteration % 50 == 0:  # an evaluation draws its batches from the same generator
            for data in (tokens, tokens, val, val):
                get_batch(data)
        for _ in range(2):
            loss = model(x, y)[1]
            x, y = get_batch(tokens)
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if iteration in PINNED:
            assert loss.item() == pytest.approx(PINNED[iteration], abs=1e-4), iteration


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_one_line_compiles_as_one_graph() -> None:
    # train.py compiles by default: forward and backward without a break in the graph, and the eager run's losses
    tokens = torch.from_numpy(toy_tokens(5000).astype("int64"))
    losses: list[list[float]] = []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(1337)
        model = GPT(GPTConfig(**{**SHAPE, "n_layer": 1}))
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        step = torch.compile(model, fullgraph=True) if compiled else model
        losses.append([])
        for at in torch.randint(4900, (8, 4)):
            x = torch.stack([tokens[i : i + 32] for i in at])
            y = torch.stack([tokens[i + 1 : i + 33] for i in at])
            _, loss = step(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.2
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)


# ------------------------------------------------------------------------------------------- with a checkout at hand


def run(folder: Path, *words: str) -> str:
    """What a script of nanoGPT prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """nanoGPT's folder with its own model.py and with ours, and what train.py printed there."""
    source = checkout("FASTCHARGPT_NANOGPT")
    found = {}
    for whose in ("theirs", "ours"):
        folder = tmp_path_factory.mktemp(whose)
        for name in ("train.py", "sample.py", "bench.py", "configurator.py", "model.py"):
            shutil.copy(source / name, folder)
        if whose == "ours":
            (folder / "model.py").write_text(ONE_LINE)
        (folder / "tiktoken.py").write_text("")  # sample.py imports it, and uses it only for GPT-2's vocabulary
        toy_data(folder / "data" / "toy")
        found[whose] = folder, run(folder, "train.py", *TRAIN)
    return found


def losses(output: str) -> dict[int, float]:
    return {int(i): float(loss) for i, loss in re.findall(r"^iter (\d+): loss (\S+),", output, re.M)}


def test_train_py(both: dict[str, tuple[Path, str]]) -> None:
    theirs, ours = losses(both["theirs"][1]), losses(both["ours"][1])
    assert list(theirs) == list(ours) == list(range(101))
    assert max(abs(theirs[i] - ours[i]) for i in theirs) <= 1e-4
    assert theirs[100] < theirs[0] - 1
    for iteration, loss in PINNED.items():
        assert theirs[iteration] == pytest.approx(loss, abs=1e-4)
    steps = [re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", output, re.M) for _, output in both.values()]
    assert len(steps[0]) == 3
    for a, b in zip(*steps, strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], abs=2e-4)
    printed = [
        re.findall(r"^(?:number of parameters|num .*parameter tensors).*$", text, re.M) for _, text in both.values()
    ]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 3
    rates = [re.findall(r"mfu (\S+)%", output)[-1] for _, output in both.values()]
    assert all(float(rate) >= 0 for rate in rates)


def test_checkpoints_cross_over(both: dict[str, tuple[Path, str]]) -> None:
    # each side resumes from the other's ckpt.pt
    layouts = []
    for whose, other in (("theirs", "ours"), ("ours", "theirs")):
        folder = both[whose][0]
        content = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
        layouts.append({name: tuple(tensor.shape) for name, tensor in content["model"].items()})
        assert sorted(content) == ["best_val_loss", "config", "iter_num", "model", "model_args", "optimizer"]
        shutil.copytree(folder / "out", both[other][0] / "crossed")
        words = [word for word in TRAIN if not word.startswith(("--out_dir", "--max_iters"))]
        output = run(both[other][0], "train.py", *words, "--out_dir=crossed", "--max_iters=103", "--init_from=resume")
        assert list(losses(output)) == [100, 101, 102, 103]
        assert losses(output)[100] < 2.5
    assert list(layouts[0].items()) == list(layouts[1].items())


def test_sample_py(both: dict[str, tuple[Path, str]]) -> None:
    words = ["--device=cpu", "--dtype=float32", "--num_samples=2", "--max_new_tokens=40", "--start=ab"]
    for whose in both:
        output = run(both[whose][0], "sample.py", "--out_dir=out", *words)
        texts = output.split("Loading meta from data/toy/meta.pkl...\n")[1].split("\n---------------\n")
        assert [text[:2] for text in texts[:2]] == ["ab", "ab"]
        assert [len(text) for text in texts[:2]] == [42, 42]


@pytest.mark.slow
def test_bench_py(both: dict[str, tuple[Path, str]]) -> None:
    # its plain timing calls torch.cuda.synchronize, so on a CPU its profiler's loop is what can run: GPT-2's full size
    words = ["--device=cpu", "--dtype=float32", "--compile=False", "--real_data=False", "--profile=True"]
    small = ["--batch_size=1", "--block_size=4"]
    found = [losses_of_bench(run(both[whose][0], "bench.py", *words, *small)) for whose in both]
    assert len(found[0]) == 15
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def losses_of_bench(output: str) -> list[float]:
    assert "number of parameters: 123.59M" in output
    return [float(loss) for loss in re.findall(r"^\d+/15 loss: (\S+)$", output, re.M)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_loss_and_gradients(bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    theirs_module = load_module(checkout("FASTCHARGPT_NANOGPT") / "model.py")
    torch.manual_seed(3)
    theirs = theirs_module.GPT(theirs_module.GPTConfig(**SHAPE, bias=bias)).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = GPT(theirs.config).to(dtype)  # its own config object will do
    ours.load_state_dict(theirs.state_dict())
    x = torch.randint(29, (3, 32), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (theirs, ours):
        logits, loss = model(x, x.roll(1))
        found.append((logits, loss, *torch.autograd.grad(loss, list(model.parameters())), model(x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def load_module(path: Path) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accelerate_nanogpts_own_model() -> None:
    theirs_module = load_module(checkout("FASTCHARGPT_NANOGPT") / "model.py")
    check_accelerated(theirs_module.GPT(theirs_module.GPTConfig(**SHAPE)))


# --------------------------------------------------------------------------------------------------- the constructor


def test_constructor_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    config = GPTConfig(16, 29, 1, 2, 8)  # positional, and to be changed, as nanoGPT's
    config.bias = False
    model = GPT(config)
    assert capsys.readouterr().out == "number of parameters: 0.00M\n"
    assert [getattr(model.config, field.name) for field in dataclasses.fields(config)] == [16, 29, 1, 2, 8, 0.0, False]
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert capsys.readouterr().out == (
        "num decayed parameter tensors: 6, with 1,128 parameters\n"
        "num non-decayed parameter tensors: 3, with 24 parameters\n"
        "using fused AdamW: True\n"
    )
    assert GPT(fastchargpt.GPTConfig(**SHAPE)).config == GPT(GPTConfig(**SHAPE)).config
    assert dataclasses.asdict(GPTConfig()) == {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
    }
    model.crop_block_size(8)
    assert model.config.block_size == 8
    # 6 N + 12 L C T FLOPs a token, against an A100's 312e12 a second
    flops = (6 * model.get_num_params() + 12 * 8 * 8) * 8 * 3
    assert model.estimate_mfu(3, 0.5) == pytest.approx(flops / 0.5 / 312e12)


def test_a_forks_config_is_refused() -> None:
    config = GPTConfig(**SHAPE)
    config.rotary = True  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no config field 'rotary'"):
        GPT(config)
    with pytest.raises(ConfigError, match="whole number"):
        GPT(GPTConfig(**{**SHAPE, "vocab_size": None}))  # type: ignore[arg-type]


def test_generate_and_checkpoint_as_nanogpts_scripts_do(tmp_path: Path) -> None:
    args = {**SHAPE, "bias": False, "dropout": 0.0}
    model = GPT(GPTConfig(**args))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args}, tmp_path / "c.pt"
    )
    content = torch.load(tmp_path / "c.pt", map_location="cpu")  # weights_only by default
    again = GPT(GPTConfig(**content["model_args"]))
    again.load_state_dict(content["model"])
    again.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").load_state_dict(content["optimizer"])
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    torch.manual_seed(0)
    first = model.eval().generate(prompt, 5, temperature=0.8, top_k=200)
    torch.manual_seed(0)
    assert torch.equal(again.eval().generate(prompt, 5, temperature=0.8, top_k=200), first)
    assert first.shape == (2, 8)
    assert torch.equal(first[:, :3], prompt)


def test_from_pretrained_reads_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor one of gpt2"):
        GPT.from_pretrained(str(tmp_path / "gpt2-huge"))
    with pytest.raises(ConfigError, match="dropout alone"):
        GPT.from_pretrained("gpt2", {"n_layer": 3})
    ours = fastchargpt.GPT(fastchargpt.GPTConfig(**SHAPE, activation="gelu_tanh", dropout=0.3))
    from fastchargpt.checkpoint import Checkpoint
    from fastchargpt.convert.writers import write

    checkpoint = Checkpoint(model_config=ours.config, weights=ours.state_dict())
    write(checkpoint, tmp_path / "gpt", "hf", [], home=tmp_path)
    model = GPT.from_pretrained(str(tmp_path / "gpt"), {"dropout": 0.1})
    assert model.config == dataclasses.replace(ours.config, dropout=0.1, activation="gelu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ accelerate, restore


class PlainAttention(nn.Module):
    """Attention with the parts that nanoGPT's has, written from its definition; `power` makes it something else."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, mask: bool = False, power: float = 1.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.power = heads, width, dropout, power
        if mask:
            self.register_buffer("bias", torch.ones(1, 1, 64, 64).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        weights = q @ k.mT / math.sqrt(q.shape[-1]) * self.power
        weights = weights.masked_fill(~torch.ones(weights.shape[-2:]).tril().bool(), -math.inf).softmax(-1)
        y = (self.attn_dropout(weights) @ v).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y))


class Plain(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(29, 32)
        self.h = nn.ModuleList([PlainAttention(32, 2, **options) for _ in range(2)])
        self.head = nn.Linear(32, 29)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx)
        for layer in self.h:
            x = x + layer(x)
        logits = self.head(x)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def check_accelerated(model: nn.Module) -> None:
    model.double()
    x = torch.randint(29, (2, 16), generator=torch.Generator().manual_seed(2))
    expected, before = model(x, x)[0], list(model.modules())
    names, parameters, state = list(model.state_dict()), list(model.parameters()), torch.get_rng_state()
    assert accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(isinstance(module, AcceleratedAttention) for module in model.modules()) == 2
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model(x, x)[0], expected, rtol=0, atol=1e-10)
    # the same parameters under the same names: optimisers and checkpoints go on
    assert sorted(model.state_dict()) == sorted(names)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(x, x)[1].backward()
    optimizer.step()
    stepped = model(x, x)[0]
    assert not torch.equal(stepped, expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if type(model) is Plain else model):
        torch.testing.assert_close(again(x, x)[0], stepped, rtol=0, atol=0)
    accelerate(model, backend="naive")
    assert {m.backend for m in model.modules() if isinstance(m, AcceleratedAttention)} == {"naive"}
    model.eval()
    assert restore(model) is model
    assert list(model.modules()) == before
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x, x)[0], stepped, rtol=0, atol=1e-10)
    assert list(model.modules()) == list(restore(model).modules())


@pytest.mark.parametrize("mask", [False, True])
def test_accelerate_and_restore(mask: bool) -> None:
    check_accelerated(Plain(mask=mask))


def test_accelerated_dropout() -> None:
    model = accelerate(Plain(dropout=0.5))
    x = torch.zeros(1, 16, dtype=torch.int64)
    assert not torch.equal(model(x)[0], model(x)[0])
    assert [m.dropout for m in model.modules() if isinstance(m, AcceleratedAttention)] == [0.5, 0.5]
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_accelerate_leaves_our_own_model_alone() -> None:
    model = GPT(GPTConfig(**SHAPE))
    before = list(model.modules())
    assert restore(accelerate(model, backend="naive")) is model
    assert list(model.modules()) == before
    assert {block.attn.backend for block in model.transformer.h} == {"naive"}


def test_accelerate_refuses_what_it_cannot_replace() -> None:
    odd = Plain(power=1.5)
    before = list(odd.modules())
    with pytest.raises(ConfigError, match=r"h\.0 computes something else"):
        accelerate(odd)
    assert list(odd.modules()) == before
    with pytest.raises(ConfigError, match="found no attention"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="pass the model that holds this layer"):
        accelerate(PlainAttention(8, 2))
    with pytest.raises(ConfigError, match="backend must be one of"):
        accelerate(Plain(), backend="sdap")
