"""nanoGPT's model.py in one line: the losses that nanoGPT printed, and a model made, saved and sampled as its own."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nanogpt_cases import PINNED, SHAPE, toy_tokens
from torch import Tensor

import fastchargpt
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.integrations.nanogpt import GPT, GPTConfig


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
