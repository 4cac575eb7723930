"""Compiles a run's train step for devices that need not be here, and says what it holds and sends.

`launch.plan_program` starts this file in a process of its own, because a compiler reads its
settings when a process starts, and devices once made stay. It reads a request from stdin as JSON,
and writes the result to the file that the request names.
"""

import json
import sys
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from launch.child_processes import end_with
from launch.plan_program import PROGRESS
from moe.config import ConfigError, RunConfig
from moe.files import write_whole
from moe.parallel.mesh import device_bytes, spec
from moe.scaling.programs import read_collectives
from moe.training.train_step import Program, make_program


def main(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the memory and the collectives of the step that a request describes."""
    config = RunConfig.from_config_dict(request["config"])
    begin = time.monotonic()

    def report(phase: str) -> None:
        print(f"{PROGRESS}{phase} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)

    report("laying out the state")
    program = make_program(config, _devices(request["platform"], request["topology"]))
    batch = abstract_batch(config, program)
    report("tracing the step")
    lowered = lower_step(program, batch, request["platform"])
    report("compiling the step")
    compiled = lowered.compile()
    report("reading the program")
    collectives = read_collectives(compiled.as_text() or "", program.mesh.shape)
    report("done")
    return {
        **_memory(compiled, request["platform"], program.abstract_state, batch),
        "mesh": dict(program.mesh.shape),
        "collectives": [vars(collective) for collective in collectives],
        "seconds": time.monotonic() - begin,
    }


def _devices(platform: str, topology: str) -> list[Any]:
    """Returns the devices of a topology. Those of "cpu" are virtual, and the others not here."""
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", int(topology))
        return jax.devices()
    if platform == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    else:
        file = resources.files("moe.scaling.programs").joinpath("h200.textproto")
        target = file.read_text(encoding="utf-8")
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=topology
        )
    return list(found.devices)


def abstract_batch(config: RunConfig, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a batch. Only one row of numbers is made."""

    def field(name: str, row: Any) -> jax.ShapeDtypeStruct:
        shape = (config.train.batch_size, *row.shape[1:])
        sharding = NamedSharding(program.mesh, spec(program.task.dims[name], shape, program.mesh))
        return jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding)

    rows = program.task.random_rows(config, 1)
    return {name: field(name, row) for name, row in rows.items()}


def lower_step(program: Program, batch: Mapping[str, Any], platform: str) -> jax.stages.Lowered:
    """Traces a program's train step for a batch of shapes, and lowers it for a platform."""
    step = program.train_step
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        traced = step.func.trace(*step.args, program.abstract_state, batch)
        return traced.lower(lowering_platforms=(platform,))


def _memory(compiled: Any, platform: str, state: Any, batch: Any) -> dict[str, int]:
    """Returns the bytes of one device: those of the state's parts, and the compiler's own count."""
    analysis = compiled.memory_analysis()
    parameters, optimizer = device_bytes(state.params), device_bytes(state.opt_state)
    outputs, aliased = analysis.output_size_in_bytes, analysis.alias_size_in_bytes
    arguments = analysis.argument_size_in_bytes
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "rest_of_state": device_bytes(state) - parameters - optimizer,
        "batch": device_bytes(batch),
        "arguments": arguments,
        "temporaries": held_bytes(analysis, platform) - arguments - (outputs - aliased),
        "outputs": outputs,
        "aliased": aliased,
    }


def held_bytes(analysis: Any, platform: str) -> int:
    """Returns the bytes that a program holds at its largest moment, by its memory analysis.

    Compilers for CPUs and GPUs allocate the temporaries that they report. What libtpu reports as
    temporaries is no such sum: it may be a third more than what the compiler allocates, and it does
    not decide whether a program fits a chip (docs/log.md). The peak of its buffers does.
    """
    if platform == "tpu":
        return analysis.peak_memory_in_bytes
    kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + kept


if __name__ == "__main__":
    request = json.load(sys.stdin)
    end_with(request["parent"])
    try:
        result = main(request)
    except ConfigError as error:
        result = {"error": str(error)}
    write_whole(Path(request["result"]), json.dumps(result))
