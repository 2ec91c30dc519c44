"""Other people's GPTs from their own checkouts, read as they are: no file is edited, nothing is copied here."""

import ast
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fastchargpt.bench.contest import Absent
from fastchargpt.config import GPTConfig

__all__ = ["lecture_model", "nanogpt_model"]


def nanogpt_model(checkout: Path, config: GPTConfig) -> nn.Module:
    """nanoGPT's GPT at our config's shape, with freshly drawn weights.

    Raises:
        Absent: the checkout's model.py does not load.
    """
    module = _nanogpt(checkout)
    shape = {
        name: getattr(config, name)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    }
    model: nn.Module = module.GPT(module.GPTConfig(**shape))
    return model


def _nanogpt(checkout: Path) -> ModuleType:
    """model.py under a name of its own; importing it has no effect but its classes."""
    path = (checkout / "model.py").resolve()
    spec = importlib.util.spec_from_file_location(f"_nanogpt_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise Absent("nanoGPT's model.py cannot be loaded")
    if spec.name not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[spec.name]
            raise Absent(f"nanoGPT's model.py does not load: {error}") from error
    return sys.modules[spec.name]


def lecture_model(checkout: Path, config: GPTConfig, device: str) -> nn.Module:
    """The lecture's GPTLanguageModel at our config's shape, with freshly drawn weights.

    gpt.py trains when it is imported and keeps its sizes in global variables. So only its imports and classes are
    executed, from the file as it is, in a namespace whose globals hold our sizes.

    Raises:
        Absent: the checkout's gpt.py is another program.
    """
    path = checkout / "gpt.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    kept: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]
    namespace: dict[str, Any] = {**_lecture_globals(config), "device": device, "__name__": "_lecture_gpt"}
    exec(compile(ast.Module(body=kept, type_ignores=[]), str(path), "exec"), namespace)
    if "GPTLanguageModel" not in namespace:
        raise Absent("gpt.py has no class GPTLanguageModel")
    model: nn.Module = namespace["GPTLanguageModel"]()
    return model


def _lecture_globals(config: GPTConfig) -> Mapping[str, Any]:
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    return {name: getattr(config, name) for name in names}
