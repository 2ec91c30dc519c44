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
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.compiler.code_generator  # keeps references to parts of tl: must not see it patched when first imported
import triton.language as tl
from aot import present
from strict_builder import StrictBuilder
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
from work_counter import WorkCounter

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
BUILDER = StrictBuilder()
SEMANTIC = TritonSemantic(BUILDER)


# -- running kernels


class _Rewriter(interpreter.FunctionRewriter):
    """Makes every assignment in a kernel yield a tensor, as Triton does, and keeps the kernel's own globals live."""

    def _compile_and_exec(self, tree: ast.Module) -> Callable[..., Any]:
        for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
            if not ast.unparse(loop.iter).split("(")[0].endswith("static_range"):  # which is no loop in machine code
                name = ast.Name(id="_count_trips", ctx=ast.Load())
                loop.iter = ast.copy_location(ast.Call(func=name, args=[loop.iter], keywords=[]), loop.iter)
        for branch in (node for node in ast.walk(tree) if isinstance(node, ast.If)):
            name = ast.Name(id="_count_branch", ctx=ast.Load())
            branch.test = ast.copy_location(ast.Call(func=name, args=[branch.test], keywords=[]), branch.test)
        ast.fix_missing_locations(tree)
        self.fn.__globals__["interpreter_semantic"] = SEMANTIC  # the rewritten code adds these names
        self.fn.__globals__["_count_trips"] = _count_trips
        self.fn.__globals__["_count_branch"] = _count_branch
        namespace: dict[str, Any] = {}
        exec(compile(tree, filename=self.filename, mode="exec"), self.fn.__globals__, namespace)
        return namespace[self.fn.__name__]


def _count_trips(iterable: Iterable[Any]) -> Iterable[Any]:
    return BUILDER.counter.count_trips(iterable) if BUILDER.counter else iterable


def _count_branch(condition: Any) -> Any:
    if BUILDER.counter and isinstance(condition, tl.tensor) and condition:
        BUILDER.counter.branch()
    return condition


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
        if BUILDER.counter:
            BUILDER.counter.start_launch(kernel.__name__)
        BUILDER.memory = memory = LaunchMemory(kernel.__name__, named)
        BUILDER.set_grid_dim(*extent)
        function = _python(kernel)
        programs = list(np.ndindex(*extent))
        for number in rng.sample(range(len(programs)), len(programs)):
            memory.program, memory.program_id = number, programs[number]
            if BUILDER.counter:
                BUILDER.counter.start_program()
            BUILDER.set_grid_idx(*programs[number])
            function(**values)
        if BUILDER.counter:
            BUILDER.counter.current.unique_loaded, BUILDER.counter.current.unique_stored = memory.unique_bytes()

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
def strict_interpreter(
    seed: int = 0, *, poison: bool = True, counter: WorkCounter | None = None, target: str | None = None
) -> Iterator[WorkCounter | None]:
    """Interpret, strictly, every Triton kernel launched in this scope.

    Args:
        seed: draws the order in which programs run; every order must give the same result.
        poison: `torch.empty` gives NaN inside the scope.
        counter: counts the work that is done; it is also what `with ... as` gives.
        target: a name in `aot.TARGETS`; kernels that ask which GPU they are on find this one.
    """
    if interpreter.interpreter_builder is BUILDER:
        raise StrictError("strict_interpreter() does not nest")
    scope = interpreter._LangPatchScope()
    with contextlib.ExitStack() as stack:
        stack.callback(scope.restore)
        if target is not None:
            stack.enter_context(present(target))
        if poison:
            stack.enter_context(poisoned_empty())
        stack.enter_context(np.errstate(all="ignore"))  # inf - inf and overflow are ordinary on a GPU
        scope.set_attr(BUILDER, "counter", counter)
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
        yield counter
