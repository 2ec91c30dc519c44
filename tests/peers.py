"""Other people's packages and checkouts, where they are to be had."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

__all__ = ["ROOT", "checkout", "peer"]

ROOT = Path(__file__).parents[1]


def peer(name: str, install: str = "'fastchargpt[integrations]'") -> Any:
    """A package, of the `integrations` extra unless another is named; the test is skipped without it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        pytest.skip(f"{name} is not installed (pip install {install})", allow_module_level=True)


def checkout(variable: str) -> Path:
    """The folder that an environment variable names; the test is skipped where it is not set."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    return Path(os.environ[variable]).resolve()
