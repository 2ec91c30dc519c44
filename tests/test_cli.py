"""The command line as its user meets it: what works, what each mistake says, and that no mistake loses anything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchargpt.checkpoint import load_checkpoint
from fastchargpt.cli import main
from fastchargpt.metrics import read_metrics

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 40
TINY = [
    "--warmup_iters=5",
    "--learning_rate=1e-2",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--batch_size=4",
    "--device=cpu",
    "--eval_interval=10",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "hamlet.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def train(text: Path, *more: str) -> int:
    return main(["train", "--data", str(text), "--preset=shakespeare-char-cpu", *TINY, "--max_iters=20", *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "hamlet.txt").write_text(TEXT, encoding="utf-8")
    assert train(folder / "hamlet.txt", "--out-dir", str(folder / "out"), "--max_iters=60") == 0
    return folder / "out"


def told(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What a mistake says: one line on standard error, exit status 2, no traceback."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastchargpt: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_train_sample_eval(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        ".lock",
        "best",
        "last",
        "last.old",
        "loss.png",
        "metrics.jsonl",
        "sample.txt",
    ]
    rows = read_metrics(trained / "metrics.jsonl")
    val = [row["val_loss"] for row in rows if "val_loss" in row]
    assert val[-1] < val[0] - 0.5
    assert len((trained / "sample.txt").read_text(encoding="utf-8")) > 100
    assert main(["sample", str(trained), "--prompt", "To be", "--max_new_tokens=20", "--seed=1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("To be")
    assert len(first) == len("To be") + 20 + 1
    assert main(["sample", str(trained), "--start=To be", "--max-new-tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main(["sample", str(trained), "--num_samples=2", "--max_new_tokens=5", "--json", "--logprobs=2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert all(len(line["logprobs"]) == 5 for line in lines)
    assert main(["eval", str(trained), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == min(val)
    assert figures["bits_per_character"] == pytest.approx(figures["loss"] / 0.6931471805599453)
    assert main(["eval", str(trained)]) == 0
    assert "bits per character" in capsys.readouterr().out


def test_prompt_from_file_and_stdin(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    (tmp_path / "prompt").write_text("be, or")
    assert main(["sample", str(trained), "--prompt-file", str(tmp_path / "prompt"), "--max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("be, or")
    monkeypatch.setattr("sys.stdin", io.StringIO("not to"))
    assert main(["sample", str(trained), "--prompt-file=-", "--max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("not to")


def test_characters_outside_the_vocabulary(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["sample", str(trained), "--max_new_tokens=8", "--seed=1"]
    refused = told(capsys, [*sample, "--prompt", "be @ home"])
    assert "'@'" in refused
    assert "read it as ' '" in refused
    assert "--unknown replace" in refused
    assert main([*sample, "--prompt", "be @ home", "--unknown", "replace"]) == 0
    replaced = capsys.readouterr().out
    assert replaced.startswith("be @ home")
    assert main([*sample, "--prompt", "be   home"]) == 0  # the stand-in is a space here
    assert capsys.readouterr().out.removeprefix("be   home") == replaced.removeprefix("be @ home")
    assert "'@'" in told(capsys, [*sample, "--prompt", "be @ home", "--unknown=error"])
    assert "replcae" in told(capsys, [*sample, "--unknown=replcae"])
    for name, words in (("odd.txt", TEXT.replace("q", "@")), ("plain.txt", TEXT.replace("q", " "))):
        (tmp_path / name).write_text(words, encoding="utf-8")
    evaluate = ["eval", str(trained), "--json", "--data"]
    assert "--unknown replace" in told(capsys, [*evaluate, str(tmp_path / "odd.txt")])
    losses = []
    for name in ("odd.txt", "plain.txt"):
        assert main([*evaluate, str(tmp_path / name), "--unknown=replace"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]


def test_nanogpts_spellings(text: Path, tmp_path: Path) -> None:
    words = [
        "--dropout=0",
        "--compile=False",
        "--dtype=float32",
        "--bias=True",
        "--decay_lr=False",
        "--learning_rate=1e-3",
        "--eval_iters=2",
    ]
    assert train(text, *words, "--out_dir", str(tmp_path / "out")) == 0
    config = json.loads((tmp_path / "out" / "last" / "config.json").read_text())
    assert config["model"]["dropout"] == 0
    assert config["model"]["bias"] is True
    assert (config["train"]["compile"], config["train"]["precision"], config["train"]["schedule"]) == (
        "off",
        "fp32",
        "constant",
    )


def test_resume_needs_no_flags(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert train(text, "--out-dir", out) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out-dir", out, "--max_iters=30"]) == 0
    said = capsys.readouterr().out
    assert "at step 20" in said
    assert "finished after 30 steps" in said
    assert [row["step"] for row in read_metrics(Path(out) / "metrics.jsonl") if "val_loss" in row] == [0, 10, 20, 30]


@pytest.mark.parametrize("name", ["trainer.pt", "config.json"])
def test_resume_from_the_save_before_a_damaged_one(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(text, "--out-dir", str(whole)) == 0
    assert train(text, "--out-dir", str(out)) == 0
    data = bytearray((out / "last" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / "last" / name).write_bytes(data)
    capsys.readouterr()
    assert main(["train", "--resume", "--out-dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert str(out / "last" / name) in said
    assert f"going on from the save before it, of step 10 (the damaged one is kept as {out / 'last'}.damaged)" in said
    assert f"resumed from {out / 'last'} at step 10" in said
    figures = [
        [(row["step"], row.get("loss"), row.get("val_loss")) for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, out)
    ]
    assert figures[0] == figures[1]  # the steps that were lost are taken again, bit for bit
    assert (out / "last" / "model.safetensors").read_bytes() == (whole / "last" / "model.safetensors").read_bytes()
    assert train(text, "--out-dir", str(out), "--overwrite") == 0
    assert not (out / "last.damaged").exists()


def test_resume_keeps_a_larger_vocabulary(text: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert train(text, "--out-dir", out, "--vocab-size=64") == 0
    assert main(["train", "--resume", "--out-dir", out, "--max_iters=22"]) == 0
    assert json.loads((tmp_path / "out" / "last" / "config.json").read_text())["model"]["vocab_size"] == 64


def test_bpe_and_byte_models(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("byte", "bpe"):
        out = tmp_path / kind
        assert train(text, "--tokenizer", kind, "--bpe-vocab-size=300", "--out-dir", str(out)) == 0
        capsys.readouterr()
        assert main(["eval", str(out), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        # a character is one byte here, and several characters may be one BPE token
        characters = len(TEXT) - int(0.9 * len(TEXT))
        per_character = figures["loss"] * figures["tokens"] / 0.6931471805599453 / characters
        assert figures["bits_per_character"] == pytest.approx(per_character, rel=0.02)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in ("train", "sample", "eval", "doctor"))
    assert main(["--version"]) == 0
    for command in ("train", "sample", "eval"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "usage: fastchargpt" in capsys.readouterr().out
    assert main([]) == 2


def test_mistakes_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no command 'trian' (did you mean 'train'?)" in told(capsys, ["trian"])
    assert "unrecognized options: --n-layr=3 (did you mean --n-layer?)" in told(capsys, ["train", "--n_layr=3"])
    assert "invalid literal for int()" in told(capsys, ["train", "--n_layer=x"])
    assert "dropout must be in [0, 1), not 2.0" in told(capsys, ["train", "--dropout=2"])
    assert "n_embd must be a multiple of n_head" in told(capsys, ["train", "--n_embd=10", "--n_head=3"])
    assert "there is no preset 'gpt3' (did you mean 'gpt2'?)" in told(capsys, ["train", "--preset", "gpt3"])


def test_mistakes_in_data(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out-dir", str(tmp_path / "out"), *TINY]

    def said(content: bytes | None, name: str = "input.txt") -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return told(capsys, ["train", "--data", str(path), *out])

    assert "empty" in said(b"")
    assert "character" in said(b"a")
    assert "UTF-8" in said(b"abc \xff\xfe def" * 50)
    assert "block_size" in said(b"To be, or not")
    (tmp_path / "folder").mkdir()
    assert "train.bin" in said(None, "folder")
    assert "missing.txt" in said(None, "missing.txt")
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "1")
    monkeypatch.setenv("FASTCHARGPT_DATA_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "shakespeare" in told(capsys, ["train", "--data", "shakespeare", *out])
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "tinyshakespeare.txt").write_text("something else")
    assert "sha" in told(capsys, ["train", "--data", "shakespeare", *out]).lower()
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_auto_falls_back_to_pydoc_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCHARGPT_OFFLINE", "1")
    monkeypatch.delenv("FASTCHARGPT_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["train", *TINY, "--max_iters=2", "--eval_interval=2", "--out-dir", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("pydoc" in line and "because" in line for line in lines) == 1
    # what was trained on is remembered by name: shakespeare, were it here by then, would be another text
    config = json.loads((tmp_path / "out" / "last" / "config.json").read_text())
    assert config["info"]["data"] == "pydoc"
    assert main(["eval", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["corpus"] == "pydoc"


def test_mistakes_in_out_dirs(text: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock"}
    words = ["train", "--data", str(text), *TINY, "--max_iters=2"]
    assert "go on with --resume, replace it with --overwrite" in told(capsys, [*words, "--out-dir", str(trained)])
    assert "give one of the two" in told(capsys, [*words, "--out-dir", str(trained), "--resume", "--overwrite"])
    (tmp_path / "file").write_text("x")
    assert "is a file" in told(capsys, [*words, "--out-dir", str(tmp_path / "file")])
    assert "cannot be written" in told(capsys, [*words, "--out-dir", str(tmp_path / "file" / "out")])
    assert "does not exist" in told(capsys, ["train", "--resume", "--out-dir", str(tmp_path / "none")])
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.name != ".lock"}


def test_an_out_dir_that_cannot_be_read(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as another user's folder answers; chmod keeps nothing from root, whom tests may run as
    out = tmp_path / "out"
    out.mkdir()
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == out:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for more in ([], ["--overwrite"]):
        said = told(capsys, ["train", "--data", str(text), *TINY, "--out-dir", str(out), *more])
        assert f"out dir {out} cannot be read (Permission denied): name another with --out-dir" in said
    monkeypatch.undo()
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk without space")
def test_a_disk_that_fills_up_while_metrics_are_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert train(text, "--out-dir", str(whole)) == 0
    real, lines = Path.open, 0

    def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal lines
        if path == full / "metrics.jsonl" and "a" in mode:
            lines += 1
            if lines > 4:  # behind the first evaluation and its save
                return real(Path("/dev/full"), mode, *args, **kwargs)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    words = ["--log_interval=5", "--out-dir", str(full)]
    capsys.readouterr()
    assert train(text, *words) == 2
    error = capsys.readouterr().err
    assert f"{full / 'metrics.jsonl'} cannot be written (No space left on device): free some space" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    kept = read_metrics(full / "metrics.jsonl")
    assert len(kept) == 4
    assert load_checkpoint(full / "last", with_trainer=True).trainer_state is not None
    assert main(["train", "--resume", "--out-dir", str(full)]) == 0
    weights = [load_checkpoint(out / "last").weights for out in (whole, full)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_mistakes_in_sampling(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = ["sample", str(trained)]
    assert "does not exist" in told(capsys, ["sample", str(tmp_path / "none")])
    assert "'@'" in told(capsys, [*sample, "--prompt", "me@home"])
    capsys.readouterr()
    main([*sample, "--prompt", "me@home"])
    assert capsys.readouterr().out == ""  # nothing is shown of a text that cannot be begun
    assert "temperature must be" in told(capsys, [*sample, "--temperature=-1"])
    assert "give one of the two" in told(capsys, [*sample, "--prompt=To", "--prompt-file=x"])
    assert "cannot be read" in told(capsys, [*sample, "--prompt-file", str(tmp_path / "none")])
    assert "--json" in told(capsys, [*sample, "--logprobs=3"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(text: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastchargpt", "train", "--data", str(text), *TINY, "--out-dir", str(out)]
    process = subprocess.Popen(
        [*command, "--max_iters=1000000", "--eval_interval=1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "last" / "config.json").exists():
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "go on with --resume" in said
    assert "Traceback" not in said
    assert main(["sample", str(out / "last"), "--max_new_tokens=3"]) == 0


def test_ctrl_c_leaves_the_text_so_far(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastchargpt", "sample", str(trained), "--max-new-tokens=100000000", "--seed=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    assert process.stdout is not None
    shown = process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert (shown + rest).endswith("\n")
    assert set(shown + rest) <= set(TEXT)


def test_a_closed_pipe_is_quiet(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastchargpt", "sample", str(trained), "--max_new_tokens=4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
