"""Compares what compiled steps send with the least, for five models on two kinds of chips.

Examples:
    python -m launch.plan_sent --json=docs/benchmarks/plan_sent.json
    python -m launch.plan_sent --json=docs/benchmarks/plan_sent.json --compile=False

It compiles the real train step of each case, one after the other, and writes the bytes that each
device sends in a step. A file that is there already is gone on with: only cases that it lacks are
compiled, which takes from 15 seconds to 5 minutes each. Then it counts the least that the same
cases must send, and prints both as a table in Markdown. The compilers come with
pip install '.[aot]'; a case whose compiler is not installed is left out.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from launch import command_line
from launch.plan_check import Case, compile_missing
from launch.plan_text import GIB
from moe.scaling.communication import least_collectives
from moe.scaling.hardware import CHIPS
from moe.scaling.memory import step_bytes

# The mesh of each model on 8 and on 64 chips, and the rows of a microbatch for each chip.
_LAYOUTS: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "dense_1b": ({"fsdp": 8}, {"fsdp": 64}, 4),
    "dense_7b": ({"fsdp": 8}, {"fsdp": 8, "tensor": 8}, 1),
    "moe_1b_7b": ({"fsdp": 8}, {"data": 8, "fsdp": 8}, 2),
    "moe_8x7b": ({"expert": 8}, {"fsdp": 8, "expert": 8}, 1),
    "moe_30b_a3b": ({"expert": 8}, {"fsdp": 8, "expert": 8}, 1),
}
# What gathers parameters once a step. The others do for each microbatch, which takes less memory.
_GATHERED_ONCE = ("dense_1b",)


def _mesh(name: str, devices: int) -> dict[str, int]:
    """Returns the axes of a model's mesh that have several devices."""
    few, many, _ = _LAYOUTS[name]
    return few if devices == 8 else many


def _cases() -> Iterator[Case]:
    """Yields all cases: models, numbers of chips, kinds, numbers of microbatches, and remat."""
    choices = itertools.product((4, 1), ("full", "none"), (8, 64), ("h200", "v5p"), _LAYOUTS)
    for microbatches, remat, devices, chip, name in choices:
        mesh = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | _mesh(name, devices)
        changes: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
        rows = _LAYOUTS[name][2]
        changes |= {"train.batch_size": microbatches * devices * rows, "model.remat": remat}
        changes["train.accumulation"] = microbatches
        yield Case(name, chip, devices, changes | {"train.gather_once": name in _GATHERED_ONCE})


CASES = tuple(_cases())


def fits(case: Case) -> bool:
    """Returns whether a case's step fits the memory of its chip, as it is counted."""
    config, chip = case.read(), CHIPS[case.chip]
    return step_bytes(config, config.mesh, chip.platform).total <= chip.memory_bytes


def ratio(case: Case, sent_bytes: float) -> float:
    """Returns what a device sends in a step, divided by the least that it must send."""
    config = case.read()
    return sent_bytes / sum(use.bytes for use in least_collectives(config, config.mesh))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of what steps send, with four columns for the four ways to run a layout."""
    ways = list(itertools.product(("full", "none"), (1, 4)))
    heads = [f"remat {remat}, {number}" for remat, number in ways]
    lines = [f"| model | chips | mesh | {' | '.join(heads)} |", "| --- " * 7 + "|"]
    for chip, devices, name in itertools.product(("h200", "v5p"), (8, 64), _LAYOUTS):
        own = [
            case
            for case in CASES
            if (case.config, case.chip, case.devices) == (name, chip, devices)
        ]
        cells = {_way(case): _cell(case, results.get(case.name)) for case in own}
        axes = ", ".join(f"{axis}={size}" for axis, size in _mesh(name, devices).items())
        cells_in_order = " | ".join(cells[way] for way in ways)
        lines.append(f"| `{name}` | {devices} {chip} | {axes} | {cells_in_order} |")
    return "\n".join(lines)


def _way(case: Case) -> tuple[str, int]:
    return case.changes["model.remat"], case.changes["train.accumulation"]


def _cell(case: Case, found: Mapping[str, Any] | None) -> str:
    """Returns what the table says of a case: the GiB that a device sends, and the ratio."""
    if not fits(case):
        return "does not fit"
    if found is None:
        return "not compiled"
    if "sent_bytes" not in found:
        return "refused"
    return f"{found['sent_bytes'] / GIB:.3g} GiB, {ratio(case, found['sent_bytes']):.2f}"


def main(values: flags.FlagValues) -> None:
    print(table(compile_missing(values, filter(fits, CASES))))


if __name__ == "__main__":
    # The help of a command lists the flags of its own file.
    flags.DEFINE_string("json", None, "The file of what programs send.", required=True)
    flags.DEFINE_bool("compile", True, "Whether to compile the cases that the file lacks.")
    flags.DEFINE_string("only", "", "Compiles only cases whose name contains this text.")
    command_line.run(main, __doc__)
