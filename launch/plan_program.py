"""Compiles a run's real train step ahead of time, and shows what the program holds and sends."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.compiler_flags import add_flags
from launch.plan_components import align
from launch.plan_text import GIB, share_rows
from launch.topologies import Target, find_target
from moe.config import ConfigError, RunConfig
from moe.scaling.communication import Collective
from moe.scaling.hardware import Chip

ROOT = Path(__file__).parents[1]
PROGRESS = "plan: "  # begins the lines that people should see, among those of compilers
_SHOWN = 20  # of the places in the model that send most


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Says how many bytes of one device a compiled step takes."""

    parameters: int
    optimizer: int
    rest_of_state: int  # the router's biases and the counts of progress
    batch: int
    # These three are the compiler's own count. Gradients and activations are temporaries to it.
    arguments: int
    temporaries: int
    outputs: int
    aliased: int  # outputs that take the place of arguments: the new state that of the old one

    @property
    def total(self) -> int:
        """Returns the bytes at the largest moment of a step."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """Holds what a compiled step takes of each device."""

    target: Target
    mesh: dict[str, int]
    memory: ProgramMemory
    collectives: tuple[Collective, ...]  # the most bytes first
    seconds: float  # that compiling took


def compile_step(config: RunConfig, chip: Chip, num_devices: int) -> StepProgram:
    """Compiles a run's train step for so many of these chips.

    Without the compiler for these chips, it is compiled for virtual CPU devices. Raises ConfigError
    where the run cannot be split over the devices, or programs for CPUs have no such exchange.
    """
    return compile_for(config, find_target(chip, num_devices))


def compile_for(config: RunConfig, target: Target) -> StepProgram:
    """Compiles a run's train step for a target, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        request = {
            "config": config.to_dict(),
            "platform": target.platform,
            "topology": target.topology,
            "result": str(path),
            "parent": os.getpid(),
        }
        _run_compiler(json.dumps(request), target)
        found = json.loads(path.read_text(encoding="utf-8"))
    if "error" in found:
        raise ConfigError(found["error"])
    names = [field.name for field in dataclasses.fields(ProgramMemory)]
    return StepProgram(
        target=target,
        mesh=found["mesh"],
        memory=ProgramMemory(**{name: found[name] for name in names}),
        collectives=tuple(
            Collective(**(use | {"axes": tuple(use["axes"])})) for use in found["collectives"]
        ),
        seconds=found["seconds"],
    )


def _compiler_environment(own: Mapping[str, str], platform: str) -> dict[str, str]:
    """Returns the environment variables of a process that compiles for a platform.

    `own` are those of this process. For TPUs the compiler gets the flags that a run on TPUs sets.
    """
    environment = dict(own) | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program knows less of itself
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if platform != "cpu":  # XLA's settings come from the environment for CPUs alone
        environment.pop("XLA_FLAGS", None)
    if platform == "tpu":
        add_flags(environment)
    return environment


def _run_compiler(request: str, target: Target) -> None:
    """Runs launch.compiled_step with a request, and shows its progress.

    Raises RuntimeError, with the last lines that it wrote, if it fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.compiled_step"],
        cwd=ROOT,
        env=_compiler_environment(os.environ, target.platform),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdin is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(request)
    other_lines = []
    with process.stderr as lines:
        for line in lines:
            if line.startswith(PROGRESS):
                print(line, end="", file=sys.stderr, flush=True)
            else:
                other_lines.append(line)
    if process.wait():
        raise RuntimeError(f"{target.label}: it failed\n{''.join(other_lines[-30:])}")


def program_lines(program: StepProgram, least: Sequence[Collective], chip: Chip) -> list[str]:
    """Returns what a program takes as lines: its memory, and what it sends beside the least."""
    return [
        "",
        program_headline(program),
        "",
        *align(program_memory_rows(program.memory, chip)),
        "",
        *align(program_collective_rows(program.collectives, least)),
        "",
        *align(place_rows(program.collectives)),
    ]


def program_headline(program: StepProgram) -> str:
    """Returns what the step was compiled for."""
    return f"The train step, {program.target.label} ({program.seconds:.0f} s)"


def program_memory_rows(memory: ProgramMemory, chip: Chip) -> list[tuple[str, ...]]:
    """Returns the table of a device's memory in a program, which ends with the compiler's total."""
    parts = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer + memory.rest_of_state,
        "batch": memory.batch,
        "gradients, activations and temporaries": memory.temporaries,
        "results beside the new state": memory.outputs - memory.aliased,
        "total": memory.total,
    }
    return share_rows("memory of a device, compiled", parts, chip)


def program_collective_rows(
    collectives: Sequence[Collective], least: Sequence[Collective]
) -> list[tuple[str, ...]]:
    """Returns the table of what a program sends along the axes of the mesh, beside the least."""
    sent: dict[tuple[str, str], float] = defaultdict(float)
    times: dict[tuple[str, str], float] = defaultdict(float)
    needed: dict[tuple[str, str], float] = defaultdict(float)
    for use in collectives:
        key = use.kind, ", ".join(use.axes)
        sent[key] += use.bytes
        times[key] += use.count
    for use in least:
        needed[use.kind, ", ".join(use.axes)] += use.bytes
    rows: list[tuple[str, ...]] = [("sent in a step", "over", "times", "GiB", "least", "ratio")]
    for key in sorted(sent.keys() | needed.keys(), key=lambda key: -sent[key]):
        rows.append((*key, f"{times[key]:,.0f}", *_beside(sent[key], needed[key])))
    total = _beside(sum(sent.values()), sum(needed.values()))
    return [*rows, ("total", "", f"{sum(times.values()):,.0f}", *total)]


def _beside(sent: float, least: float) -> tuple[str, str, str]:
    """Returns what is sent, the least, and their ratio, or a dash where nothing has to be sent."""
    return f"{sent / GIB:.3f}", f"{least / GIB:.3f}", f"{sent / least:.2f}" if least else "-"


def place_rows(collectives: Sequence[Collective]) -> list[tuple[str, ...]]:
    """Returns the table of the places in the model that send most."""
    rows = [("places that send most", "over", "times", "GiB", "what")]
    for use in collectives[:_SHOWN]:
        size = f"{use.bytes / GIB:.3f}"
        rows.append((use.kind, ", ".join(use.axes), f"{use.count:,.0f}", size, use.what))
    return rows
