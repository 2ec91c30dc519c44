"""Finds the compiled C++ files of this folder: as installed, from an earlier run, or built now (a few seconds, once).

A library serves the very kind of processor that it was compiled for, and its name says so. An installation brings what
its machine could build (setup.py); elsewhere, and after a change of the source, the user's cache does.
"""

import ctypes
import functools
import os
import sys
import tempfile
from pathlib import Path

from ..errors import BackendUnavailableError
from .cpu_compiler import NATIVE, CompilerError, build_library, library_name

__all__ = ["load"]

FOLDER = Path(__file__).parent


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The compiled library of `name`.cpp, built if it has to be.

    Args:
        name: of `NATIVE`.

    Raises:
        BackendUnavailableError: no POSIX system, no compiler, or a file that does not compile or load; with the reason.
    """
    if name in _problems:  # what failed once is not tried again in this process
        raise BackendUnavailableError(_problems[name])
    try:
        return ctypes.CDLL(str(_find(name)))
    except CompilerError as error:
        _problems[name] = str(error)
    except OSError as error:
        _problems[name] = f"{NATIVE[name]} could not be built or loaded: {error}"
    raise BackendUnavailableError(_problems[name])


_problems: dict[str, str] = {}


def _find(name: str) -> Path:
    """The path of the library."""
    source = FOLDER / f"{name}.cpp"
    library = library_name(source)
    for folder in (FOLDER, *_caches()):
        if (folder / library).exists():
            return folder / library
    for folder in _caches():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            build_library(source, folder / library, NATIVE[name])
        except OSError:
            continue
        return folder / library
    raise CompilerError(f"{NATIVE[name]} could not be built: no folder for it can be written")


def _caches() -> list[Path]:
    """Where a library may be kept, in the order tried."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / (
        "Library/Caches" if sys.platform == "darwin" else ".cache"
    )
    return [Path(base) / "fastchargpt", Path(tempfile.gettempdir()) / f"fastchargpt-{os.getuid()}"]
