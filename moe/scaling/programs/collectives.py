"""Adds up what one device sends in a compiled step, with loops multiplied out."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe.scaling.communication import Collective, Kind
from moe.scaling.programs.groups import axes_along, read_groups, read_lists
from moe.scaling.programs.loops import count_iterations
from moe.scaling.programs.text import (
    Computation,
    Instruction,
    ProgramText,
    UnreadableProgram,
    parse,
    shape_bytes,
)

# The bytes that one of n devices sends for each byte that it puts in, by the kind of collective.
# They are those of a ring. No other algorithm sends less.
SENT: dict[Kind, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


# Each kind of instruction, and the kind that it counts as.
KINDS: dict[str, Kind] = {
    **{kind: kind for kind in SENT},
    "ragged-all-to-all": "all-to-all",
}
# Parts of an instruction's place that say how it is run and not where in the model it is.
_CONTROL = {"while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map"}


class _Use(NamedTuple):
    """Names what one kind of collective sends, and where in the model it comes from."""

    kind: Kind
    axes: tuple[str, ...]
    what: str


class _Traffic(NamedTuple):
    """Counts the bytes that a device sends, and in how many collectives."""

    bytes: float
    count: int


_Uses = dict[_Use, _Traffic]


def read_collectives(text: str, mesh_shape: Mapping[str, int]) -> tuple[Collective, ...]:
    """Returns what one device sends in a run of a program, the most bytes first.

    `mesh_shape` has the size of each mesh axis, in the order of the mesh whose devices the program
    was compiled for. Every device counts as one that sends, and of a conditional's branches the one
    that sends most. Raises UnreadableProgram where a program cannot be read.
    """
    reader = _Reader(parse(text), mesh_shape)
    uses = reader.uses(reader.program.entry)
    collectives = [Collective(*use, *traffic) for use, traffic in uses.items()]
    return tuple(sorted(collectives, key=lambda found: -found.bytes))


class _Reader:
    """Reads each computation of a program once."""

    def __init__(self, program: ProgramText, mesh_shape: Mapping[str, int]):
        self.program = program
        self._mesh_shape = mesh_shape
        self._num_devices = math.prod(mesh_shape.values())
        self._read: dict[str, _Uses] = {}
        # The collectives that fusions share, by what is written where each begins.
        self._begun = {
            _chain_id(instruction)
            for computation in program.computations.values()
            if _begins(computation)
            for instruction in computation.values()
        }

    def uses(self, name: str) -> _Uses:
        """Returns what one execution of a computation sends."""
        if name not in self._read:
            total: _Uses = {}
            for instruction in self.program.computations[name].values():
                _add(total, self._sent_by(name, instruction))
            self._read[name] = total
        return self._read[name]

    def _sent_by(self, computation: str, instruction: Instruction) -> _Uses:
        """Returns what an instruction sends, and what it runs."""
        if instruction.opcode == "while":
            body = self.uses(instruction.computation("body"))
            # How often a loop runs that sends nothing may depend on data.
            times = count_iterations(self.program, computation, instruction) if body else 0
            return {use: _Traffic(x.bytes * times, x.count * times) for use, x in body.items()}
        if instruction.opcode == "conditional":
            return max(map(self.uses, instruction.branches), key=_total_bytes)
        total = self._collective(computation, instruction)
        for name in instruction.called:
            _add(total, self.uses(name))
        return total

    def _collective(self, computation: str, instruction: Instruction) -> _Uses:
        """Returns what an instruction itself sends: nothing, unless it is a collective."""
        kind: Kind | None = KINDS.get(instruction.opcode.removesuffix("-start"))
        if kind is None:
            if re.search(r"\b(?:replica_groups|source_target_pairs)=", instruction.attributes):
                raise UnreadableProgram(instruction, "it is no collective that is known")
            return {}
        instructions = self.program.computations[computation]
        chain = _chain_id(instruction)
        if chain is not None and not _begins(instructions):
            if chain not in self._begun:
                raise UnreadableProgram(instruction, "nothing begins what it goes on with")
            return {}
        try:
            axes, num_members = self._members(instruction)
            input_bytes = _input_bytes(instructions, instruction)
        except ValueError as error:
            raise UnreadableProgram(instruction, str(error)) from None
        if num_members == 1:
            return {}
        if kind == "all-reduce" and "all-reduce-scatter" in computation:  # a TPU's way to write it
            kind = "reduce-scatter"
        use = _Use(kind, axes, _place(instructions, instruction))
        return {use: _Traffic(input_bytes * SENT[kind](num_members), 1)}

    def _members(self, instruction: Instruction) -> tuple[tuple[str, ...], int]:
        """Returns the axes that a collective runs along, and how many devices join in each."""
        if text := instruction.attribute("source_target_pairs"):
            pairs = read_lists(text)
            moved = pairs[pairs[:, 0] != pairs[:, 1]] if pairs.size else pairs
            return axes_along(moved, self._mesh_shape), 2 if moved.size else 1
        text = instruction.attribute("replica_groups")
        if text is None:
            raise ValueError("it names neither its groups nor its pairs of devices")
        groups = read_groups(text, self._num_devices)
        return axes_along(groups, self._mesh_shape), groups.shape[1]


def _chain_id(instruction: Instruction) -> str | None:
    """Returns the name of a collective that several fusions share, or None.

    On a TPU, fusions may send a part each, beside matmuls. All of them name the collective.
    """
    found = re.search(r'chain_id="?(\d+)', instruction.attributes)
    return found[1] if found else None


def _begins(computation: Computation) -> bool:
    """Returns whether a fusion begins the collective that it shares with others."""
    return any('"AsyncCollectiveStart"' in other.attributes for other in computation.values())


def _input_bytes(computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that a device gives to a collective. Raises ValueError if it gives none."""
    sizes = [shape_bytes(computation[name].shape) for name in instruction.operands]
    if not sizes:
        raise ValueError("it has no operands")
    if not instruction.opcode.startswith("ragged"):
        return sum(sizes)
    # The rows that are sent lie in the first operand, and in the second on the other side. One of
    # them has room for more rows than are sent, so the smaller one counts: its even share goes to
    # each device. How many rows are really sent depends on the routing.
    return min(sizes[:2])


def _place(computation: Computation, instruction: Instruction) -> str:
    """Returns where in the model an instruction comes from, or what it sends if that is unknown."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    path = found[1].split(":")[0] if found else ""  # of several instructions that became one
    parts = [part.removeprefix("(") for part in path.split("/")[:-1]]
    names = [part for part in parts if part not in _CONTROL and "(" not in part]
    # A layer's name stands twice where it is computed again.
    names = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    if not names:
        shapes = [computation[name].shape for name in instruction.operands]
        return ", ".join(re.sub(r"\{.*", "", shape) for shape in shapes)
    if "rematted_computation" in parts:
        return f"recomputed: {'/'.join(names)}"
    return f"{'backward: ' if 'transpose(' in path else ''}{'/'.join(names)}"


def _add(total: _Uses, uses: _Uses) -> None:
    for use, (size, count) in uses.items():
        before = total.get(use, _Traffic(0, 0))
        total[use] = _Traffic(before.bytes + size, before.count + count)


def _total_bytes(uses: _Uses) -> float:
    return sum(traffic.bytes for traffic in uses.values())
