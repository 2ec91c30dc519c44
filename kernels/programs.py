"""Where a program is among those of its launch, and how one launch begins while the one before it ends.

What the host has to say to it is in launch.py: `inverse`, `heads_together`, `overlapping`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq
from triton.runtime.jit import constexpr_function

__all__ = ["await_last", "begin_next", "compiled_for", "divided", "located"]

# Assembly for what Triton has no word for; it has to give something, and gives 0. Source: PTX ISA, "griddepcontrol".
BEGIN_NEXT = tl.constexpr("griddepcontrol.launch_dependents; mov.b32 $0, 0;")
AWAIT_LAST = tl.constexpr("griddepcontrol.wait; mov.b32 $0, 0;")


@constexpr_function
def compiled_for(capability, below=None):
    """Whether this becomes machine code for an NVIDIA GPU of at least this compute capability, and less than another.

    With TRITON_INTERPRET set it does not, although a GPU may be there: `triton.jit` then makes no JITFunction.
    """
    compiled = isinstance(divided, triton.JITFunction) and cuda_capability_geq(capability)
    return compiled and not (below is not None and cuda_capability_geq(below))


@triton.jit
def divided(number, by, inverse):
    """The quotient and the rest of a number from 0 to 2^31 - 1, int32; `inverse` is `launch.inverse(by)`.

    On Hopper by a product: divided by a number that the compiler does not know, a program's place would take some 600
    cycles, in which nothing can be loaded. On sm_120 and before it such a place is no longer uniform to the compiler,
    and the loops spill.
    """
    if compiled_for(9, below=10):
        magic = (inverse >> 6).to(tl.uint32).to(tl.uint64)
        quotient = (number.to(tl.uint32).to(tl.uint64) * magic >> (inverse & 63)).to(tl.int32)
    else:
        quotient = number // by
    return quotient, number - quotient * by


@triton.jit
def located(together, together_inverse, heads, heads_inverse):
    """Where a program is: its block, the batch, the head, and the head counted over all batches.

    `together` heads are begun together (`launch.heads_together`), first the first blocks of them.
    """
    block, member = divided(tl.program_id(0), together, together_inverse)
    batch_head = tl.program_id(1) * together + member
    batch, head = divided(batch_head, heads, heads_inverse)
    return block, batch, head, batch_head


@triton.jit
def begin_next():
    """Let the next launch begin while this one ends, if it is one that may (`launch.overlapping`)."""
    if compiled_for(9):
        tl.inline_asm_elementwise(BEGIN_NEXT, "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def await_last():
    """Wait for the launch before this one, where this one may begin while that one ends."""
    if compiled_for(9):
        tl.inline_asm_elementwise(AWAIT_LAST, "=r", [], tl.int32, is_pure=False, pack=1)
