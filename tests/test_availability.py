"""Why the Triton kernels cannot run: each reason in words, with what is missing made up."""

import importlib.metadata
import shutil
import sys
import warnings

import pytest
import torch

from fastchargpt.kernels import availability
from fastchargpt.kernels.availability import triton_problem


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100, to all appearances, that nobody has asked about."""
    monkeypatch.setattr(availability, "_ANSWERS", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")


def problem() -> str:
    with pytest.warns(UserWarning, match="attention runs on torch's SDPA, because") as said:
        found = triton_problem("cuda", 0)
    assert str(found) in str(said[0].message)
    with warnings.catch_warnings(action="error"):  # once
        assert triton_problem("cuda", 0) == found
    return str(found)


def test_nothing_is_said_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert triton_problem("cuda", 0) is None


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    assert problem() == "Triton is not installed"


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.2.0")
    assert problem() == "Triton 3.2.0 is older than 3.5"


def test_a_triton_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.7.1")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert problem().startswith("Triton 3.7.1 does not import (ModuleNotFoundError")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert problem().startswith("Triton finds no C compiler (cc, gcc or clang)")


def test_no_gpu() -> None:
    assert "the device is cpu" in str(triton_problem("cpu", 0))
