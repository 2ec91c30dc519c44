"""The package as a user gets it: a wheel in a fresh environment, used from another folder."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from fastchargpt.kernels import cpu_compiler

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastchargpt", next(top for top in tops if top.endswith(".dist-info"))}
    for expected in ("fastchargpt/py.typed", "fastchargpt/model.py", "fastchargpt/cli/main.py"):
        assert expected in names
    tracked = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in (ROOT / "kernels").rglob("*")
        if path.suffix in (".py", ".json", ".cpp", ".h")
    }
    assert {f"fastchargpt/kernels/{name}" for name in tracked} <= set(names)
    # compiled for the machine that built the wheel, where it has a compiler
    for source in cpu_compiler.NATIVE if cpu_compiler.find_compiler() else ():
        assert f"fastchargpt/kernels/{cpu_compiler.library_name(ROOT / 'kernels' / f'{source}.cpp')}" in names


def test_wheel_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    # the dependencies come from this environment; the package itself from the wheel alone
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = json.loads(
        subprocess.run(
            [python, "-c", "import json, site; print(json.dumps(site.getsitepackages()[0]))"],
            check=True,
            capture_output=True,
        ).stdout
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, str(wheel)], check=True
    )
    import torch

    borrowed = Path(torch.__file__).parents[1]
    (Path(packages) / "borrowed.pth").write_text(f"{borrowed}\n")
    program = f"""
import sys, fastchargpt, fastchargpt.kernels, fastchargpt.kernels.naive
assert fastchargpt.__file__.startswith({packages!r}), fastchargpt.__file__
assert fastchargpt.kernels.__file__.startswith({packages!r}), fastchargpt.kernels.__file__
import torch
model = fastchargpt.GPT(fastchargpt.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=5))
print(model.generate(torch.zeros(1, 1, dtype=torch.long), 3).shape)
from fastchargpt.kernels import cpu_compiler, cpu_decode, cpu_train
if cpu_compiler.find_compiler():
    cpu_decode.library(), cpu_train.library()
"""
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 4])" in done.stdout
    done = subprocess.run(
        [python, "-m", "fastchargpt", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastchargpt ")


def test_kernels_step_aside_as_a_top_level_package(tmp_path: Path) -> None:
    def in_root(program: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    # what transformers asks of a package that has no metadata, and what a mistaken import gets
    done = in_root("import kernels; assert getattr(kernels, '__version__', 'N/A') == 'N/A'; from kernels import naive")
    assert "ImportError: this folder is fastchargpt.kernels, not a top-level package 'kernels'" in done.stderr
    assert "No module named 'kernels.naive'" in in_root("import kernels.naive").stderr
    # Hugging Face's, where it is installed
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from . import part\n__version__ = '9'\n")
    (tmp_path / "kernels" / "part.py").write_text("answer = 42\n")
    program = (
        "import kernels, kernels.part, fastchargpt.kernels.naive as n; print(kernels.__version__, kernels.part.answer)"
    )
    done = in_root(f"{program}; print(n.__name__)")
    assert done.stdout.split() == ["9", "42", "fastchargpt.kernels.naive"], done.stderr


def test_import_costs_little_more_than_torch() -> None:
    # counted in modules, not in seconds: what the import adds to torch's own thousands
    program = """
import sys, torch
before = len(sys.modules)
import fastchargpt
fastchargpt.GPT
print(len(sys.modules) - before, before)
"""
    added, before = map(
        int, subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )
    assert added < 0.1 * before
