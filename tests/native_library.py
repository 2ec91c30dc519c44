"""Native tests skip where there is no compiler, and nowhere else: what does not compile must not hide its tests."""

import pytest

from fastchargpt.kernels.cpu_compiler import find_compiler

__all__ = ["require"]


def require(problem: str | None) -> None:
    """Skip the test where `problem` comes from a missing compiler; fail it where there is one."""
    if problem is None:
        return
    if find_compiler() is None:
        pytest.skip(problem)
    pytest.fail(f"the native code does not serve, though there is a compiler: {problem}")
