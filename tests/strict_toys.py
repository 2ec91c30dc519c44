"""Toy kernels that the strict interpreter is judged on: clean ones first, then one per bug, and a launch of them."""

import triton
import triton.language as tl
from strict_interpreter import strict_interpreter
from triton.language.target_info import cuda_capability_geq

from fastchargpt.kernels.tiles import PREFETCH

__all__ = [
    "assembly_kernel",
    "atomic_kernel",
    "bf16_arithmetic_kernel",
    "bf16_sum_kernel",
    "copy_rows_kernel",
    "dot_kernel",
    "lanes_race_kernel",
    "launch",
    "load_before_start_kernel",
    "missing_other_copy_kernel",
    "missing_other_kernel",
    "neighbour_kernel",
    "order_kernel",
    "partial_write_kernel",
    "prefetch_kernel",
    "race_kernel",
    "scale_kernel",
    "softmax_kernel",
    "store_out_of_bounds_kernel",
    "which_gpu_kernel",
]


@triton.jit
def helper_double(x):
    return x * 2.0


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, helper_double(x) * factor, mask=offs < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * N + rows[None, :])
    tl.store(c_ptr + rows[:, None] * N + rows[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x - tl.max(x, 0)) * 1.4426950408889634)
    y = p / tl.sum(p, 0)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def bf16_arithmetic_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(z_ptr + offs, tl.where(x < y, x * y + x, -tl.abs(x - y)))


@triton.jit
def which_gpu_kernel(y_ptr):
    if cuda_capability_geq(9):
        tl.store(y_ptr, 90)
    else:
        tl.store(y_ptr, 0)


@triton.jit
def bf16_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def store_out_of_bounds_kernel(y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, offs * 0.0)


@triton.jit
def load_before_start_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs - 1))


@triton.jit
def copy_rows_kernel(x_ptr, y_ptr, stride_x, stride_y, WIDTH: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, WIDTH)
    tl.store(y_ptr + row * stride_y + offs, tl.load(x_ptr + row * stride_x + offs))


@triton.jit
def missing_other_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n), 0))


@triton.jit
def missing_other_copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n))


@triton.jit
def race_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def lanes_race_kernel(y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, offs.to(tl.float32))


@triton.jit
def neighbour_kernel(y_ptr, n):
    """Program i reads what program i - 1 wrote: right only in the order 0, 1, 2, ..."""
    i = tl.program_id(0)
    before = tl.load(y_ptr + i - 1, mask=i > 0, other=0.0)
    tl.store(y_ptr + i, before + 1.0)


@triton.jit
def atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def order_kernel(clock_ptr):
    tl.device_print("program", tl.program_id(0))


@triton.jit
def prefetch_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    flags = (offs < n).to(tl.int32)
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [x_ptr + offs, flags], tl.int32, is_pure=False, pack=1)


@triton.jit
def assembly_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    doubled = tl.inline_asm_elementwise("shl.b32 $0, $1, 1;", "=r,r", [offs], tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + offs, doubled)


@triton.jit
def partial_write_kernel(y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, offs * 1.0, mask=offs < n - 1)


def launch(kernel, grid, *args, seed=0, **kwargs):
    with strict_interpreter(seed):
        kernel[grid](*args, **kwargs)
