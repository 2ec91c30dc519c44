"""The native decoding step for CPUs: cpu_decode.cpp, built on first use.

Where it cannot be built, `library` says why and decoding goes on in torch.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from .cpu_build import load

__all__ = ["ACTIVATIONS", "NativeModel", "library"]

# the numbers of cpu_common.h's enum
ACTIVATIONS = {"gelu": 0, "relu": 1, "relu2": 2, "gelu_tanh": 3}
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built if it has to be.

    Raises:
        BackendUnavailableError: it cannot be built or loaded here; with the reason.
    """
    lib = load("cpu_decode")
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
