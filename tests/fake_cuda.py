"""Triton launching for real, as far as a driver that launches nothing: fake_cuda.c, seen from Python.

    build(folder)                                  # once; then, in a process of its own, with environment(folder):
    with recorded_driver(folder) as launched:
        attention(...)                             # on CPU tensors
    launched[0].parameters                         # what the driver was handed, by the C code of Triton's launcher

The process needs the environment because Triton links what it builds against the driver.
"""

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aot import TARGETS, FakeDriver, installed
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

__all__ = ["COMPILER", "Launched", "build", "environment", "fake_driver", "recorded_driver"]

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}  # of `struct`, by Triton's names of types


class Launched(NamedTuple):
    """One launch as the driver got it."""

    kernel: str
    function: int  # a number for the machine code
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes
    parameters: tuple[int | float, ...]  # what is left of the arguments when compiled; tensors as addresses


def build(folder: Path) -> None:
    """Compile the driver into `folder`, under both names that a linker looks for."""
    assert COMPILER
    library = folder / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", "-o", library, HERE / "fake_cuda.c"]
    subprocess.run(command, check=True)
    shutil.copy(library, folder / "libcuda.so")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process in which Triton takes the driver in `folder` for the GPU's."""
    return os.environ | {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


def fake_driver(launcher: type[CudaLauncher] = CudaLauncher) -> contextlib.AbstractContextManager[None]:
    """Within this scope Triton finds an A100, and launches on it come to nothing."""

    class Driver(FakeDriver):
        utils = CudaUtils()
        launcher_cls = launcher

        def get_current_device(self) -> int:
            return 0  # a number, which the fake driver is asked about

    return installed(Driver(TARGETS["sm_80"]))


@contextlib.contextmanager
def recorded_driver(folder: Path) -> Iterator[list[Launched]]:
    """A `fake_driver` that appends each launch to the list."""
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    launched: list[Launched] = []

    def last(name: str, kind: Any) -> Any:
        return kind.in_dll(library, f"launched_{name}")

    class Launcher(CudaLauncher):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.kernel = source.fn.__name__
            self.types = list(_compiled_types(source.signature.values()))

        def __call__(self, *arguments: Any) -> None:
            ctypes.c_int.in_dll(library, "parameter_count").value = len(self.types)
            super().__call__(*arguments)
            words = last("parameters", ctypes.c_uint64 * 128)
            launched.append(
                Launched(
                    self.kernel,
                    last("function", ctypes.c_uint64).value,
                    tuple(last("grid", ctypes.c_uint * 3)),
                    tuple(last("block", ctypes.c_uint * 3)),
                    last("shared", ctypes.c_uint).value,
                    tuple(_value(word, kind) for word, kind in zip(words, self.types, strict=False)),
                )
            )

    with fake_driver(Launcher):
        yield launched


def _compiled_types(signature: Any) -> Iterator[str]:
    """The types of the arguments that are left once a kernel is compiled."""
    for kind in signature:
        if isinstance(kind, tuple):
            yield from _compiled_types(kind)
        elif kind != "constexpr":
            yield kind


def _value(word: int, kind: str) -> int | float:
    form = FORMATS.get(kind, "Q")
    number: int | float = struct.unpack_from(form, struct.pack("Q", word))[0]
    return number
