"""Launches: what they keep from call to call, and what the driver is handed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import COMPILER, build, environment

from fastchargpt.kernels import launch
from fastchargpt.kernels.launch import alignment

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What launch_probe.py saw, a row a launch."""
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    build(folder)
    command = [sys.executable, HERE / "launch_probe.py", folder]
    variables = environment(folder) | {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "Python.h" in done.stderr:
        pytest.skip("Triton cannot build its launcher: this Python has no headers")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_the_driver_gets_what_triton_itself_would_hand_it(launched: list[dict[str, Any]]) -> None:
    """Machine code, grid, shared memory and every parameter, with code found anew, kept, and for other addresses."""
    assert [row for row in launched if row["differences"]] == []
    assert {row["kernel"].removesuffix("_kernel") for row in launched} == {
        *("attention_forward", "decode_split", "decode_merge"),
        *("backward_dq", "backward_dkdv", "backward_blocks", "backward_tile"),
    }
    assert all(row["parameters"] >= 10 for row in launched)


def test_code_is_kept_and_misaligned_tensors_get_their_own(launched: list[dict[str, Any]]) -> None:
    for case in {row["case"] for row in launched}:
        first, second, misaligned, third = (
            [row for row in launched if (row["case"], row["attempt"]) == (case, attempt)]
            for attempt in ("first", "second", "misaligned", "third")
        )
        assert all(row["codes"] == 0 for row in first)
        assert all(row["codes"] == 1 for row in second)
        functions = [[row["function"] for row in rows] for rows in (first, second, third)]
        assert functions[0] == functions[1] == functions[2]
        for aligned, other in zip(first, misaligned, strict=True):
            if aligned["kernel"] != "decode_merge_kernel":  # which sees none of the caller's tensors
                assert aligned["function"] != other["function"]


def test_no_code_is_kept_of_a_triton_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, known in (("3.5.0", True), ("3.7.1", True), ("3.8.0", False), ("4.0", False)):
        launch._may_keep_code.cache_clear()
        monkeypatch.setattr(launch, "triton_version", lambda version=version: version)
        assert launch._may_keep_code() == known
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(launch, "triton_version", lambda: "3.7.1")
    launch._may_keep_code.cache_clear()
    assert not launch._may_keep_code()
    launch._may_keep_code.cache_clear()


@pytest.mark.parametrize(
    ("head_dim", "n_head", "expected"), [(64, 1, 16), (52, 4, 4), (100, 3, 4), (24, 2, 8), (10, 1, 2), (59, 2, 1)]
)
def test_the_alignment_of_a_packed_projection(head_dim: int, n_head: int, expected: int) -> None:
    def found(*views: torch.Tensor) -> int:
        return alignment((view.shape, view.stride()) for view in views)

    qkv = torch.zeros(2, 5, 3 * n_head, head_dim).transpose(1, 2)
    assert found(qkv[:, :n_head], qkv[:, n_head:]) == expected
    assert found(torch.zeros(2, 3, 4, 64), qkv) == expected  # the least of all
    assert found(qkv[:1, :1, :1]) == 16  # no stride is used
