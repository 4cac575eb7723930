"""Finds how often a loop of a compiled program runs.

Compilers for CPUs and GPUs write the number beside the loop. On a TPU it follows from the program:
where the loop's counter begins, by how much a round moves it, and what the condition compares it
with.
"""

import math
import re
from typing import NamedTuple

from moe.scaling.programs.text import Instruction, ProgramText, UnreadableProgram

# Instructions whose value is that of their first operand.
_SAME = {
    "bitcast",
    "broadcast",
    "convert",
    "copy",
    "copy-done",
    "copy-start",
    "opt-barrier",
    "reshape",
}
_MIRROR = str.maketrans("LG", "GL")  # a < b is b > a


class _Number(NamedTuple):
    """Holds an integer, added to an element of the loop's state unless `element` is None."""

    element: int | None
    offset: int


# Stands for the tuple that the rounds of a loop pass on. None stands for what is not known.
_STATE = "state"
_Value = _Number | str | None


def count_iterations(program: ProgramText, computation: str, loop: Instruction) -> int:
    """Returns how often a loop of `computation` runs. Raises UnreadableProgram if it is unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = _Scope(program, loop.computation("condition"), (_STATE,))
    comparison = condition.comparison(condition.root)
    if comparison is None:
        raise UnreadableProgram(loop, "its condition does not compare a counter with a number")
    direction, counter, bound = comparison
    before = _Scope(program, computation, ())
    body = _Scope(program, loop.computation("body"), (_STATE,))
    first = _first_value(before, loop, counter)
    last = _first_value(before, loop, bound)
    moved = body.element(body.root, counter.element or 0)
    is_bound_fixed = bound.element is None or (
        body.element(body.root, bound.element) == _Number(bound.element, 0)
    )
    if (
        first is None
        or last is None
        or not is_bound_fixed
        or not isinstance(moved, _Number)
        or moved.element != counter.element
    ):
        raise UnreadableProgram(loop, "where its counter begins, moves or ends cannot be told")
    rounds = _count_rounds(direction, last - first, moved.offset)
    if rounds is None:
        raise UnreadableProgram(loop, f"a counter that moves by {moved.offset} never ends it")
    return rounds


def _count_rounds(direction: str, distance: int, step: int) -> int | None:
    """Returns how often a counter moves until its comparison fails, or None if it never does."""
    if direction in ("GT", "GE"):
        direction, distance, step = direction.replace("G", "L"), -distance, -step
    if direction == "LE":
        direction, distance = "LT", distance + 1
    if direction == "LT" and step > 0:
        return max(0, math.ceil(distance / step))
    if direction == "NE" and step and distance % step == 0 and distance // step >= 0:
        return distance // step
    return None


def _first_value(before: "_Scope", loop: Instruction, number: _Number) -> int | None:
    """Returns the value of a number in a loop's first round, or None if it is not known."""
    if number.element is None:
        return number.offset
    begin = before.element(loop.operands[0], number.element)
    if not isinstance(begin, _Number) or begin.element is not None:
        return None
    return begin.offset + number.offset


class _Scope:
    """Computes values of a computation whose parameters have the given values."""

    def __init__(self, program: ProgramText, computation: str, arguments: tuple[_Value, ...]):
        self._program = program
        self._computation = program.computations[computation]
        self._arguments = arguments

    @property
    def root(self) -> str:
        """Returns the name of the instruction whose value the computation returns."""
        return next(name for name, instruction in self._computation.items() if instruction.is_root)

    def value(self, name: str) -> _Value:
        """Returns what is known of an instruction's value."""
        instruction = self._computation[name]
        match instruction.opcode:
            case "parameter":
                index = int(instruction.literal)
                return self._arguments[index] if index < len(self._arguments) else None
            case "constant":
                whole = re.fullmatch(r"-?\d+", instruction.literal)
                return _Number(None, int(whole[0])) if whole else None
            case "get-tuple-element":
                return self.element(instruction.operands[0], _tuple_index(instruction))
            case "add" | "subtract":
                return self._sum(instruction)
            case "fusion" | "call":
                called = self._called(instruction)
                return called.value(called.root)
        return self.value(instruction.operands[0]) if instruction.opcode in _SAME else None

    def element(self, name: str, index: int) -> _Value:
        """Returns what is known of one element of an instruction's tuple."""
        instruction = self._computation[name]
        if instruction.opcode == "tuple":
            return self.value(instruction.operands[index])
        if instruction.opcode in ("fusion", "call"):
            called = self._called(instruction)
            return called.element(called.root, index)
        if instruction.opcode in _SAME:
            return self.element(instruction.operands[0], index)
        return _Number(index, 0) if self.value(name) == _STATE else None

    def comparison(self, name: str) -> tuple[str, _Number, _Number] | None:
        """Returns direction, counter and bound of a comparison, or None if it is none of numbers.

        The counter is the side that is an element of the loop's state.
        """
        instruction = self._computation[name]
        if instruction.opcode in ("fusion", "call"):
            called = self._called(instruction)
            return called.comparison(called.root)
        if instruction.opcode != "compare":
            return self.comparison(instruction.operands[0]) if instruction.opcode in _SAME else None
        direction = (instruction.attribute("direction") or "")[:2]
        left, right = (self.value(operand) for operand in instruction.operands)
        if not isinstance(left, _Number) or not isinstance(right, _Number):
            return None
        if left.element is None:
            direction, left, right = direction.translate(_MIRROR), right, left
        return (direction, left, right) if left.element is not None else None

    def _sum(self, instruction: Instruction) -> _Value:
        left, right = (self.value(operand) for operand in instruction.operands)
        if not isinstance(left, _Number) or not isinstance(right, _Number):
            return None
        if instruction.opcode == "subtract":
            if right.element is not None:
                return None
            return _Number(left.element, left.offset - right.offset)
        if left.element is not None and right.element is not None:
            return None
        element = right.element if left.element is None else left.element
        return _Number(element, left.offset + right.offset)

    def _called(self, instruction: Instruction) -> "_Scope":
        """Returns the scope of what a fusion or a call runs."""
        arguments = tuple(self.value(operand) for operand in instruction.operands)
        return _Scope(self._program, instruction.called[0], arguments)


def _tuple_index(instruction: Instruction) -> int:
    return int((instruction.attribute("index") or "").split(",")[0])
