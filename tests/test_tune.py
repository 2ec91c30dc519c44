"""Tuning without a GPU: a device whose times are made up, and the strict interpreter behind the real rig."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from strict_interpreter import strict_interpreter

from fastchargpt.attention import explain_attention
from fastchargpt.bench import tune_command
from fastchargpt.bench.tune import BrokenDevice, Session, measure, summary, tune
from fastchargpt.bench.tune_command import run_tune
from fastchargpt.bench.tune_compile import compile_ahead, jobs
from fastchargpt.bench.tune_space import Place, places
from fastchargpt.cli.main import main
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels import tables, tuning
from fastchargpt.kernels.launch import Problem, problem_of
from fastchargpt.kernels.tuning import Config, Plan, plan_for

ARCH = "sm_80"  # the interpreter's


class Pretend:
    """A device on which `fast` settings take 1 us, the shipped ones 4, others 2 to 3; some do not compile."""

    def __init__(self, fast: set[Config], broken: set[Config] = frozenset(), stop_after: int = 10**6) -> None:
        self.fast, self.broken, self.left = fast, broken, stop_after
        self.checked: list[tuple[str, Plan]] = []
        self.races: list[tuple[Place, str, list[Plan]]] = []

    def problem(self, place: Place, plan: Plan, what: str) -> str | None:
        self.checked.append((what, plan))
        if any(config in self.broken for config in configs(plan, what)):
            return "needs 999999 of shared memory, and this GPU has 166912 for a program"
        return None

    def race(self, place: Place, plans: Mapping[str, Plan], what: str) -> Mapping[str, float]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        assert all((what, plan) in self.checked for plan in plans.values()), "timed before it was checked"
        self.races.append((place, what, list(plans.values())))
        return {name: self.seconds(place, plan, what) for name, plan in plans.items()}

    def seconds(self, place: Place, plan: Plan, what: str) -> float:
        shipped = plan_for(ARCH, place.dtype, place.head_dim, place.length, place.dropout)
        pair = plan_for(ARCH, place.dtype, place.head_dim, 2**30, place.dropout)
        known = {*configs(shipped, what), *configs(pair, what)}
        cost = [1.0 if c in self.fast else 4.0 if c in known else 3.0 for c in configs(plan, what)]
        return 1e-6 * sum(cost) / len(cost)


def configs(plan: Plan, what: str) -> tuple[Config, ...]:
    return plan.backward if what == "backward" else (plan.forward if what == "forward" else plan.decode,)  # type: ignore[return-value]


FAST = {
    Config("forward", 128, 64, 8, 3),
    Config("dq", 128, 64, 8, 2),
    Config("dkdv", 64, 128, 8, 2),
    Config("decode", 16, 128, 4, 2),
}
PLACES = list(places(["half"], [64], buckets=(128, None), dropout=(False,)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernels look for measured tables."""
    monkeypatch.setenv(tables.USER_FOLDER, str(tmp_path))
    tuning.forget()
    yield tmp_path  # type: ignore[misc]
    monkeypatch.undo()
    tuning.forget()


def problem(dtype: torch.dtype, head_dim: int, length: int, dropout_p: float = 0.0) -> Problem:
    q = torch.empty(1, 1, length, head_dim, dtype=dtype)
    return problem_of(q, q, scale=1.0, causal=True, dropout_p=dropout_p)


def tuned(path: Path, rig: Pretend, **options: object) -> int:
    return run_tune(
        "cpu", dtypes=["half"], head_dims=[64], buckets=(128, None), dropout=(False,), out=path, rig=rig, **options
    )  # type: ignore[arg-type]


def test_the_fastest_make_a_table_that_the_kernels_then_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / f"{ARCH}.json"
    before = plan_for(ARCH, "half", 64, 128, False)
    assert tuned(path, Pretend(FAST)) == 0
    for length in (100, 128, 129, 5000):
        plan = tuning.plan(problem(torch.bfloat16, 64, length))
        assert {plan.forward, *plan.backward, plan.decode} == FAST
    # dropout, another dtype and wider heads were not measured: the shipped table serves
    assert tuning.plan(problem(torch.bfloat16, 64, 128, dropout_p=0.1)) == plan_for(ARCH, "half", 64, 128, True)
    assert tuning.plan(problem(torch.bfloat16, 65, 128)) == plan_for(ARCH, "half", 128, 128, False, plain=False)
    assert tuning.plan(problem(torch.float32, 64, 128)) == plan_for(ARCH, "fp32", 64, 128, False)
    assert plan_for(ARCH, "half", 64, 128, False) == before
    assert json.loads(path.read_text())["arch"] == ARCH
    told = capsys.readouterr().out
    assert "[1/2] half D64, T up to 128: forward forward 128x64 w8 s3, 1.0 us; shipped forward 64x64 w4 s2" in told
    assert "4.00x" in told
    assert f"wrote {path}" in told


def test_explain_names_the_table(folder: Path) -> None:
    q = torch.zeros(1, 1, 70, 64, dtype=torch.bfloat16)
    with strict_interpreter():
        assert "settings as shipped" in explain_attention(q, q, q, backend="triton")
        tuned(folder / f"{ARCH}.json", Pretend(FAST))
        said = explain_attention(q, q, q, backend="triton")
    assert "forward tiled 128x64; backward dq 128x64 and dkdv 64x128, 2 launch" in said
    assert f"settings measured on this machine, from {folder / f'{ARCH}.json'}" in said


def test_one_launch_is_kept_where_it_is_faster(folder: Path) -> None:
    blocks = Config("blocks", 32, 32, 4, 1)
    tuned(folder / f"{ARCH}.json", Pretend({blocks, Config("dq", 128, 64, 8, 2)}))
    plan = tuning.plan(problem(torch.float16, 64, 128))
    assert plan.backward == (blocks,)
    longer = tuning.plan(problem(torch.float16, 64, 129))
    assert [config.kernel for config in longer.backward] == ["dq", "dkdv"]  # although the shipped table has blocks here


def test_the_shipped_settings_stay_unless_beaten_by_more_than_noise() -> None:
    class Even(Pretend):
        def seconds(self, place: Place, plan: Plan, what: str) -> float:
            return super().seconds(place, plan, what) * 0 + (0.995 if self.fast & set(configs(plan, what)) else 1.0)

    found, _ = measure(Even(FAST), PLACES[0], ARCH)
    assert [measured.configs for measured in found] == [measured.shipped for measured in found]


def test_everything_in_a_race_is_checked_and_the_shipped_settings_take_part() -> None:
    rig = Pretend(FAST)
    measure(rig, PLACES[1], ARCH)
    shipped = plan_for(ARCH, "half", 64, 2048, False)
    for _, what, plans in rig.races:
        assert len(plans) >= 2
        if what == "forward":
            assert shipped in plans
    assert shipped.backward in [plan.backward for plan in rig.races[-2][2]]
    assert {what for _, what, _ in rig.races} == {"forward", "backward", "decode"}


def test_the_order_of_heads_is_measured_too(folder: Path) -> None:
    class InTurn(Pretend):
        """Where a forward with heads in turn takes half of the time, and a backward 0.995 of it."""

        def seconds(self, place: Place, plan: Plan, what: str) -> float:
            chosen = configs(plan, what)
            plain = dataclasses.replace(
                plan,
                forward=dataclasses.replace(plan.forward, in_turn=False),
                backward=tuple(dataclasses.replace(config, in_turn=False) for config in plan.backward),
            )
            gain = 0.5 if what == "forward" else 0.995
            return super().seconds(place, plain, what) * (gain if any(config.in_turn for config in chosen) else 1.0)

    tuned(folder / f"{ARCH}.json", InTurn(FAST))
    assert tuning.plan(problem(torch.bfloat16, 64, 128)).forward == Config("forward", 128, 64, 8, 3)  # one block a head
    plan = tuning.plan(problem(torch.bfloat16, 64, 129))
    assert plan.forward == Config("forward", 128, 64, 8, 3, in_turn=True)
    assert plan.backward == (Config("dq", 128, 64, 8, 2), Config("dkdv", 64, 128, 8, 2))  # by no more than noise


def test_what_cannot_run_is_skipped_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = Config("dq", 128, 64, 8, 2)
    rig = Pretend(FAST, broken={broken})
    tuned(tmp_path / "t.json", rig)
    told = capsys.readouterr().out
    assert told.count(f"skipped {broken}") == 1  # said once, not at every length
    assert "needs 999999 of shared memory" in told
    assert not any(broken in plan.backward for _, _, plans in rig.races for plan in plans)


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    assert tuned(path, Pretend(FAST, stop_after=7)) == 130  # in the middle of the second place
    assert "stopped: 1 of 2 places are kept" in capsys.readouterr().out
    assert {entry.max_length for entry in tables.read_table(path, ARCH)} == {128}
    rig = Pretend(FAST)
    assert tuned(path, rig) == 0
    assert {place.max_length for place, _, _ in rig.races} == {None}
    assert "1 of 2 places are measured already" in capsys.readouterr().out
    assert {entry.max_length for entry in tables.read_table(path, ARCH)} == {128, None}
    rig = Pretend(FAST)
    tuned(path, rig, again=True)
    assert {place.max_length for place, _, _ in rig.races} == {128, None}


def test_a_table_of_another_triton_is_measured_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    tuned(path, Pretend(FAST))
    monkeypatch.setattr(tune_command, "triton_version", lambda: "9.9")
    rig = Pretend(FAST)
    tuned(path, rig)
    assert len({place for place, _, _ in rig.races}) == 2
    assert "measured with another triton" in capsys.readouterr().out


def test_a_candidate_that_takes_the_device_down_is_never_tried_again(tmp_path: Path) -> None:
    culprit = Config("dkdv", 64, 128, 8, 2)

    class Fragile(Pretend):
        def problem(self, place: Place, plan: Plan, what: str) -> str | None:
            if what == "backward" and culprit in plan.backward:
                raise BrokenDevice("the GPU computes no more")
            return super().problem(place, plan, what)

    session, told = Session(tmp_path / "t.json", ARCH, {}), []
    assert not tune(session, PLACES, Fragile(FAST), told.append)
    assert "the same command goes on without it" in told[-1]
    session = Session(tmp_path / "t.json", ARCH, {})
    assert len(session.broken) == 1  # the other half of the pair had run before
    assert tune(session, PLACES, Fragile(FAST), told.append)
    assert culprit not in {c for measured in session.measured.values() for c in measured.configs}
    assert "| half D64, any T | forward | forward 128x64 w8 s3 | 1.0 | forward 64x64 w4 s2 | 4.0 | 4.00x |" in summary(
        session
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "cannot be read"),
        ('{"arch": "sm_90", "entries": []}', "it is for sm_90, not for sm_80"),
        ('{"arch": "sm_80", "entries": [{"kernel": "forward"}]}', "KeyError"),
        (("block_m", 48), "block_m must be a power of two"),
        (("num_warps", 0), "num_warps must be a power of two"),
        (("block_n", "64"), "whole numbers"),
        (
            ("max_length", 1000),
            "a tile's max_length",
        ),  # a tile that does not hold its sequence would be wrong, not slow
        (("kernel", "fast"), "kernel must be one of"),
        (("max_registers", 512), "max_registers must be a whole number from 24 to 255; it is 512"),
        (("dtype", "fp8"), "dtype must be half or fp32"),
    ],
    ids=str,
)
def test_a_damaged_table_is_refused_in_a_sentence_once_and_the_shipped_one_serves(
    folder: Path, content: str | tuple[str, object], words: str
) -> None:
    path = folder / f"{ARCH}.json"
    if isinstance(content, tuple):
        entry = {"kernel": "tile", "dtype": "half", "head_dim": 64, "max_length": 64, "dropout": True, "block_m": 64}
        entry |= {"block_n": 64, "num_warps": 4, "num_stages": 1, content[0]: content[1]}
        content = json.dumps({"arch": ARCH, "entries": [entry]})
    path.write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = tuning.plan(problem(torch.bfloat16, 64, 64))
        tuning.plan(problem(torch.bfloat16, 64, 65))
        assert tuning.widest_head("cpu", 0, torch.bfloat16, False) >= 128
    (said,) = [str(warning.message) for warning in caught]
    assert words in said
    assert str(path) in said
    assert "the shipped one serves" in said
    assert plan == plan_for(ARCH, "half", 64, 64, False)


def test_a_damaged_table_is_not_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigError, match=r"t\.json cannot be read"):
        tuned(tmp_path / "t.json", Pretend(FAST))
    tables.save_table(tmp_path / "t.json", ARCH, [], facts={})
    with pytest.raises(ConfigError, match=r"no table that a measurement can go on from.*--again"):
        Session(tmp_path / "t.json", ARCH, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*--out"):
        tuned(tmp_path / "file" / "t.json", Pretend(FAST))


def test_without_a_gpu_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendUnavailableError, match=r"needs a GPU that the Triton kernels serve.*GPUs only"):
        run_tune("cpu", dtypes=["half"], head_dims=[64])
    with strict_interpreter(), pytest.raises(BackendUnavailableError, match="interpreter takes on a CPU says nothing"):
        run_tune("cpu", dtypes=["half"], head_dims=[64])
    assert main(["bench", "attention", "--tune", "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.strip().splitlines()) == 1
    assert main(["bench", "training", "--tune"]) == 2
    with pytest.raises(ConfigError, match="nothing to tune"):
        run_tune("cpu", dtypes=["half"], head_dims=[512], rig=Pretend(FAST))


def test_what_is_compiled_ahead_is_what_the_tuner_asks_for() -> None:
    everywhere = list(places(["half", "fp32"], [64, 32]))
    rig = Pretend(FAST)
    for place in everywhere:
        measure(rig, place, ARCH)
    asked = {  # the order of programs is no other code
        dataclasses.replace(config, in_turn=False) for what, plan in rig.checked for config in configs(plan, what)
    }
    ahead = jobs(everywhere, ARCH)
    assert asked == {config for job in ahead for config in configs(job.plan, job.what)}
    known = {(job.place.dtype, job.place.head_dim, job.place.dropout, configs(job.plan, job.what)) for job in ahead}
    assert len(known) == len(ahead), "a candidate would be compiled twice"


def test_compiling_ahead_leaves_what_fails_to_the_tuner() -> None:
    """On a CPU no candidate can be launched: the processes say nothing, and the tuner will."""
    said: list[str] = []
    compile_ahead(PLACES[:1], ARCH, torch.device("cpu"), said.append, workers=2)
    (line,) = said
    assert line == f"compiling {len(jobs(PLACES[:1], ARCH))} candidates with 2 processes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU is here")
def test_tuning_on_a_gpu(folder: Path) -> None:
    """Two places for real: a table that the kernels then take, and that is never slower than the shipped settings."""
    asked = {"dtypes": ["half"], "head_dims": [64], "buckets": (64, None), "dropout": (False,)}
    assert run_tune("cuda", **asked) == 0  # type: ignore[arg-type]
    (path,) = folder.iterdir()
    q = torch.randn(2, 4, 3000, 64, device="cuda", dtype=torch.bfloat16)
    assert f"measured on this machine, from {path}" in explain_attention(q, q, q)
    rows = json.loads(path.read_text())["measurements"]
    assert [row["what"] for row in rows] == ["forward", "backward", "forward", "backward", "decode"]
    assert all(row["us"] <= row["shipped_us"] for row in rows)
