"""The compiled C++: where it is looked for, how it is built, and what an installation brings along."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastchargpt.errors import BackendUnavailableError
from fastchargpt.kernels import cpu_build, cpu_compiler

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A folder of kernels with one small file, an empty cache, and a process that has built nothing."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "cpu_decode.cpp").write_text('#include "one.h"\nextern "C" int answer() { return ONE; }\n')
    (folder / "one.h").write_text("#define ONE 41\n")
    monkeypatch.setattr(cpu_build, "FOLDER", folder)
    monkeypatch.setattr(cpu_build, "_problems", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    cpu_build.load.cache_clear()
    yield folder
    cpu_build.load.cache_clear()


def test_what_was_installed_needs_no_compiler_and_no_cache(place, monkeypatch, tmp_path):
    source = place / "cpu_decode.cpp"
    cpu_compiler.build_library(source, place / cpu_compiler.library_name(source), "it")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu_build.load("cpu_decode").answer() == 41
    assert not (tmp_path / "cache").exists()


def test_a_library_of_another_source_flags_or_processor_is_not_taken(place, monkeypatch):
    source = place / "cpu_decode.cpp"
    names = {cpu_compiler.library_name(source)}
    with monkeypatch.context() as patch:
        patch.setattr(cpu_compiler, "_processor", lambda: "model name: another")
        names.add(cpu_compiler.library_name(source))
    with monkeypatch.context() as patch:
        patch.setattr(cpu_compiler, "FLAGS", (*cpu_compiler.FLAGS, "-g"))
        names.add(cpu_compiler.library_name(source))
    (place / "one.h").write_text("#define ONE 42\n")
    names.add(cpu_compiler.library_name(source))
    assert len(names) == 4
    for name in names - {cpu_compiler.library_name(source)}:
        (place / name).write_text("not a library, and not to be looked at")
    assert cpu_build.load("cpu_decode").answer() == 42


def test_a_file_that_does_not_compile_is_told_in_one_sentence_and_tried_once(place, monkeypatch):
    (place / "one.h").write_text("#define ONE nonsense\n")
    runs = []
    run = subprocess.run
    monkeypatch.setattr(
        cpu_compiler.subprocess, "run", lambda *args, **kwargs: runs.append(args) or run(*args, **kwargs)
    )
    for _ in range(2):
        with pytest.raises(
            BackendUnavailableError, match=r"could not compile the native decoder: .*nonsense"
        ) as caught:
            cpu_build.load("cpu_decode")
        assert "\n" not in str(caught.value)
    assert len(runs) == 1
    assert not list(place.glob("*.so"))


def test_an_installation_without_a_compiler_is_whole_but_for_the_libraries(monkeypatch, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "there is no no-such-compiler on the path; it will be built on first use" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
