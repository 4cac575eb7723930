"""Takes a compiled program's text apart into computations and their instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_CALLS = re.compile(r"\b(calls|to_apply|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


class UnreadableProgram(ValueError):
    """Says which instruction of a program could not be read, and why."""

    def __init__(self, instruction: "Instruction", problem: str):
        super().__init__(f"{instruction.name} ({instruction.opcode}): {problem}")


class Instruction(NamedTuple):
    """Holds one line of a computation, such as %c = f32[2]{0} add(%a, %b), metadata={...}."""

    name: str
    shape: str  # an array's type, or a tuple's in parentheses
    opcode: str
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # what stands between the parentheses: a constant's value, a parameter's number
    attributes: str  # the rest of the line
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Returns the computations that the instruction runs once."""
        if self.opcode in ("while", "conditional") or self.opcode.endswith(("-done", "-update")):
            return []  # what was called is with the -start
        return [
            name
            for attribute, names in _CALLS.findall(self.attributes)
            # All but a call apply it to elements of arrays, which cannot send anything.
            if attribute != "to_apply" or self.opcode.startswith("call")
            for name in _names(names)
        ]

    def attribute(self, name: str) -> str | None:
        """Returns the text after `name=` in the attributes, up to the line's end."""
        found = re.search(rf"\b{name}=(.*)", self.attributes)
        return found and found[1]

    def computation(self, name: str) -> str:
        """Returns the computation that an attribute names. Raises UnreadableProgram without it."""
        found = re.match(r"%?([\w.\-]+)", self.attribute(name) or "")
        if not found:
            raise UnreadableProgram(self, f"it names no {name}")
        return found[1]

    @property
    def branches(self) -> list[str]:
        """Returns the computations of which a conditional runs one."""
        if text := self.attribute("branch_computations"):
            return _names(text[: text.index("}") + 1])
        return [self.computation(f"{value}_computation") for value in ("true", "false")]


Computation = dict[str, Instruction]


class ProgramText(NamedTuple):
    """Holds a program's computations by their names, and which of them it begins with."""

    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> ProgramText:
    """Takes a program apart. Raises ValueError if the text is no whole program."""
    entry, computations, current = "", {}, {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(line, found)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the program's text has no ENTRY computation: is it compiled.as_text()?")
    return ProgramText(entry, computations)


def _parse_instruction(line: str, found: re.Match[str]) -> Instruction:
    begin = found.end()
    shape_end = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
    opening = line.index("(", shape_end + 1)
    end = _closing(line, opening)
    literal = line[opening + 1 : end]
    return Instruction(
        name=found[2],
        shape=line[begin:shape_end],
        opcode=line[shape_end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=line[end + 1 :],
        is_root=bool(found[1]),
    )


def _closing(line: str, opening: int) -> int:
    """Returns where the parenthesis at `opening` is closed: at the line's end, if it is not."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(line)


def _names(text: str) -> list[str]:
    """Returns the names in text such as %a or {%a, %b}."""
    return re.findall(r"[\w.\-]+", text)


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of a tuple's arrays. Raises ValueError for other types."""
    return sum(math.ceil(_bits(dtype) * size / 8) for dtype, size in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[str, int]]:
    """Yields type and number of elements of each array of a shape."""
    for dtype, dims in _ARRAY.findall(shape):
        yield dtype, math.prod(int(dim.strip("<=")) for dim in dims.split(",") if dim)


def _bits(dtype: str) -> int:
    """Returns the bits of an element, which the names of most types contain: bf16, f8e4m3fn."""
    if dtype in ("token", "opaque"):
        return 0
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found and dtype != "pred":
        raise ValueError(f"{dtype} is no type of elements that is known")
    return int(found[1]) if found else 8
