"""Builds the C++ files of this folder on first use.

A file is compiled for the very machine it runs on (a few seconds, once), by whatever C++ compiler is on the path, and
kept in the user's cache under a name that changes with the source, the compiler and the processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import BackendUnavailableError

__all__ = ["load"]

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared", "-pthread")


@functools.cache
def load(name: str, what: str) -> ctypes.CDLL:
    """The compiled library of `name`.cpp, built if it has to be.

    Args:
        name: the file's name without its suffix.
        what: what it is, for messages: "the native decoder".

    Raises:
        BackendUnavailableError: no POSIX system, no compiler, or a file that does not compile or load; with the reason.
    """
    if name in _problems:
        raise BackendUnavailableError(_problems[name])
    try:
        return ctypes.CDLL(str(_build(name, what)))
    except BackendUnavailableError as error:
        # a failed build is not tried again in this process
        _problems[name] = str(error)
        raise
    except OSError as error:
        _problems[name] = f"{what} could not be built or loaded: {error}"
        raise BackendUnavailableError(_problems[name]) from None


_problems: dict[str, str] = {}


def _build(name: str, what: str) -> Path:
    """The path of the compiled file."""
    if os.name != "posix":
        raise BackendUnavailableError(f"{what} needs a POSIX system, and this is {platform.system()}")
    named = os.environ.get("CXX", "")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise BackendUnavailableError(
            f"{what} needs a C++ compiler, and there is no {named or 'c++, g++ or clang++'} on the path"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    source = FOLDER / f"{name}.cpp"
    texts = [path.read_text("utf-8") for path in (source, *sorted(FOLDER.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, version, _processor()]).encode()).hexdigest()
    for folder in _folders():
        target = folder / f"{name}-{key[:24]}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, source, target, what)
        except OSError:
            continue
        return target
    raise BackendUnavailableError(f"{what} could not be built: no folder for it can be written")


def _compile(compiler: str, source: Path, target: Path, what: str) -> None:
    # built beside its place and renamed: two processes may build at once, and one may be killed
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise BackendUnavailableError(f"{compiler} could not compile {what}: {lines[0].strip()}")
        os.replace(made, target)


def _folders() -> list[Path]:
    """Where the compiled file may lie, in the order tried."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return [Path(base) / "fastchargpt", Path(tempfile.gettempdir()) / f"fastchargpt-{os.getuid()}"]


def _processor() -> str:
    """What -march=native looks at: a cache that machines share must not mix their files."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
