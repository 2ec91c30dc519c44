"""The native code where vectors are fewer and narrower: other tiles, and the code without intrinsics."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import require

from fastchargpt.kernels.cpu_compiler import find_compiler

HERE = Path(__file__).parent
TESTS = (
    "test_native_step.py::test_loss_and_gradients_equal_float64",
    "test_native_step.py::test_long_sequences_pass_several_blocks_of_queries",
    "test_native_dropout.py::test_dropout_is_philox_at_every_site",
    "test_native.py::test_odd_shapes_equal_torch",
    "test_native.py::test_int8_equals_a_model_with_rounded_weights",
)


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="needs x86's names and Linux"
)
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_equal_on_an_older_processor(march):
    """x86-64 has vectors of 4 floats and no fused multiply-add, v3 those of 8."""
    require(None if find_compiler() else "no C++ compiler")
    if march == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    options = ["-q", "-x", "-n", "0", "-p", "older_processor", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        cwd=HERE,
        env=os.environ | {"FASTCHARGPT_TEST_MARCH": march, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
