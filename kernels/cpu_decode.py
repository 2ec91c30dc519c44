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

__all__ = ["ACTIVATIONS", "NativeCache", "NativeModel", "library"]

# the numbers of cpu_common.h's enum
ACTIVATIONS = {"gelu": 0, "relu": 1, "relu2": 2, "gelu_tanh": 3}
# channels or slots side by side, as in cpu_gemm.h
PANEL = 16
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
    lib.fc_step.argtypes = [address, whole, whole, address, address, address, whole, address]
    lib.fc_decode.restype = whole
    lib.fc_decode.argtypes = [address, whole, whole, *[address] * 3, whole, whole, number, whole, address, address]
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
        """Append tokens (M,) to rows (M,) at positions (M,), in any order, and write logits (W, V) float32.

        They are those of the token after each of the last W, at least one; the tokens before only leave their keys and
        values.
        """
        assert 0 < len(logits) <= len(tokens), "native code writes unchecked"
        with self._lock:
            self._attach(cache)
            self._lib.fc_step(
                self._handle,
                int8,
                len(tokens),
                tokens.ctypes.data,
                rows.ctypes.data,
                positions.ctypes.data,
                len(logits),
                logits.data_ptr(),
            )

    def decode(
        self,
        cache: "NativeCache",
        tokens: Ints,
        rows: Ints,
        positions: Ints,
        *,
        vocab_size: int,
        temperature: float,
        top_k: int,
        u: Doubles,
        int8: bool,
    ) -> list[list[int]]:
        """Append a token to each of M rows and draw N more by u (M, N): the rows' tokens, step by step, N x M.

        Fewer steps where logits are not finite: the last one's tokens then reach vocab_size.
        """
        out = np.empty(u.shape[::-1], np.int32)
        with self._lock:
            self._attach(cache)
            count = self._lib.fc_decode(
                self._handle,
                int8,
                len(tokens),
                tokens.ctypes.data,
                rows.ctypes.data,
                positions.ctypes.data,
                u.shape[1],
                vocab_size,
                temperature,
                top_k,
                u.ctypes.data,
                out.ctypes.data,
            )
        drawn: list[list[int]] = out[:count].tolist()
        return drawn

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
                cache.batch_size,
                cache.slots,
                None if table is None else table.data_ptr(),
                0 if table is None else table.shape[1],
            )
            self._attached = cache


class NativeCache:
    """A batch's memory, in the native code's own layout, and the rotary tables (2, positions, D / 2).

    Args:
        n_layer: layers.
        batch_size: sequences.
        kv_heads: key/value heads.
        head_dim: D.
        positions: the longest window.
        spare: tokens that may be written past it before they are judged.
        rope: rotary tables, or None for learned positions, which never reach past the window.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        positions: int,
        spare: int,
        rope: Tensor | None,
    ) -> None:
        # the two ends of a window that wraps around must not meet in one block of PANEL slots
        slots = positions if rope is None else positions + max(spare, PANEL - 1)
        self.batch_size, self.slots = batch_size, -(-slots // PANEL) * PANEL
        padded = -(-head_dim // PANEL) * PANEL
        # zeros, which the padding stays
        self.kv = torch.zeros(n_layer * batch_size * kv_heads * self.slots * (head_dim + padded))
        self.rope = rope
