"""The native decoding step for CPUs: builds cpu_decode.cpp on first use and calls it.

The C++ file is compiled for the very machine it runs on (a few seconds, once), by whatever C++ compiler is on the path,
and kept in the user's cache under a name that changes with the source, the compiler and the processor. Where that
cannot be done, `library` says why and decoding goes on in torch.
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
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BackendUnavailableError

__all__ = ["ACTIVATIONS", "NativeModel", "library"]

SOURCE = Path(__file__).with_name("cpu_decode.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
# the numbers of cpu_decode.cpp's enum
ACTIVATIONS = {"gelu": 0, "relu": 1, "relu2": 2, "gelu_tanh": 3}
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built if it has to be.

    Raises:
        BackendUnavailableError: no POSIX system, no compiler, or a file that does not compile or load; with the reason.
    """
    if problem := _problem:
        raise BackendUnavailableError(problem[0])
    try:
        return _declare(ctypes.CDLL(str(_build())))
    except BackendUnavailableError as error:
        # a failed build is not tried again in this process
        _problem.append(str(error))
        raise
    except OSError as error:
        _problem.append(f"the native decoder could not be built or loaded: {error}")
        raise BackendUnavailableError(_problem[0]) from None


_problem: list[str] = []


def _build() -> Path:
    """The path of the compiled file."""
    if os.name != "posix":
        raise BackendUnavailableError(f"the native decoder needs a POSIX system, and this is {platform.system()}")
    named = os.environ.get("CXX", "")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise BackendUnavailableError(
            f"the native decoder needs a C++ compiler, and there is no {named or 'c++, g++ or clang++'} on the path"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text("utf-8"), *FLAGS, version, _processor()]).encode()).hexdigest()
    for folder in _folders():
        target = folder / f"cpu_decode-{key[:24]}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, target)
        except OSError:
            continue
        return target
    raise BackendUnavailableError("the native decoder could not be built: no folder for it can be written")


def _compile(compiler: str, target: Path) -> None:
    # built beside its place and renamed: two processes may build at once, and one may be killed
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise BackendUnavailableError(f"{compiler} could not compile the native decoder: {lines[0].strip()}")
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


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    address, whole, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    lib.fc_new.restype = address
    lib.fc_new.argtypes = [address, number, address]
    lib.fc_free.restype = None
    lib.fc_free.argtypes = [address]
    lib.fc_attach.restype = None
    lib.fc_attach.argtypes = [address, address, ctypes.c_int64, ctypes.c_int64, address, ctypes.c_int64]
    lib.fc_step.restype = None
    lib.fc_step.argtypes = [address, whole, whole, address, address, address, address]
    lib.fc_draw.restype = None
    lib.fc_draw.argtypes = [address, whole, address, whole, number, whole, address, address]
    lib.fc_speculate.restype = whole
    lib.fc_speculate.argtypes = [address, *[whole] * 5, number, whole, address, address]
    return lib


class NativeModel:
    """A model's weights, packed for the native step.

    Args:
        ints: n_layer, n_embd, n_head, kv heads, head_dim, block_size, vocab_size, whether RMSNorm, the activation's
            number, whether QK-norm, whether RoPE, threads, whether to keep fp32 weights, whether to keep int8 weights.
        softcap: bound of the logits; 0 for none.
        weights: float32 tensors on the CPU, None where the model has none: wte, wpe; weight and bias of each layer's
            ln_1, c_attn, c_proj, ln_2, c_fc, c_proj, of ln_f and of lm_head. They are copied.

    Raises:
        BackendUnavailableError: the library cannot be had, or there is no memory for the copy.
    """

    def __init__(self, ints: Sequence[int], softcap: float, weights: Sequence[Tensor | None]) -> None:
        self._lib = library()
        self.vocab_size = ints[6]
        kept = [None if w is None else w.detach().to("cpu", torch.float32).contiguous() for w in weights]
        pointers = (ctypes.c_void_p * len(kept))(*[None if w is None else w.data_ptr() for w in kept])
        shape = (ctypes.c_int64 * len(ints))(*ints)
        self._handle = self._lib.fc_new(shape, softcap, pointers)
        if not self._handle:
            raise BackendUnavailableError("there is no memory for the native decoder's copy of the weights")
        self._attached: object = None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.fc_free(self._handle)

    def step(
        self, cache: "NativeCache", tokens: Ints, rows: Ints, positions: Ints, logits: Tensor, *, int8: bool
    ) -> None:
        """Append tokens (M,) to rows (M,) at positions (M,) and write logits (M, V) float32 of the token after each."""
        with self._lock:
            self._attach(cache)
            self._lib.fc_step(
                self._handle,
                int8,
                len(tokens),
                tokens.ctypes.data,
                rows.ctypes.data,
                positions.ctypes.data,
                logits.data_ptr(),
            )

    def draw(self, logits: Tensor, vocab_size: int, temperature: float, top_k: int, u: Doubles) -> list[int]:
        """Draw a token from each row of logits (M, V), over the first vocab_size; top_k 0 keeps all."""
        out = np.empty(len(u), np.int32)
        with self._lock:
            self._lib.fc_draw(
                self._handle, len(u), logits.data_ptr(), vocab_size, temperature, top_k, u.ctypes.data, out.ctypes.data
            )
        tokens: list[int] = out.tolist()
        return tokens

    def speculate(
        self,
        cache: "NativeCache",
        *,
        row: int,
        position: int,
        token: int,
        vocab_size: int,
        temperature: float,
        top_k: int,
        u: Doubles,
    ) -> list[int]:
        """Append a token and draw 1 to len(u) more, the nth by u[n]: what fp32 alone would draw, in fewer passes."""
        out = np.empty(len(u), np.int32)
        with self._lock:
            self._attach(cache)
            count = self._lib.fc_speculate(
                self._handle,
                row,
                position,
                token,
                len(u) - 1,
                vocab_size,
                temperature,
                top_k,
                u.ctypes.data,
                out.ctypes.data,
            )
        tokens: list[int] = out[:count].tolist()
        return tokens

    def _attach(self, cache: "NativeCache") -> None:
        if self._attached is not cache:
            table = cache.rope
            self._lib.fc_attach(
                self._handle,
                cache.kv.data_ptr(),
                cache.kv.shape[2],
                cache.kv.shape[4],
                None if table is None else table.data_ptr(),
                0 if table is None else table.shape[1],
            )
            self._attached = cache


class NativeCache:
    """A batch's memory: keys and values (layers, 2, B, kv heads, slots, D), rotary tables (2, positions, D / 2)."""

    def __init__(self, kv: Tensor, rope: Tensor | None) -> None:
        self.kv, self.rope = kv, rope
