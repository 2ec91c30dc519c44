"""compile=auto: decided from figures, put to the test, and remembered. Times are given, not taken."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, MODEL, corpus

from fastchargpt import compiling
from fastchargpt.compiling import TIMED_STEPS, AutoCompile, CompileCost, CostFile, cost_key
from fastchargpt.trainer import Trainer

KNOWN = CompileCost(seconds=30.0, share=0.8, source="as known")


class FakeStep:
    """A step that counts, and pretends to have been compiled in `takes` seconds."""

    def __init__(self, takes: float = 25.0) -> None:
        self.device, self.iteration, self.compiled = torch.device("cpu"), 0, False
        self.compile_seconds: float | None = None
        self.settled = True
        self._takes = takes

    def compile(self, on: bool = True) -> None:
        self.compiled, self.compile_seconds = on, self._takes


def begin(tmp_path: Path, last: int, **step: Any) -> SimpleNamespace:
    lines: list[str] = []
    fake = FakeStep(**step)
    auto = AutoCompile(fake, last=last, log=lines.append, costs=CostFile(tmp_path / "compile.json"), key="k")  # type: ignore[arg-type]

    def window(steps: int, seconds: float) -> None:
        fake.iteration += steps
        auto.note(steps, seconds)

    return SimpleNamespace(step=fake, auto=auto, lines=lines, window=window)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "ELSEWHERE", {"cpu": KNOWN})


# 50 ms a step, a fifth of it saved: 30 s are earned back by 3000 steps, after the 11 that are taken first
@pytest.mark.parametrize(("last", "on"), [(3011, False), (3012, True), (12, False), (10**9, True)])
def test_the_threshold_is_what_the_figures_say(tmp_path: Path, last: int, on: bool) -> None:
    run = begin(tmp_path, last)
    run.window(1, 9.0)  # the first step's time is not a step's time
    assert not run.lines
    run.window(10, 0.05)
    assert run.step.compiled == on
    assert run.auto.decided == (not on)
    [line] = run.lines
    assert line.startswith("compile on from step 11: it saves " if on else "compile off: it would save ")
    assert f"{last - 11:,} steps of 50 ms are left, compiling takes 30 s and a step then 0.80 of its time" in line
    assert "(as known)" in line


def test_some_steps_are_timed_before_anything_is_concluded(tmp_path: Path) -> None:
    run = begin(tmp_path, 10**6)
    run.window(1, 9.0)
    for seconds in (0.05, 0.05, 5.0, 0.05):  # one of them was held up
        run.window(1, seconds)
        assert not run.lines
    run.window(1, 0.05)
    assert TIMED_STEPS == 5
    assert "steps of 50 ms are left" in run.lines[0]


def test_steps_are_not_timed_while_a_graph_is_made(tmp_path: Path) -> None:
    """On a GPU the first steps warm up and capture: twice a step's time, as an H200 had it."""
    run = begin(tmp_path, 10**6)
    run.step.settled = False
    run.window(1, 9.0)
    run.window(2, 0.1)  # still at it
    run.step.settled = True
    run.window(10, 0.08)  # finished within these
    assert not run.lines
    run.window(10, 0.05)
    assert "steps of 50 ms are left" in run.lines[0]


@pytest.mark.parametrize(("compiled", "stays"), [(0.03, True), (0.05, False), (0.07, False)])
def test_what_was_gained_is_measured_remembered_and_taken_back(tmp_path: Path, compiled: float, stays: bool) -> None:
    run = begin(tmp_path, 10**5)
    run.window(1, 9.0)
    run.window(10, 0.05)
    run.window(10, 2.5)  # with the compilation in it
    assert not run.auto.decided
    run.window(10, compiled)
    assert run.auto.decided
    assert run.step.compiled == stays
    start = "compiled in 25 s: " if stays else "compile off again from step 31: "
    assert run.lines[1] == f"{start}a step takes {compiled * 1e3:.3g} ms compiled and 50 ms as it is"
    assert json.loads((tmp_path / "compile.json").read_text()) == {"k": [25.0, pytest.approx(compiled / 0.05)]}
    run.window(10, 99.0)  # and that was the last word
    assert len(run.lines) == 2
    # the next run knows
    for last, on in ((1000, False), (10**5, stays)):
        again = begin(tmp_path, last)
        again.window(1, 9.0)
        again.window(10, 0.05)
        assert again.step.compiled == on
        assert "compiling takes 25 s" in again.lines[0]
        assert "as measured in an earlier run here" in again.lines[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"k": 3}',
        '{"k": [1.0]}',
        '{"k": ["a", "b"]}',
        '{"k": [NaN, 0.5]}',
        '{"k": [1.0, -1.0]}',
        "[" * 9999,
    ],
    ids=range(9),
)
def test_a_damaged_file_of_costs_is_not_believed(tmp_path: Path, text: str) -> None:
    file = CostFile(tmp_path / "compile.json")
    (tmp_path / "compile.json").write_text(text)
    assert file.find("k") is None
    file.keep("k", KNOWN)
    found = file.find("k")
    assert found is not None
    assert (found.seconds, found.share) == (30.0, 0.8)


def test_the_file_of_costs_stays_small_and_may_be_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "KEPT", 3)
    file = CostFile(tmp_path / "folder" / "compile.json")
    for name in "abcdb":
        file.keep(name, KNOWN)
    assert list(json.loads((tmp_path / "folder" / "compile.json").read_text())) == ["c", "d", "b"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["compile.json"]
    (tmp_path / "a file").write_text("")
    CostFile(tmp_path / "a file" / "compile.json").keep("k", KNOWN)
    assert CostFile(tmp_path / "a file" / "compile.json").find("k") is None


def test_a_cost_belongs_to_one_kind_of_step() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    keys = [cost_key(MODEL, cpu, 4, "fp32"), cost_key(MODEL, cpu, 8, "fp32"), cost_key(MODEL, cpu, 4, "bf16")]
    keys.append(cost_key(dataclasses.replace(MODEL, n_layer=2), cpu, 4, "fp32"))
    try:
        torch.set_num_threads(threads + 1)
        keys.append(cost_key(MODEL, cpu, 4, "fp32"))
    finally:
        torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)
    assert cost_key(MODEL, cpu, 4, "fp32") == keys[0]


def test_a_whole_run_compiles_resumes_compiled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def compile(function: Any) -> Any:  # in place of half a minute of torch.compile
        def compiled(*arguments: Any) -> Any:
            used.append(1)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("fastchargpt.trainer.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(compiling, "ELSEWHERE", {"cpu": dataclasses.replace(KNOWN, seconds=1e-9)})
    monkeypatch.setattr(AutoCompile, "_judge", lambda *_: None)  # times of a real clock decide nothing here
    plain = Trainer(MODEL, dataclasses.replace(CONFIG, compile="off"), corpus(), log=lambda line: None).run()
    for life, steps in enumerate((12, 20)):
        lines: list[str] = []
        config = dataclasses.replace(CONFIG, engine="torch", max_iters=steps, lr_decay_iters=20)
        trainer = Trainer(MODEL, config, corpus(), out_dir=tmp_path / "out", log=lines.append)
        assert any(line.startswith("compile auto: decided once") for line in trainer.describe())
        used.clear()
        if life:
            assert trainer.resume() == 12
            assert trainer.step.compiled
        result = trainer.run()
        assert trainer.step.compiled
        assert any(line.startswith("compile on from step 6: it saves") for line in lines) == (life == 0)
        assert len(used) == (20 - 12 if life else 12 - 6)
    assert trainer.step.compile_seconds is not None
    assert result.val_loss == plain.val_loss


def test_a_short_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("fastchargpt.trainer.cache_dir", lambda: tmp_path)
    lines: list[str] = []
    trainer = Trainer(MODEL, dataclasses.replace(CONFIG, engine="torch"), corpus(), log=lines.append)
    trainer.run()
    assert not trainer.step.compiled
    assert [line[:12] for line in lines if line.startswith("compile")] == ["compile off:"]
