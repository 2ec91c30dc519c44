"""A pytest plugin: compile the native code for an older processor, named in FASTCHARGPT_TEST_MARCH, than this one."""

import os

from fastchargpt.kernels import cpu_compiler

__all__: list[str] = []

cpu_compiler.FLAGS = tuple(
    flag.replace("-march=native", f"-march={os.environ['FASTCHARGPT_TEST_MARCH']}") for flag in cpu_compiler.FLAGS
)
