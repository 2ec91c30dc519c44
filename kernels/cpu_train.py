"""The native training step for CPUs: cpu_train.cpp, built on first use; the loss of a batch and its gradients."""

import ctypes
import functools
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .cpu_build import load

__all__ = ["WIDTH", "NativeTrainer", "Rules", "Update", "library"]

# channels that stand side by side in memory: widths of the model and of its heads are multiples of it
WIDTH = 16
Doubles = npt.NDArray[np.float64]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, built if it has to be.

    Raises:
        BackendUnavailableError: it cannot be built or loaded here; with the reason.
    """
    lib = load("cpu_train")
    address, whole, long, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    lib.ft_new.restype = address
    lib.ft_new.argtypes = [address, number]
    lib.ft_free.restype = None
    lib.ft_free.argtypes = [address]
    lib.ft_bytes.restype = long
    lib.ft_bytes.argtypes = [address]
    lib.ft_update.restype = whole
    lib.ft_update.argtypes = [address, whole, address, address, address]
    lib.ft_run.restype = whole
    lib.ft_run.argtypes = [address, whole, whole, *[address] * 5, long, address, number, whole, address]
    return lib


class Update(ctypes.Structure):
    """One tensor of cpu_optim.h's Update: addresses of weight, gradient and state, shape, and its own figures."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "first", "second")),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        *((name, ctypes.c_double) for name in ("rate", "decay", "scale")),
    )


class Rules(ctypes.Structure):
    """What is common to all tensors: cpu_optim.h's Rules."""

    _fields_ = tuple(
        (name, ctypes.c_double) for name in ("clip", "beta1", "beta2", "eps", "correction1", "correction2", "momentum")
    )


class NativeTrainer:
    """Forward and backward pass of one model.

    Args:
        ints: n_layer, n_embd, n_head, kv heads, head_dim, vocab_size, whether RMSNorm, the activation's number, whether
            QK-norm, whether RoPE, threads, rows of the position table (0 without one), dropout's threshold
            (`philox.dropout_threshold`), whether the embeddings are dropped out.
        softcap: bound of the logits; 0 for none.

    Raises:
        BackendUnavailableError: the library cannot be had.
    """

    def __init__(self, ints: Sequence[int], softcap: float) -> None:
        self._lib = library()
        self.vocab_size = ints[5]
        self._handle = self._lib.ft_new((ctypes.c_int64 * len(ints))(*ints), softcap)
        if not self._handle:
            raise MemoryError("there is no memory for the native training step's copy of the weights")
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.ft_free(self._handle)

    @property
    def held_bytes(self) -> int:
        """Bytes held between calls: activations of the shape last seen, and packed weights."""
        return int(self._lib.ft_bytes(self._handle))

    def run(
        self,
        x: Tensor,
        y: Tensor,
        weights: Sequence[Tensor | None],
        grads: Sequence[Tensor | None] | None,
        rope: Tensor | None,
        *,
        seeds: Tensor | None = None,
        scale: float = 1.0,
        add: bool = False,
    ) -> float:
        """The mean loss of a batch, in nats per token, and its gradients.

        Args:
            x: token ids, (B, T) int64.
            y: the tokens that follow, (B, T) int64; -1 marks a position that does not count.
            weights: contiguous float32 tensors on the CPU, None where the model has none: wte, wpe; weight and bias of
                each layer's ln_1, c_attn, c_proj, ln_2, c_fc, c_proj, of ln_f and of lm_head.
            grads: contiguous float32 tensors shaped as the weights; None computes the loss alone.
            rope: tables of RoPE, (2, T or more, D / 2) float32 contiguous; None without it.
            seeds: dropout's, (3 n_layer + 1,) int64: of the embeddings, then of each layer's attention weights,
                attention output and MLP output, each as in `philox.keep_mask`; None drops nothing.
            scale: of the gradients.
            add: add to the gradients that are there, instead of writing them.

        Raises:
            IndexError: a token is not in the vocabulary.
            MemoryError: there is no room for the batch's activations.
        """
        x, y = x.contiguous(), y.contiguous()
        loss = ctypes.c_double()
        with self._lock:
            status = self._lib.ft_run(
                self._handle,
                *x.shape,
                x.data_ptr(),
                y.data_ptr(),
                _addresses(weights),
                None if grads is None else _addresses(grads),
                None if rope is None else rope.data_ptr(),
                0 if rope is None else rope.shape[1],
                None if seeds is None else seeds.data_ptr(),
                scale,
                add,
                ctypes.byref(loss),
            )
        if status == 1:
            raise MemoryError(f"there is no memory for the activations of {x.shape[0]} x {x.shape[1]} tokens")
        if status == 2:
            raise IndexError(f"a token is outside the model's vocabulary of {self.vocab_size}")
        return loss.value

    def update(self, updates: ctypes.Array[Update], rules: Rules) -> Doubles:
        """Clip the gradients by their common norm and update every tensor; the norm of each gradient before that.

        Raises:
            MemoryError: there is no room for Muon's scratch.
        """
        norms = np.empty(len(updates))
        with self._lock:
            status = self._lib.ft_update(self._handle, len(updates), updates, ctypes.byref(rules), norms.ctypes.data)
        if status:
            raise MemoryError("there is no memory for the optimiser's scratch")
        return norms


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[None if each is None else each.data_ptr() for each in tensors])
