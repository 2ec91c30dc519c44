"""nanoGPT's own scripts, unmodified, from a checkout: what they print and save with our model.py and with theirs."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nanogpt_cases import PINNED, SHAPE, TRAIN, load_module, toy_tokens
from peers import checkout

from fastchargpt.integrations.nanogpt import GPT

ONE_LINE = "from fastchargpt.integrations.nanogpt import GPT, GPTConfig\n"


def toy_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokens = toy_tokens()
    tokens[:5000].tofile(folder / "train.bin")
    tokens[5000:].tofile(folder / "val.bin")
    letters = [chr(97 + i) for i in range(26)] + ["\n", " ", "."]
    meta = {"vocab_size": 29, "itos": dict(enumerate(letters)), "stoi": {c: i for i, c in enumerate(letters)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


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
