"""The doctor: complete, true, discreet, and not to be brought down by what it finds."""

import builtins
import getpass
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchargpt import diagnosis, doctor, rehearsal
from fastchargpt.cli.main import main
from fastchargpt.errors import ConfigError
from fastchargpt.finding import Finding
from fastchargpt.kernels import sdpa
from fastchargpt.parity import attention_inputs, check_attention
from fastchargpt.roofline import Roof

ALL_SECTIONS = ["versions", "device", "compiler", "triton", "choices", "training", "attention", "speed", "corpus"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A doctor who looks at small shapes, measures nothing long and stays off the network."""
    monkeypatch.setattr(diagnosis, "CPU_SHAPES", [(2, 2, 16, 8), (1, 2, 33, 16), (1, 1, 64, 8)])
    monkeypatch.setattr(diagnosis, "SECONDS_PER_SHAPE", 0.02)
    monkeypatch.setattr(diagnosis, "measure_roof", lambda *_: Roof(flops=1e11, bandwidth=1e10))
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "1")
    monkeypatch.setenv("FASTCHARGPT_DATA_DIR", str(tmp_path))
    return monkeypatch


def examine(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = doctor.run(["--json", "--device", "cpu"])
    return status, json.loads(capsys.readouterr().out)


def findings(report: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["section"] == section]


def test_a_healthy_machine(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = examine(capsys)
    broken = [finding for finding in report["findings"] if finding["status"] == "broken"]
    assert (status, report["broken"], broken) == (0, 0, [])
    assert list(dict.fromkeys(finding["section"] for finding in report["findings"])) == ALL_SECTIONS
    attention = {finding["facts"]["backend"]: finding["facts"] for finding in findings(report, "attention")}
    assert list(attention) == ["naive", "sdpa", "triton"]
    assert attention["sdpa"]["auto"]
    for name in ("naive", "sdpa"):
        assert [row["shape"] for row in attention[name]["shapes"]] == [[2, 2, 16, 8], [1, 2, 33, 16], [1, 1, 64, 8]]
        assert all(row["right"] and row["ms"] > 0 for row in attention[name]["shapes"])
    facts = {key: value for finding in report["findings"] for key, value in finding["facts"].items()}
    assert facts["torch"] == torch.__version__
    assert facts["precision"] in ("fp32", "bf16")
    assert facts["compile"] in (True, False)
    assert (facts["matmul_flops"], facts["bytes_per_second"]) == (1e11, 1e10)
    assert {finding["facts"]["corpus"]: finding["facts"]["have"] for finding in findings(report, "corpus")}[
        "pydoc"
    ] == "here"


def test_the_text_says_the_same(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device=cpu"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert [line.partition(":")[0] for line in lines[1:] if line and line[0] != " "][:-1] == ALL_SECTIONS
    assert lines[-1] == "everything that training needs works"
    assert max(map(len, lines)) <= 110
    assert "FASTCHARGPT_OFFLINE is set" in text
    assert "-> put tinyshakespeare.txt" in text


def test_a_wrong_backend_is_found(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = sdpa.attention
    quick.setattr(sdpa, "attention", lambda *args, causal, **rest: right(*args, causal=False, **rest))
    status, report = examine(capsys)
    judged = {finding["facts"]["backend"]: finding for finding in findings(report, "attention")}
    assert (status, judged["sdpa"]["status"], judged["naive"]["status"]) == (1, "broken", "ok")
    assert "WRONG" in judged["sdpa"]["text"]
    assert judged["sdpa"]["remedy"]


def test_a_backend_that_raises_is_found(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def explode(*_: object, **__: object) -> torch.Tensor:
        raise OSError("no such driver")

    quick.setattr(sdpa, "attention", explode)
    status, report = examine(capsys)
    judged = {finding["facts"]["backend"]: finding for finding in findings(report, "attention")}
    assert (status, judged["sdpa"]["status"]) == (1, "broken")
    assert "OSError: no such driver" in judged["sdpa"]["text"]
    assert len(findings(report, "corpus")) == 4  # it went on


def test_a_look_that_fails_is_a_finding(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> Roof:
        raise RuntimeError(f"cannot read {Path.home()}/secret")

    quick.setattr(diagnosis, "measure_roof", fail)
    status, report = examine(capsys)
    (speed,) = findings(report, "speed")
    assert (status, speed["status"], speed["text"]) == (1, "broken", "RuntimeError: cannot read ~/secret")


@pytest.mark.parametrize("fault", ["step", "tokens", "raises"])
def test_a_default_path_that_computes_something_else_is_broken(
    quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    (healthy,) = findings(examine(capsys)[1], "training")
    assert healthy["status"] == "ok"
    assert healthy["facts"]["loss_error"] < 1e-4
    plain_step, plain_tokens = rehearsal.make_train_step, rehearsal.generate_tokens
    if fault == "step":  # a rate that is a tenth too high, but for the judge
        quick.setattr(
            rehearsal,
            "make_train_step",
            lambda model, **named: plain_step(model, **named, learning_rate=1e-3 if "engine" in named else 1.1e-3),
        )
    elif fault == "tokens":
        quick.setattr(rehearsal, "generate_tokens", lambda *words: plain_tokens(*words).roll(1, dims=1))
    else:
        quick.setattr(rehearsal, "make_train_step", lambda *_, **__: 1 / 0)
    status, report = examine(capsys)
    (sick,) = findings(report, "training")
    assert (status, sick["status"]) == (1, "broken")
    assert ("ZeroDivisionError" if fault == "raises" else "WRONG here") in sick["text"]
    assert "report this" in sick["remedy"]


def test_missing_and_old_packages(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real: Callable[[str], str | None] = doctor._installed
    quick.setattr(doctor, "_installed", lambda name: {"tyro": None, "torch": "2.3.1+cu121"}.get(name, real(name)))
    status, report = examine(capsys)
    broken = {finding["text"]: finding["remedy"] for finding in report["findings"] if finding["status"] == "broken"}
    assert (status, broken) == (
        1,
        {
            "torch 2.3.1+cu121 is older than 2.9": "pip install 'torch>=2.9'",
            "tyro is not installed": "pip install 'tyro>=0.9'",
        },
    )


def test_a_torch_that_does_not_load(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "fastchargpt.diagnosis":
            raise OSError("libtorch_cpu.so: undefined symbol")
        return real(name, *rest)

    quick.setattr(builtins, "__import__", refuse)
    status, report = examine(capsys)
    assert status == 1
    assert "undefined symbol" in report["findings"][-1]["text"]


def test_an_optional_package_is_no_defect(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor._installed
    quick.setattr(doctor, "_installed", lambda name: None if name == "matplotlib" else real(name))
    status, report = examine(capsys)
    notes = {
        finding["text"]: finding["remedy"] for finding in findings(report, "versions") if finding["status"] == "note"
    }
    assert (status, notes["matplotlib is not installed: loss.png is left out"]) == (0, "pip install matplotlib")


def test_no_compiler(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick.setenv("PATH", str(tmp_path))
    quick.delenv("CXX", raising=False)
    status, report = examine(capsys)
    (compiler,) = findings(report, "compiler")
    assert (status, compiler["status"], compiler["facts"]) == (0, "note", {"compiler": None})
    assert "install" in compiler["remedy"]
    quick.setenv("CXX", "/opt/somewhere/icpx")
    (named,) = findings(examine(capsys)[1], "compiler")
    assert named["text"].startswith("CXX names icpx, which is not there")


def test_nothing_personal(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick.setenv("HOME", str(tmp_path / "home" / "ada.lovelace"))
    quick.setattr(getpass, "getuser", lambda: "ada.lovelace")
    quick.setenv("FASTCHARGPT_DATA_DIR", str(tmp_path / "home" / "ada.lovelace" / "data"))
    (tmp_path / "home" / "ada.lovelace" / "data").mkdir(parents=True)
    (tmp_path / "home" / "ada.lovelace" / "data" / "tinyshakespeare.txt").write_text("another text", encoding="utf-8")
    report = json.dumps(examine(capsys)[1])
    assert "is not the corpus" in report  # the finding that names the path is there
    assert "ada" not in report
    assert str(tmp_path) not in report
    doctor.run(["--device", "cpu"])
    assert "ada" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/grace/src/x.py", "/home/<user>/src/x.py"),
        (r"C:\Users\grace\x.py", r"C:\Users\<user>\x.py"),
        ("/mnt/grace/x", "/mnt/<user>/x"),
        ("the grace of god", "the grace of god"),
        ("/opt/gracefully/x", "/opt/gracefully/x"),
    ],
)
def test_redact(monkeypatch: pytest.MonkeyPatch, text: str, clean: str) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "grace")
    assert doctor.redact({"a": [text]}) == {"a": [clean]}
    assert doctor.redact(Finding(section="x", status="ok", text=text)).text == clean


@pytest.mark.parametrize("words", [["--jsn"], ["extra"], ["--device"]])
def test_unknown_words(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="doctor --help"):
        doctor.run(words)


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cupu"]) == 2
    assert "did you mean 'cpu'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_judges(dtype: torch.dtype) -> None:
    inputs = attention_inputs(3, 3, 40, 16, device=torch.device("cpu"), dtype=dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa.attention(q, k, v, scale=0.25, causal=True)

    assert check_attention(attend, inputs).right
    # 2 % off, the future in sight, one head swapped, a gradient that does not flow, NaN, another dtype
    assert check_attention(lambda q, k, v: attend(q, k, v) * 1.02, inputs).output > 1
    assert not check_attention(lambda q, k, v: sdpa.attention(q, k, v, scale=0.25, causal=False), inputs).right
    assert not check_attention(lambda q, k, v: attend(q, k, v).flip(0), inputs).right
    detached = check_attention(lambda q, k, v: attend(q, k.detach(), v) + 0 * k, inputs)
    assert detached.output <= 1 < detached.gradients
    assert not check_attention(lambda q, k, v: attend(q, k, v) * float("nan"), inputs).right
    assert not check_attention(lambda q, k, v: attend(q.double(), k.double(), v.double()), inputs).right
