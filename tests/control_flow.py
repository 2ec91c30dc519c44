"""Loops of machine code, found the way a compiler defines them: by back edges to a block that dominates them.

Looking for backward jumps is not enough: compilers put rarely taken code (waiting for a barrier) behind the end of a
kernel, from where it jumps back without being a loop, and lay out loop bodies in pieces.
"""

from typing import NamedTuple

__all__ = ["Code", "Instruction", "innermost_loops"]


class Instruction(NamedTuple):
    opcode: str
    target: int | None = None  # index that it may branch to
    falls_through: bool = True  # the next instruction may follow it


Code = list[Instruction]

SPIN_LENGTH = 12  # a loop this short with a barrier in it is waiting in place, and part of the code around it


def innermost_loops(code: Code) -> list[list[int]]:
    """The bodies of the loops that hold no other loop, as sorted indices of instructions, in program order."""
    successors = [_successors(code, at) for at in range(len(code))]
    predecessors: list[list[int]] = [[] for _ in code]
    for at, nexts in enumerate(successors):
        for to in nexts:
            predecessors[to].append(at)
    live = _reachable(successors, 0, without=len(code))
    loops: dict[int, set[int]] = {}  # header -> body
    for at in sorted(live):
        header = code[at].target
        if header is not None and header <= at and at not in _reachable(successors, 0, without=header):
            loops.setdefault(header, {header}).update(_reachable(predecessors, at, without=header))
    loops = {header: body for header, body in loops.items() if not _is_spin(code, body)}
    inner = {h: body for h, body in loops.items() if not any(other in body for other in loops if other != h)}
    return [sorted(inner[header]) for header in sorted(inner)]


def _successors(code: Code, at: int) -> list[int]:
    target = code[at].target
    nexts = [] if target is None else [target]
    if code[at].falls_through and at + 1 < len(code):
        nexts.append(at + 1)
    return [to for to in nexts if to < len(code)]


def _reachable(edges: list[list[int]], start: int, without: int) -> set[int]:
    """Everything that can be reached from start along edges without passing `without`."""
    if start == without:
        return set()
    seen, todo = {start}, [start]
    while todo:
        for to in edges[todo.pop()]:
            if to not in seen and to != without:
                seen.add(to)
                todo.append(to)
    return seen


def _is_spin(code: Code, body: set[int]) -> bool:
    return len(body) <= SPIN_LENGTH and any(code[at].opcode.startswith("SYNCS") for at in body)
