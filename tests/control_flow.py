"""Loops of machine code, found the way a compiler defines them: by back edges to a block that dominates them.

Looking for backward jumps is not enough: compilers put rarely taken code (waiting for a barrier) behind the end of a
kernel, from where it jumps back without being a loop, and lay out loop bodies in pieces, the last one before the first
if that spares a jump.
"""

from collections import deque
from collections.abc import Container
from typing import NamedTuple

__all__ = ["Code", "Instruction", "Loop", "innermost_loops", "shortest_round"]


class Instruction(NamedTuple):
    opcode: str
    target: int | None = None  # index that it may branch to
    falls_through: bool = True  # the next instruction may follow it


Code = list[Instruction]


class Loop(NamedTuple):
    """A loop, by indices of instructions."""

    header: int  # the first, through which every round goes
    body: list[int]  # sorted


SPIN_LENGTH = 12  # a loop this short with a barrier in it is waiting in place, and part of the code around it


def innermost_loops(code: Code) -> list[Loop]:
    """The loops that hold no other loop, in program order."""
    successors = [_successors(code, at) for at in range(len(code))]
    predecessors: list[list[int]] = [[] for _ in code]
    for at, nexts in enumerate(successors):
        for to in nexts:
            predecessors[to].append(at)
    live = _reachable(successors, 0, without=len(code))
    loops: dict[int, set[int]] = {}  # header -> body
    for header in {code[at].target for at in live} - {None}:
        before = _reachable(successors, 0, without=header)
        for at in predecessors[header]:
            if at in live and at not in before:
                loops.setdefault(header, {header}).update(_reachable(predecessors, at, without=header))
    loops = {header: body for header, body in loops.items() if not _is_spin(code, body)}
    inner = {h: body for h, body in loops.items() if not any(other in body for other in loops if other != h)}
    return [Loop(header, sorted(inner[header])) for header in sorted(inner)]


def shortest_round(code: Code, loop: Loop, needed: Container[int] = ()) -> list[int]:
    """The instructions of the shortest way once around a loop that leaves out none of those needed.

    The others are those that a branch in the loop may skip. What only one thread does (on sm_100 it asks for the
    products) stands behind a branch too, and is needed.
    """
    inside, came_from, todo = set(loop.body), {loop.header: loop.header}, deque([loop.header])
    onward = [[to for to in _successors(code, at) if to in inside and to != loop.header] for at in range(len(code))]
    while True:  # breadth first, so the first to come back came the shortest way
        at = todo.popleft()
        nexts = [to for to in _successors(code, at) if to in inside]
        if len(nexts) == 2:
            nexts = _ways(onward, nexts, needed)
        if loop.header in nexts:
            break
        for to in nexts:
            if to not in came_from:
                came_from[to] = at
                todo.append(to)
    round_ = [at]
    while at != loop.header:
        at = came_from[at]
        round_.append(at)
    return sorted(round_)


def _ways(onward: list[list[int]], nexts: list[int], needed: Container[int]) -> list[int]:
    """Of two ways on from a branch those that leave out nothing needed; `onward` are the edges of one round."""
    ahead = [_reachable(onward, to, without=len(onward)) for to in nexts]
    alone = (ahead[0] - ahead[1], ahead[1] - ahead[0])
    kept = [to for to, steps in zip(nexts, alone, strict=True) if any(step in needed for step in steps)]
    return kept or nexts


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
