"""The operations of Triton's CPU interpreter with their arithmetic mended and their memory accesses checked.

strict_interpreter.py says what is mended and what is refused, and puts this in place.
"""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from strict_memory import LaunchMemory, RaceError, StrictError
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from work_counter import WorkCounter

__all__ = ["StrictBuilder"]

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def bf16_values(handle: TensorHandle) -> np.ndarray:
    """The fp32 values of a bf16 handle (which holds bit patterns as uint16); other data unchanged."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the bf16 numbers nearest to fp32 values, ties to even, NaN kept NaN."""
    values = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest.astype(np.uint16))


def tf32(values: np.ndarray) -> np.ndarray:
    """fp32 values as a tensor core reads them in tf32: the low 13 bits of the mantissa are not there."""
    values = np.ascontiguousarray(values).reshape(values.shape)
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


class StrictBuilder(interpreter.InterpreterBuilder):
    """The interpreter's operations with their arithmetic mended and their memory accesses checked."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: LaunchMemory | None = None  # of the launch that is running
        self.counter: WorkCounter | None = None
        self.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 16)

    # -- bf16 and tf32 arithmetic

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(bf16_bits(np.array([value], np.float32)), tl.bfloat16)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if lhs.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return super().binary_op(lhs, rhs, op)
        result = op(bf16_values(lhs), bf16_values(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(bf16_bits(result), tl.bfloat16)

    def unary_op(self, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if self.counter and op in (np.exp, np.exp2):
            self.counter.current.exponentials += arg.data.size
        if arg.dtype.scalar != tl.bfloat16:
            return super().unary_op(arg, op)
        return TensorHandle(bf16_bits(op(bf16_values(arg))), tl.bfloat16)

    def create_clampf(
        self, arg: TensorHandle, low: TensorHandle, high: TensorHandle, propagate_nans: Any
    ) -> TensorHandle:
        if arg.dtype.scalar != tl.bfloat16:
            return super().ternary_op(arg, low, high, np.clip)
        return TensorHandle(bf16_bits(np.clip(*map(bf16_values, (arg, low, high)))), tl.bfloat16)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar != tl.bfloat16:
            return super().create_fma(x, y, z)
        return TensorHandle(bf16_bits(bf16_values(x) * bf16_values(y) + bf16_values(z)), tl.bfloat16)

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if src.dtype.scalar == tl.bfloat16:
            src = TensorHandle(bf16_values(src), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(bf16_bits(src.data.astype(np.float32)), tl.bfloat16)
        return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        if 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: Any, imprecise: int
    ) -> TensorHandle:
        if self.counter:
            self.counter.product(a.data.shape[-2], b.data.shape[-1], a.data.shape[-1])
        name = str(precision).rsplit(".", 1)[-1].lower()
        x, y = bf16_values(a), bf16_values(b)
        if a.dtype.scalar == tl.float32 and name.startswith("tf32"):
            big_x, big_y = tf32(x), tf32(y)
            product = np.matmul(big_x, big_y)
            if name == "tf32x3":  # the rest of each operand, itself in tf32, against the large part of the other
                product += np.matmul(tf32(x - big_x), big_y) + np.matmul(big_x, tf32(y - big_y))
        else:
            product = np.matmul(x, y, dtype=acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    # -- memory

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, cache: Any, evict: Any, volatile: Any
    ) -> TensorHandle:
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        self.memory.load(active.ravel(), dtype.itemsize)
        if self.counter:
            self.counter.current.loaded += active.size * dtype.itemsize
        if other is None and active.size < ptrs.data.size:
            other = TensorHandle(np.full(ptrs.data.shape, _poison(element, dtype), dtype), element)
        return super().create_masked_load(ptrs, mask, other, cache, evict, volatile)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, cache: Any, evict: Any
    ) -> None:
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        active = np.ascontiguousarray(ptrs.data[lanes])
        written = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape)[lanes])
        self.memory.store(active, written.dtype.itemsize)
        if self.counter:
            self.counter.current.stored += active.size * written.dtype.itemsize
        super().create_masked_store(ptrs, value, mask, cache, evict)
        everywhere = np.ones(active.shape, bool)
        left = interpreter._interpreter.load(active, everywhere, np.zeros_like(written), written.dtype)
        if left.tobytes() != written.tobytes():
            raise RaceError(
                f"{self.memory.kernel}: two lanes of one store in program {self.memory.program_id} write different "
                "values to one address"
            )

    def create_inline_asm(
        self, asm: str, _constraints: str, values: list[TensorHandle], _types: Any, _is_pure: bool, _pack: int
    ) -> Any:
        """What the kernels have of it, none of which changes a number: a prefetch, and signals between launches.

        What is prefetched has to be there. Launches follow each other here, so there is nothing to wait for.
        """
        shape: tuple[int, ...] = (1,)
        if "prefetch.global.L2 [$1]" in asm:
            ptrs, flags = values
            self.memory.prefetch(ptrs.data[flags.data != 0].ravel(), ptrs.get_element_ty().primitive_bitwidth // 8)
            shape = ptrs.data.shape
        elif not asm.startswith("griddepcontrol."):
            raise StrictError(f"{self.memory.kernel}: this assembly is not modelled here: {asm}")
        nothing = TensorHandle(np.zeros(shape, np.int32), tl.int32)
        return types.SimpleNamespace(get_result=lambda _: nothing)

    def create_atomic_rmw(self, *args: Any) -> None:
        raise StrictError(f"{self.memory.kernel}: atomics make results differ from run to run; none is allowed here")

    create_atomic_cas = create_atomic_rmw


def _poison(element: tl.dtype, dtype: np.dtype) -> float | int | bool:
    """A value that nobody can use and get away with it."""
    if element == tl.bfloat16:
        return 0x7FC0
    if dtype.kind == "f":
        return float("nan")
    return True if dtype.kind == "b" else int(np.iinfo(dtype).max)
