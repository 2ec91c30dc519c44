"""Contests: nobody is timed before being checked, and the work that is counted is the work that is done."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchargpt.bench import attention, contest, generation, peers, settings, training
from fastchargpt.bench.contest import Absent, Contestant, Result, hold, peak_memory
from fastchargpt.bench.runs import load_run, rivalries
from fastchargpt.bench.settings import Settings
from fastchargpt.bench.weights import Weights, bits_per_token
from fastchargpt.cli.main import main
from fastchargpt.config import GPTConfig
from fastchargpt.errors import ConfigError
from fastchargpt.kernels import sdpa
from fastchargpt.model import GPT

CPU = torch.device("cpu")
TINY = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=False)


def entrant(check: str | None, calls: list[str], name: str = "x") -> Callable[[], Contestant]:
    return lambda: Contestant(call=lambda: calls.append(name), check=lambda: check, facts={"flops": 1})


def test_only_the_right_are_timed() -> None:
    calls: list[str] = []

    def absent() -> Contestant:
        raise Absent("no GPU")

    def broken() -> Contestant:
        raise IndexError("out of luck")

    entrants = {
        "right": entrant(None, calls),
        "wrong": entrant("off by one", calls, "wrong"),
        "gone": absent,
        "bad": broken,
    }
    results = hold(entrants, CPU, seconds=0.0, rounds=3)
    assert list(results) == list(entrants)
    assert results["right"].timing is not None
    assert len(results["right"].timing.seconds) == 3
    assert results["wrong"] == Result(wrong="off by one", facts={"flops": 1})
    assert results["gone"] == Result(absent="no GPU")
    assert results["bad"].wrong == "raises IndexError: out of luck"
    assert "wrong" not in calls


def test_memory_outside_the_allocator_counts() -> None:
    found = hold(
        {"x": lambda: Contestant(call=lambda: None, check=lambda: None, other_bytes=lambda: 7)},
        CPU,
        seconds=0,
        rounds=1,
    )
    assert found["x"].peak_bytes == 7


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first, second
        torch.empty(3500, dtype=torch.uint8)

    assert peak_memory(call, CPU) == 4000


def test_a_wrong_attention_is_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, causal, **rest: right(*args, causal=False, **rest))
    entrants = attention.entrants(attention.Shape(1, 2, 16, 8), "both", torch.float32, CPU)
    results = hold({name: entrants[name] for name in ("naive", "sdpa", "triton", "flex")}, CPU, seconds=0.0, rounds=1)
    assert results["naive"].timing is not None
    assert "errors against float64" in (results["sdpa"].wrong or "")
    assert "need a GPU" in (results["triton"].absent or "")
    assert results["flex"].absent


@pytest.mark.parametrize("what", attention.PASSES)
def test_attention_work_is_counted_right(what: Any) -> None:
    shape = attention.Shape(2, 3, 32, 8)
    results = hold({"sdpa": attention.entrants(shape, what, torch.float32, CPU)["sdpa"]}, CPU, seconds=0.0, rounds=1)
    products = {"forward": 2, "backward": 5, "both": 7}[what]
    square = 2 * 3 * 2 * 32 * 32 * 8  # of one product, unmasked
    assert results["sdpa"].facts["flops"] == products * square / 2
    tensor = 2 * 3 * 32 * 8 * 4
    assert results["sdpa"].facts["bytes"] == {"forward": 4, "backward": 7, "both": 11}[what] * tensor


def test_shapes_fill_the_device() -> None:
    for quick in (True, False):
        for device in (CPU, torch.device("cuda")):
            for shape in attention.shapes(device, quick=quick):
                assert shape.heads * shape.head_dim == 384
    longest = max(shape.time for shape in attention.shapes(torch.device("cuda"), quick=False))
    assert longest == 8192


@pytest.fixture
def tiny_training(monkeypatch: pytest.MonkeyPatch) -> training.Work:
    monkeypatch.setattr(training, "measure_roof", lambda *_: type("Roof", (), {"flops": 1e11}))
    return training.Work("tiny", 2, TINY)


def test_training_is_checked_against_float64(tiny_training: training.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    entrants = training.entrants(tiny_training, Settings(device=CPU, quick=True))
    results = hold(entrants, CPU, seconds=0.0, rounds=1)
    for name in ("nanogpt-fp32-eager", "lecture-fp32-eager", "modern-fp32-eager"):
        assert results[name].wrong is None, results[name].wrong
        assert results[name].facts["tokens"] == 16
    assert "--peer nanogpt=PATH" in (results["peer-nanogpt"].absent or "")
    assert "multiples of 16" in (results["nanogpt-fp32-native"].absent or "")
    monkeypatch.setattr(training, "LEARNING_RATE", 1.1e-3)  # ours from now on, beside an oracle that is already known
    truth = training._oracle(tiny_training, _batches(), "nanogpt")
    monkeypatch.setattr(training, "LEARNING_RATE", 1e-3)
    ours, *_ = training._ours("nanogpt-fp32-eager", tiny_training, CPU)
    losses = [float(ours(*batch)) for batch in (_batches() * 2)[: len(truth)]]
    assert "off the oracle's" in (training._judge(losses, truth, 1e-4) or "")
    assert training._judge([float("nan")] * 5, truth, 1e-4)


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(11, (4, 2, 9), generator=torch.Generator().manual_seed(1))
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def test_generation_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    lent = Weights(model, "drawn", torch.randint(11, (99,)))
    settings = Settings(device=CPU, quick=True)

    def results(batch: int) -> dict[str, Result]:
        errand = generation.Errand("tiny", batch, 24, lambda: lent)
        return hold(generation.entrants(errand, settings), CPU, seconds=0.0, rounds=1)

    for batch in (1, 3):
        found = results(batch)
        assert not any(each.wrong for each in found.values()), found
        for name in ("fastchargpt", "fastchargpt-plain", "fastchargpt-int8", "fastchargpt-torch", "uncached"):
            assert found[name].timing is not None, name
        assert (found["fastchargpt-drafts"].timing is None) == (batch > 1)
        assert abs(found["fastchargpt-int8"].facts["bits_above_fp32"]) < 0.01

    def wrong(self: GPT, idx: torch.Tensor, n: int, **knobs: float) -> torch.Tensor:
        right = generate(self, idx, n, **knobs)
        right[:, -1] = (right[:, -1] + 1) % 11
        return right

    generate = GPT.generate
    monkeypatch.setattr(generation.GPT, "generate", wrong)
    assert "token 23 is not the one that float64" in (results(2)["fastchargpt"].wrong or "")


def test_bits_per_token_are_the_models_own() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
    text = torch.randint(11, (16 * 3 + 5,))
    windows = text[:48].view(3, 16), text[1:49].view(3, 16)
    with torch.no_grad():
        expected = float(model(*windows)[1]) / math.log(2)
    weights = Weights(model, "drawn", text)
    assert bits_per_token(weights, int8=False) == pytest.approx(expected, abs=1e-5)
    assert 0 < abs(bits_per_token(weights, int8=True) - expected) < 0.01


GPT_PY = """
import torch
import torch.nn as nn
print("training begins")  # what an import must not run
raise SystemExit
n_embd = 10**9
class GPTLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(vocab_size, n_embd, device=device)
"""


def test_the_lecture_is_loaded_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpt.py").write_text(GPT_PY, encoding="utf-8")
    model = peers.lecture_model(tmp_path, TINY, "cpu")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {"table.weight": (11, 16)}
    assert capsys.readouterr().out == ""
    assert (tmp_path / "gpt.py").read_text(encoding="utf-8") == GPT_PY
    (tmp_path / "gpt.py").write_text("x = 1", encoding="utf-8")
    with pytest.raises(Absent, match="GPTLanguageModel"):
        peers.lecture_model(tmp_path, TINY, "cpu")


def test_a_peer_that_does_not_load_is_absent(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import no_such_module", encoding="utf-8")
    with pytest.raises(Absent, match="no_such_module"):
        peers.nanogpt_model(tmp_path, TINY)
    assert settings.parse_peers([f"nanogpt={tmp_path}"]) == {"nanogpt": tmp_path}


def test_the_time_for_a_contest() -> None:
    assert [Settings(device=CPU, quick=quick).seconds for quick in (False, True)] == [3.0, 0.5]
    chosen = settings.settings_from(device="cpu", quick=True, peers=[], seconds=0.25)
    assert chosen.seconds == 0.25
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="--seconds is the time for one contest"):
            settings.settings_from(device="cpu", quick=True, peers=[], seconds=wrong)


def test_a_run_is_described_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "measure_roof", lambda *_: contest.Result())
    facts = settings.describe_run(Settings(device=CPU, quick=True))
    assert {"device", "threads", "torch", "python", "commit", "quick", "roof"} <= facts.keys()
    text = json.dumps(facts, default=str)
    assert os.uname().nodename not in text.replace(facts["cpu"], "") or len(os.uname().nodename) < 4
    assert str(Path.home()) + "/" not in text


def test_the_suite_writes_what_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing under xdist
    words = ["bench", "batches", "--quick", "--device=cpu", f"--out={out}"]
    assert main([*words, "--seconds=0.2", "--only=random or epochs or slice"]) == 0
    assert f"saved {out}" in capfd.readouterr().out
    run = load_run(out)
    assert {row.contestant for row in run.rows} == {"random", "epochs", "slice-and-stack"}
    assert all(row.p20 <= row.median <= row.p80 and row.facts["tokens_per_s"] > 0 for row in run.rows)
    assert len(list(rivalries(run))) == 2
    content = json.loads(out.read_text(encoding="utf-8"))
    assert list(content["machine_info"]) == ["fastchargpt"]
    assert out.stat().st_size < 50_000
    for row, saved in zip(run.rows, content["benchmarks"], strict=True):
        assert saved["stats"]["median"] == pytest.approx(row.median)  # the replay told pytest-benchmark the same
