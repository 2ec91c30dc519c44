"""How a C++ file of this folder becomes a library: the compiler, its flags, and the library's name.

The standard library alone, and nothing of this package: setup.py runs this file before there is a package.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NATIVE", "CompilerError", "build_library", "find_compiler", "library_name"]

# the files that are compiled, by name, and what messages call them
NATIVE = {"cpu_decode": "the native decoder", "cpu_train": "the native training step"}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread")


class CompilerError(Exception):
    """A library could not be made; the message says why."""


def library_name(source: Path) -> str:
    """The file name of a compiled source: it changes with the text, the flags and the processor."""
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, _processor()]).encode()).hexdigest()
    return f"{source.stem}-{key[:24]}.so"


def find_compiler() -> str | None:
    """The path of the C++ compiler: what CXX names, else c++, g++ or clang++; None where there is none."""
    named = os.environ.get("CXX", "")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build_library(source: Path, target: Path, what: str) -> None:
    """Compile `source` for the machine that this is, to `target`, whose folder exists.

    It is built beside its place and renamed: two processes may build at once, and one may be killed.

    Raises:
        CompilerError: no POSIX system, no compiler, or a file that it does not compile.
        OSError: the folder cannot be written.
    """
    if os.name != "posix":
        raise CompilerError(f"{what} needs a POSIX system, and this is {platform.system()}")
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX", "")
        raise CompilerError(
            f"{what} needs a C++ compiler, and there is no {named or 'c++, g++ or clang++'} on the path"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise CompilerError(f"{compiler} could not compile {what}: {lines[0].strip()}")
        os.replace(made, target)


@functools.cache
def _processor() -> str:
    """What -march=native looks at: a folder that machines share must not mix their libraries."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
