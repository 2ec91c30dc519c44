"""Whichever of its system calls a save is killed or failed at, a whole checkpoint can be loaded, and saved over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C compiler")
def test_every_call_of_a_save_may_be_the_last_or_fail(tmp_path: Path) -> None:
    assert COMPILER is not None
    shim = tmp_path / "save_faults.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "save_faults.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "save_faults.py", tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for kind, seen in json.loads(done.stdout).items():
        assert seen.get("wrong", 0) == 0, (kind, seen, done.stderr)
        assert seen["calls"] >= 20, kind  # the writes of torch and safetensors, not Python's alone
        assert seen["left 1"] > 0, kind  # early calls leave the save before, late ones the new one
        assert seen["left 2"] > 0, kind
        if kind.startswith("killed"):
            assert seen["killed"] == seen["calls"], kind
        else:
            assert seen["refused"] > 0, kind
