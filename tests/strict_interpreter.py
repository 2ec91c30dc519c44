"""Triton's CPU interpreter, made strict: test equipment that runs the shipped kernels on CPU tensors.

    with strict_interpreter(seed=0):
        kernel[grid](x, y, n, BLOCK=64)        # the very JITFunction that a GPU would compile

Triton's own switch, TRITON_INTERPRET=1, is read once, when a kernel is decorated and when Triton is imported; a process
then interprets everything or nothing. Here the switch is a scope instead: inside it a launch of a `JITFunction`, and a
call of one from a kernel, is interpreted; outside it the same object compiles. So one pytest run holds tests of both
kinds. Inside, `triton.knobs.runtime.interpret` is true, for code that asks.

What Triton's interpreter gets wrong, and this one does not:

- bf16: arithmetic and `tl.dot` work on values (not on bit patterns) and round to nearest even (not towards zero);
- `tl.dot(input_precision="tf32")` on fp32 drops the low 13 bits of its operands, as tensor cores do; it is the
  default, as on a GPU; and a dot whose K is below 16 is refused, as on a GPU;
- float arguments arrive as fp32.

What it lets pass, and this one refuses:

- loads and stores that no argument owns, and races between programs (strict_memory.py says which);
- two lanes of one store that disagree about one address;
- use of what a masked load without `other=` left undefined: those lanes hold NaN (or the largest integer);
- use of memory that was never written: `torch.empty` gives NaN;
- a result that depends on the order of programs: they run in a random order, by `seed`;
- atomics (no kernel here has any), unknown launch options, tensors that are not on the CPU.
"""

import ast
import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from strict_memory import (
    Guarded,
    LaunchMemory,
    OutOfBoundsError,
    RaceError,
    StrictError,
    poisoned_empty,
    with_margins,
)
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction, TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "Guarded",
    "OutOfBoundsError",
    "RaceError",
    "StrictError",
    "poisoned_empty",
    "strict_interpreter",
    "with_margins",
]

# What a launch may carry besides the kernel's own arguments; a typo among them must not pass.
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "debug"}
LAUNCH_OPTIONS |= {"waves_per_eu", "matrix_instr_nonkdim", "kpack"}  # AMD's
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
        super().create_masked_store(ptrs, value, mask, cache, evict)
        everywhere = np.ones(active.shape, bool)
        left = interpreter._interpreter.load(active, everywhere, np.zeros_like(written), written.dtype)
        if left.tobytes() != written.tobytes():
            raise RaceError(
                f"{self.memory.kernel}: two lanes of one store in program {self.memory.program_id} write different "
                "values to one address"
            )

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


BUILDER = StrictBuilder()
SEMANTIC = TritonSemantic(BUILDER)


# -- running kernels


class _Rewriter(interpreter.FunctionRewriter):
    """Makes every assignment in a kernel yield a tensor, as Triton does, and keeps the kernel's own globals live."""

    def _compile_and_exec(self, tree: ast.Module) -> Callable[..., Any]:
        self.fn.__globals__["interpreter_semantic"] = SEMANTIC  # the one name that the rewritten code adds
        namespace: dict[str, Any] = {}
        exec(compile(tree, filename=self.filename, mode="exec"), self.fn.__globals__, namespace)
        return namespace[self.fn.__name__]


_rewritten: dict[Callable[..., Any], Callable[..., Any]] = {}


def _python(kernel: JITFunction) -> Callable[..., Any]:
    if kernel.fn not in _rewritten:
        _rewritten[kernel.fn] = _Rewriter(kernel.fn).rewrite_ast()
    return _rewritten[kernel.fn]


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in an argument, with the argument's name."""
    if isinstance(value, tuple):
        for item in value:
            yield from _tensors(name, item)
    elif isinstance(value, TensorDescriptor | TensorWrapper):
        yield from _tensors(name, value.base)
    elif isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise StrictError(f"the interpreter runs on CPU tensors; argument {name} is on {value.device}")
        yield name, value


def _as_argument(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return interpreter._implicit_cvt(value)


def _run(rng: random.Random) -> Callable[..., None]:
    """A replacement for `JITFunction.run` that interprets the launch, its programs in an order drawn from `rng`."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        if unknown := options.keys() - LAUNCH_OPTIONS:
            raise StrictError(f"{kernel.__name__}: launch option(s) {sorted(unknown)} are not known to Triton")
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        if warmup:
            return
        grid = grid(bound.arguments) if callable(grid) else grid
        extent = (*(int(n) for n in grid), 1, 1)[:3]
        constexprs = {param.name for param in kernel.params if param.is_constexpr}
        values = {n: v if n in constexprs else _as_argument(v) for n, v in bound.arguments.items()}
        named = [pair for name, value in bound.arguments.items() for pair in _tensors(name, value)]
        BUILDER.memory = memory = LaunchMemory(kernel.__name__, named)
        BUILDER.set_grid_dim(*extent)
        function = _python(kernel)
        programs = list(np.ndindex(*extent))
        for number in rng.sample(range(len(programs)), len(programs)):
            memory.program, memory.program_id = number, programs[number]
            BUILDER.set_grid_idx(*programs[number])
            function(**values)

    return run


def _call(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """A replacement for `JITFunction.__call__`: one kernel calls another."""
    kwargs.pop("_semantic", None)
    return _python(kernel)(*args, **kwargs)


def _jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit` as it is outside the scope: a module first imported inside it must not be interpreted for ever."""
    return JITFunction(fn, **options) if fn is not None else lambda function: JITFunction(function, **options)


def _reject_bf16(reduce: Callable[..., Any]) -> Callable[..., Any]:
    def checked(input: Any, *args: Any, **kwargs: Any) -> Any:
        for tensor in input if isinstance(input, tuple) else (input,):
            if tensor.dtype.is_bf16():
                raise StrictError("a bf16 reduction is not modelled here, and imprecise on a GPU: cast to fp32 first")
        return reduce(input, *args, **kwargs)

    return checked


@contextlib.contextmanager
def strict_interpreter(seed: int = 0, *, poison: bool = True) -> Iterator[None]:
    """Interpret, strictly, every Triton kernel launched in this scope.

    Args:
        seed: draws the order in which programs run; every order must give the same result.
        poison: `torch.empty` gives NaN inside the scope.
    """
    if interpreter.interpreter_builder is BUILDER:
        raise StrictError("strict_interpreter() does not nest")
    scope = interpreter._LangPatchScope()
    with contextlib.ExitStack() as stack:
        stack.callback(scope.restore)
        if poison:
            stack.enter_context(poisoned_empty())
        stack.enter_context(np.errstate(all="ignore"))  # inf - inf and overflow are ordinary on a GPU
        scope.set_attr(interpreter, "interpreter_builder", BUILDER)
        scope.set_attr(interpreter, "interpreter_semantic", SEMANTIC)
        scope.set_attr(JITFunction, "run", _run(random.Random(seed)))
        scope.set_attr(JITFunction, "__call__", _call)
        scope.set_attr(triton, "jit", _jit)
        language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        stack.callback(language.restore)
        for module in (tl, tl.core):
            for name in ("reduce", "associative_scan"):
                language.set_attr(module, name, _reject_bf16(getattr(module, name)))
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        yield
