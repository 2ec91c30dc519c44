"""The architecture, checked: data flows one way, importing changes nothing, every public name is listed."""

import ast
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastchargpt

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fastchargpt"

# Left to right: a module may import from its own stage and those before it. ARCHITECTURE.md draws this.
STAGES = [
    ["errors"],
    [
        "config",
        "hardware",
        "metrics",
        "plotting",
        "outdir",
        "signals",
        "determinism",
        "machine",
        "timing",
        "roofline",
        "sharding",
    ],
    ["tokens", "presets", "cache"],
    ["bpe", "tokenizers"],
    ["downloads", "text_files"],
    ["nanogpt_data"],
    ["corpus"],
    ["batches"],
    ["kernels"],
    ["attention", "parity"],
    ["layers", "bigram"],
    ["model"],
    ["optim", "precision", "parallel"],
    ["native_step"],
    ["averaging", "captured", "choices"],
    ["step", "evaluation"],
    ["compiling"],
    ["checkpoint"],
    ["faults", "reporting", "saving", "trainer", "loading"],
    ["knobs", "stopping"],
    ["sampling"],
    ["decode_step", "fused_step"],
    ["decode"],
    ["graph_engine", "native"],
    ["engines"],
    ["generation"],
    ["integrations", "convert"],
    ["bench"],
    ["finding", "rehearsal", "diagnosis", "doctor", "cli"],
]
# A method that nanoGPT's GPT has and ours therefore has too, imported when it is called.
FACADES = {("model", "optim"), ("model", "generation"), ("model", "sampling"), ("model", "integrations")}


def _stage(module: str) -> int:
    for number, names in enumerate(STAGES):
        if module in names:
            return number
    raise AssertionError(
        f"{module} stands in no stage: say in tests/test_layout.py and ARCHITECTURE.md where it belongs"
    )


def _top(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, by their first name."""
    package = (
        ["fastchargpt", "kernels"] if _top(path) == "kernels" else ["fastchargpt", *path.relative_to(SOURCE).parts[:-1]]
    )
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{stem}.{alias.name}" for alias in node.names] if stem == "fastchargpt" else [stem]
        names |= {name.split(".")[1] for name in found if name.startswith("fastchargpt.")}
    return names - {"__version__"}


FILES = [
    path
    for folder in (SOURCE, ROOT / "kernels")
    for path in sorted(folder.rglob("*.py"))
    if path != SOURCE / "__init__.py"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards(path: Path) -> None:
    module = _top(path)
    if module == "__main__":
        return
    for imported in _imports(path):
        if (module, imported) not in FACADES:
            assert _stage(imported) <= _stage(module), (
                f"{module} must not import {imported}: it comes later in the flow"
            )


def test_kernels_import_nothing_but_errors() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert _imports(path) <= {"kernels", "errors"}, path


def test_every_public_name_exists() -> None:
    for info in pkgutil.walk_packages(fastchargpt.__path__, "fastchargpt."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        public = getattr(module, "__all__", None)
        assert public is not None, f"{info.name} has no __all__"
        for name in public:
            assert hasattr(module, name), f"{info.name}.__all__ names {name}, which is not there"


def test_importing_changes_nothing() -> None:
    # what a fresh interpreter holds before and after the import, beside what torch alone brings along
    program = """
import json, logging, os, sys, warnings
import torch
state = lambda: [dict(os.environ), torch.get_default_dtype().__repr__(), torch.get_num_threads(),
                 torch.get_float32_matmul_precision(), logging.getLogger().handlers.__repr__(), len(warnings.filters),
                 torch.initial_seed(), torch.get_rng_state().sum().item(), torch.is_grad_enabled()]
before, modules = state(), set(sys.modules)
import fastchargpt
fastchargpt.GPT, fastchargpt.causal_attention
heavy = {"triton", "tokenizers", "pooch", "matplotlib", "tqdm", "tyro", "transformers"}
print(json.dumps([before == state(), sorted(heavy & (set(sys.modules) - modules)), torch.cuda.is_initialized()]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == [True, [], False]
    assert done.stderr == ""


def test_nothing_names_a_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    home = str(Path.home())
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".json", ".csv", ".txt", ""}:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert str(ROOT) + "/" not in text, name
            assert home + "/" not in text, name


def test_module_size() -> None:
    # a file is read in one sitting
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("src", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long
