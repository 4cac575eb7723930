"""Compiles a run's train step for devices that need not be here, and says what it holds and sends.

`launch.plan_program` starts this file in a process of its own, because a compiler reads its
settings when a process starts, and devices once made stay. It reads a request from stdin as JSON,
and writes the result to the file that the request names.
"""

import json
import math
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
from moe.config import ConfigError, RunConfig
from moe.files import write_whole
from moe.parallel.mesh import spec
from moe.scaling.programs import read_collectives
from moe.training.train_step import Program, make_program

PROGRESS = "plan: "  # begins the lines that people should see, among those of compilers


def main(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the memory and the collectives of the step that a request describes."""
    config = RunConfig.from_config_dict(request["config"])
    begin = time.monotonic()

    def report(phase: str) -> None:
        print(f"{PROGRESS}{phase} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)

    report("laying out the state")
    program = make_program(config, _devices(request["platform"], request["topology"]))
    step, mesh = program.train_step, program.mesh
    batch = _abstract_batch(config, program)
    report("tracing the step")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = step.func.trace(*step.args, program.abstract_state, batch)
        lowered = traced.lower(lowering_platforms=(request["platform"],))
        report("compiling the step")
        compiled = lowered.compile()
    report("reading the program")
    collectives = read_collectives(compiled.as_text(), mesh.shape)
    report("done")
    return {
        **_memory(compiled, program.abstract_state, batch),
        "mesh": dict(mesh.shape),
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
        target = resources.files("moe.scaling.programs").joinpath("h200.textproto").read_text()
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=topology
        )
    return list(found.devices)


def _abstract_batch(config: RunConfig, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a batch. Only one row of numbers is made."""

    def field(name: str, row: Any) -> jax.ShapeDtypeStruct:
        shape = (config.train.batch_size, *row.shape[1:])
        sharding = NamedSharding(program.mesh, spec(program.task.dims[name], shape, program.mesh))
        return jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding)

    rows = program.task.random_rows(config, 1)
    return {name: field(name, row) for name, row in rows.items()}


def _memory(compiled: Any, state: Any, batch: Any) -> dict[str, int]:
    """Returns the bytes of one device: those of the state's parts, and the compiler's own count."""
    analysis = compiled.memory_analysis()
    parameters, optimizer = _device_bytes(state.params), _device_bytes(state.opt_state)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "rest_of_state": _device_bytes(state) - parameters - optimizer,
        "batch": _device_bytes(batch),
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
    }


def _device_bytes(tree: Any) -> int:
    """Returns the bytes of the shards that one device holds of a tree of shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


if __name__ == "__main__":
    request = json.load(sys.stdin)
    end_with(request["parent"])
    try:
        result = main(request)
    except ConfigError as error:
        result = {"error": str(error)}
    write_whole(Path(request["result"]), json.dumps(result))
