"""Loop trips, branches, products, bytes and exponentials are counted as a reader of the kernel would count them."""

import torch
import triton
import triton.language as tl
from strict_interpreter import strict_interpreter
from work_counter import WorkCounter


@triton.jit
def triangle_kernel(x_ptr, y_ptr, n_blocks, BLOCK: tl.constexpr):
    """Program i: i full products in one loop, two rounds of one in a nested loop, one after them."""
    i = tl.program_id(0)
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(i):
        acc = tl.dot(tl.load(x_ptr + offs), tl.load(x_ptr + offs), acc)
    for _ in tl.range(2):
        for _ in range(1):
            acc = tl.dot(acc, acc)
        for j in tl.static_range(3):
            acc = tl.exp2(acc * j)
    tl.store(y_ptr + i * BLOCK * BLOCK + offs, tl.dot(acc, acc))


def test_the_counter_counts_trips_products_bytes_and_exponentials():
    x, y = torch.zeros(16, 16), torch.empty(4, 16, 16)
    with strict_interpreter(counter=WorkCounter()) as counter:
        triangle_kernel[(4,)](x, y, 4, BLOCK=16)
    (work,) = counter.launches
    assert (work.kernel, work.programs) == ("triangle_kernel", 4)
    assert work.products == {(16, 16, 16): 0 + 1 + 2 + 3 + 4 * 3}
    assert work.multiply_adds == 18 * 16**3
    assert (work.loaded, work.stored) == (6 * 2 * 1024, 4 * 1024)
    assert (work.unique_loaded, work.unique_stored) == (1024, 4 * 1024)
    assert work.exponentials == 4 * 2 * 3 * 256
    assert [(loop.trips, loop.products) for loop in work.loops] == [(6, 6), (4, 4), (4, 4)]


@triton.jit
def branching_kernel(x_ptr, y_ptr, first, ALWAYS: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: five rounds, of which those from `first` + i on do more; ALWAYS is no branch once it is compiled."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(5):
        if ALWAYS:
            total += tl.load(x_ptr + offs)
        if n >= first + tl.program_id(0):
            total += 1.0
    if first > 0:
        total += 1.0
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, total)


def test_the_counter_counts_the_branches_that_a_program_takes_in_a_loop():
    x, y = torch.ones(16), torch.empty(2, 16)
    with strict_interpreter(counter=WorkCounter()) as counter:
        branching_kernel[(2,)](x, y, 2, ALWAYS=True, BLOCK=16)
    assert [row.tolist() for row in y] == [[5.0 + 3 + 1] * 16, [5.0 + 2 + 1] * 16]
    (loop,) = counter.launches[0].loops
    assert (loop.trips, loop.branches) == (10, 3 + 2)
