"""What the compile gate reads in Triton's IR (TTIR), where the kernel's own names and integer widths still show."""

import re

__all__ = ["loops_with_dots", "narrow_products"]


def loops_with_dots(ttir: str) -> int:
    """How many loops hold a `tt.dot` that no inner loop holds."""
    found = 0
    blocks: list[str | None] = []  # of the enclosing blocks: "loop" until it shows a dot, then "dots"; None for others
    for line in ttir.splitlines():
        text = line.strip()
        if text.startswith("}"):
            found += blocks.pop() == "dots"
        if "= tt.dot " in text:
            inner = next((i for i in reversed(range(len(blocks))) if blocks[i]), None)
            if inner is not None:
                blocks[inner] = "dots"
        if text.endswith("{"):
            blocks.append("loop" if re.search(r"\bscf\.(for|while)\b", text) else None)
    return found


def narrow_products(ttir: str) -> list[str]:
    """The 32-bit products (and sums) of a stride with something that has no small bound, as lines of IR.

    A stride is a kernel argument with `stride` in its name, and whatever is computed from one. Without a small
    bound are program ids, loop variables and the other integer arguments. A row of a tile (`tl.arange`) times a stride
    may stay in 32 bits; a position in the sequence times a stride may not: it wraps past 2^31 elements.
    """
    strides: set[str] = set()
    unbounded: set[str] = set()
    narrow = []
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*?\)+(?=[,) ]|$)", "", line).strip()
        if "tt.func" in text:
            for name in re.findall(r"(%\w+): i\d+", text):
                (strides if "stride" in name else unbounded).add(name)
            continue
        if loop := re.search(r"scf\.for (%\w+) =", text):
            unbounded.add(loop[1])
            unbounded.update(re.findall(r"(%\w+) = %", text.split("iter_args", 1)[-1]))
        match = re.match(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", text)
        if not match:
            continue
        result, operation, rest = match.groups()
        operands = re.findall(r"%\w+", rest)
        from_stride = [name in strides for name in operands]
        from_unbounded = [name in unbounded for name in operands]
        if operation == "tt.get_program_id" or any(from_unbounded):
            unbounded.add(result)
        if any(from_stride) and operation != "tt.addptr":
            strides.add(result)
        if operation in ("arith.muli", "arith.addi") and re.search(r"(: |x)i32>?$", text):
            a, b = operands
            if (a in strides and b in unbounded) or (b in strides and a in unbounded):
                narrow.append(text)
    return narrow
