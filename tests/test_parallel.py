"""Runs shared by two processes: the numbers of one process, one writer, checkpoints that move between all of them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import MODEL, MODERN, Rows, live
from ranks import run_ranks
from test_trainer import CONFIG, corpus

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.errors import FastchargptError
from fastchargpt.trainer import Trainer

# figures of float32 sums taken in another order, after 20 steps of an optimiser that divides by small moments
TOLERANCE = 2e-5
# the native Muon works on Gram matrices, which square what rounding does to small singular values
NATIVE_MUON_TOLERANCE = 1e-3


def assert_rows_equal(found: Rows, expected: Rows, tolerance: float = TOLERANCE) -> None:
    assert [(step, row.keys()) for step, row in found] == [(step, row.keys()) for step, row in expected]
    for (step, row), (_, other) in zip(found, expected, strict=True):
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=tolerance), (step, name)


RUNS = {
    "ddp": (MODEL, dict(parallel="ddp", engine="torch")),
    "ddp-accumulated-epochs": (
        MODEL,
        dict(parallel="auto", engine="torch", order="epochs", gradient_accumulation_steps=4),
    ),
    "ddp-native": (MODEL, dict(parallel="ddp", engine="native", gradient_accumulation_steps=3)),
    "ddp-native-muon": (MODERN, dict(parallel="ddp", engine="native", optimizer="muon", order="epochs")),
    "ddp-muon": (MODERN, dict(parallel="ddp", engine="torch", optimizer="muon", weight_decay=0.2)),
    "fsdp-accumulated": (MODEL, dict(parallel="fsdp", engine="torch", gradient_accumulation_steps=4, grad_clip=0.3)),
    "fsdp-checkpointed-epochs": (
        MODEL,
        dict(parallel="fsdp", engine="torch", order="epochs", checkpoint_activations=True),
    ),
    "fsdp-muon": (
        MODERN,
        dict(parallel="fsdp", engine="torch", optimizer="muon", weight_decay=0.2, gradient_accumulation_steps=2),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    model, fields = RUNS[name]
    main, other = run_ranks(tmp_path / "ranks", live, model, fields, tmp_path / "two")
    one = live(model, {**fields, "parallel": "none"}, tmp_path / "one")
    tolerance = NATIVE_MUON_TOLERANCE if name == "ddp-native-muon" else TOLERANCE
    assert_rows_equal(main.rows, one.rows, tolerance)
    assert len(main.rows) == 20 + 5
    assert any(f"parallel {'fsdp' if 'fsdp' in name else 'ddp'}: 2 processes by gloo" in line for line in main.lines)
    assert any(f"engine {'native' if 'native' in name else 'torch'}" in line for line in main.lines)
    # the other process finds the same, and neither logs nor writes it
    assert (other.rows, other.val_loss, other.iteration) == ([], main.val_loss, 20)
    assert not [line for line in other.lines if line.startswith(("iter", "step 0"))]
    two_files, one_files = (
        {str(p.relative_to(d)) for d in [tmp_path / n] for p in d.rglob("*")} for n in ("two", "one")
    )
    assert two_files == one_files
    two, alone = (load_checkpoint(tmp_path / folder / "last", with_trainer=True) for folder in ("two", "one"))
    assert two.weights.keys() == alone.weights.keys()
    for key, weight in two.weights.items():
        torch.testing.assert_close(weight, alone.weights[key], rtol=50 * tolerance, atol=5 * tolerance)
    assert two.trainer_state is not None
    assert alone.trainer_state is not None
    moments, expected = (state["step"]["optimizer"]["state"] for state in (two.trainer_state, alone.trainer_state))
    assert moments.keys() == expected.keys()
    for key, kept in moments.items():
        for moment, value in kept.items():
            # as a whole: single entries near zero are all rounding
            error = (value - expected[key][moment]).norm()
            assert error <= 2 * tolerance * expected[key][moment].norm(), (key, moment)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_move(optimizer: str, tmp_path: Path) -> None:
    # one run, in lives of one process and two, by turns whole and in pieces; each stopped by a signal to one of them
    model = MODERN if optimizer == "muon" else MODEL
    fields = dict(optimizer=optimizer, gradient_accumulation_steps=2, order="epochs", engine="torch", ema_decay=0.8)
    expected = live(model, {**fields, "parallel": "none"})
    lives = [("none", 4), ("ddp", 7), ("fsdp", 9), ("ddp", 12), ("none", 14), ("fsdp", 17), ("none", None)]
    if optimizer == "muon":
        lives = [("none", 4), ("fsdp", 9), ("ddp", 14), ("none", None)]
    rows: Rows = []
    for number, (mode, stop_at) in enumerate(lives):
        arguments = (model, {**fields, "parallel": mode}, tmp_path / "out", stop_at, number % 2)
        told = live(*arguments[:4]) if mode == "none" else run_ranks(tmp_path / "ranks", live, *arguments)[0]
        assert told.iteration == (stop_at or 20)
        assert told.stopped == ("finished" if stop_at is None else "SIGTERM")
        rows += told.rows
    assert_rows_equal(rows, expected.rows)


def test_an_evaluation_leaves_no_weights_behind(tmp_path: Path) -> None:
    # averaged weights are evaluated, and the next step is taken on the run's own; no save comes between that would cut
    # the weights into pieces again
    fields = dict(engine="torch", ema_decay=0.8)
    main, _ = run_ranks(tmp_path, live, MODEL, {**fields, "parallel": "fsdp"})
    assert_rows_equal(main.rows, live(MODEL, fields).rows)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_resumed_pair_is_bit_equal(mode: str, tmp_path: Path) -> None:
    # dropout included: the generators of both processes are kept
    model = dataclasses.replace(MODEL, dropout=0.2)
    whole, _ = run_ranks(tmp_path / "ranks", live, model, {"parallel": mode})
    first, _ = run_ranks(tmp_path / "ranks", live, model, {"parallel": mode}, tmp_path / "out", 7, 1)
    second, _ = run_ranks(tmp_path / "ranks", live, model, {"parallel": mode}, tmp_path / "out")
    assert first.iteration == 7
    assert first.rows + second.rows == whole.rows


def count_exchanges(fields: dict[str, Any]) -> int:
    """Steps of a model, and how often gradients were sent for them."""
    import torch.distributed as dist

    sent = 0
    trainer = Trainer(MODEL, dataclasses.replace(CONFIG, batch_size=6, **fields), corpus(), log=lambda line: None)
    with trainer.parallel as parallel:
        if parallel.mode == "fsdp":
            name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
            plain = getattr(dist, name)

            def reduce(*arguments: Any, **named: Any) -> Any:
                nonlocal sent
                sent += 1
                return plain(*arguments, **named)

            setattr(dist, name, reduce)
        elif trainer.step.native is not None:
            average = parallel.average

            def count(gradients: Any) -> None:
                nonlocal sent
                sent += 1
                average(gradients)

            parallel.average = count  # type: ignore[method-assign]
        else:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
                nonlocal sent
                sent += 1
                return allreduce_hook(state, bucket)

            trainer.step._module.register_comm_hook(None, hook)  # type: ignore[operator]
        for _ in range(3):
            trainer.step(*trainer.batches.next_batch())
    return sent


@pytest.mark.parametrize(
    ("fields", "a_step"),
    [
        (dict(parallel="ddp", engine="torch"), 1),
        (dict(parallel="ddp", engine="native"), 1),
        (dict(parallel="fsdp"), 3),  # two blocks and the rest
    ],
)
def test_gradients_are_sent_once_a_step(fields: dict[str, Any], a_step: int, tmp_path: Path) -> None:
    for parts in (1, 8):
        sent = run_ranks(tmp_path, count_exchanges, {**fields, "gradient_accumulation_steps": parts})
        assert sent == [3 * a_step] * 2


def faulty(kind: str, out_dir: Path) -> str:
    """A run that goes wrong on one process; the sentence that this one gets."""
    config = dataclasses.replace(CONFIG, batch_size=6, engine="torch", parallel="fsdp" if kind == "nan" else "ddp")
    trainer = Trainer(MODEL, config, corpus(), out_dir=out_dir, log=lambda line: None)
    plain, rank = trainer.batches.next_batch, trainer.parallel.rank
    if kind == "disk" and rank == 0:
        out_dir.write_text("a file where a folder should be")

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.step.iteration == 7 and rank == 1:
            if kind == "gone":
                os._exit(1)
            with torch.no_grad():  # one number on one process, in the piece that is its own
                next(trainer.model.parameters()).to_local()[0, 0] = float("nan")  # type: ignore[operator]
        return plain()

    if kind in ("gone", "nan"):
        trainer.batches.next_batch = next_batch  # type: ignore[method-assign]
    try:
        trainer.run()
    except FastchargptError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing went wrong"


def test_faults_reach_every_process(tmp_path: Path) -> None:
    ends = run_ranks(tmp_path / "ranks", faulty, "nan", tmp_path / "nan")
    assert ends[0] == ends[1]
    assert ends[0].startswith("TrainingError: the loss is nan at step 7 ")
    assert f"the last good checkpoint is {tmp_path / 'nan' / 'last'}, of step 5" in ends[0]
    ends = run_ranks(tmp_path / "ranks", faulty, "disk", tmp_path / "disk")
    assert ends[0] == ends[1]
    assert ends[0].startswith("OutDirError: the checkpoint")
    ends = run_ranks(tmp_path / "ranks", faulty, "gone", tmp_path / "gone")
    assert ends[1] is None
    assert ends[0].startswith("TrainingError: another process of this run ended at step 7, ")


def weigh(folder: Path) -> list[int]:
    """The steps at which this process begins or ends compiling, where process 0 alone thinks much of it."""
    from fastchargpt import compiling
    from fastchargpt.step import TrainStep

    os.environ["XDG_CACHE_HOME"] = str(folder)
    gain = 0.0 if os.environ["RANK"] == "0" else 1e9
    compiling.ELSEWHERE["cpu"] = compiling.CompileCost(seconds=gain, share=0.01, source="test")
    changes: list[int] = []

    def compile(step: TrainStep, on: bool = True) -> None:
        if on or step.iteration:  # each step begins without
            changes.append(step.iteration)
        step._is_compiled = on

    TrainStep.compile = compile  # type: ignore[method-assign]
    config = dataclasses.replace(CONFIG, batch_size=6, engine="torch", eval_interval=100, max_iters=9, log_interval=2)
    trainer = Trainer(MODEL, config, corpus(), log=lambda line: None)
    with trainer.parallel:
        trainer.run()
    return changes


def test_the_first_process_decides_on_compiling(tmp_path: Path) -> None:
    main, other = run_ranks(tmp_path, weigh, tmp_path / "cache")
    assert len(main) == 1
    assert other == main


@pytest.mark.skipif("FASTCHARGPT_SOAK_COMPILE" not in os.environ, reason="set FASTCHARGPT_SOAK_COMPILE: takes a minute")
def test_a_compiled_pair_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    fields = dict(engine="torch", gradient_accumulation_steps=4, batch_size=8)
    main, _ = run_ranks(tmp_path, live, MODEL, {**fields, "compile": "on"})
    assert any(line.startswith("compile on") for line in main.lines)
    assert_rows_equal(main.rows, live(MODEL, fields).rows)
