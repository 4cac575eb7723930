"""Compares the step times that launch.plan --chip=cpu predicts with measured ones, on this machine.

Example:
    python -m launch.plan_step_time --json=docs/benchmarks/plan_step_time.json

It measures `dense_tiny` and fits the machine's one number to it, as --chip=cpu does. Then it
measures other shapes, dense and sparse, and prints what was predicted for each of them beside what
launch.benchmark measured, as a table in Markdown. A busy machine slows steps and matmuls alike, so
every step is timed right after a matmul, and a prediction is a multiple of the matmul's time.
"""

import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from launch import command_line
from launch.benchmark import benchmark
from launch.output_paths import output_file
from launch.plan_check import Case
from launch.plan_cpu import cpu_chip
from moe.config import MeshConfig, RunConfig
from moe.files import write_whole
from moe.scaling.roofline import estimate

FITTED = "dense_tiny"
# What differs from the config, by the name of the shape and the config.
SHAPES: dict[tuple[str, str], dict[str, Any]] = {
    ("twice as wide", "dense_tiny"): {
        "model.model_dim": 512,
        "model.feed_forward_dim": 1408,
        "model.num_heads": 8,
        "model.num_kv_heads": 4,
        "train.batch_size": 4,
    },
    ("twice as deep, rows of 1,024", "dense_tiny"): {
        "model.num_layers": 8,
        "data.sequence_length": 1024,
        "train.batch_size": 2,
    },
    ("16 experts of 176, 4 a token", "moe_tiny"): {},
    ("8 experts of 512, 2 a token", "moe_tiny"): {
        "model.moe.num_experts": 8,
        "model.moe.experts_per_token": 2,
        "model.moe.expert_dim": 512,
        "train.batch_size": 8,
    },
}


def read(config: str, changes: Mapping[str, Any]) -> RunConfig:
    """Returns a config for one device."""
    return Case(config, "cpu", 1, changes).read()


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of steps in seconds, predicted from the measurement of `dense_tiny`."""
    chip = cpu_chip(read(FITTED, {}), dict(measured[FITTED]))
    lines = [
        "| shape | step, s | of the matmul's rate | predicted | measured / predicted time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (name, config), changes in SHAPES.items():
        found = measured[name]
        predicted = estimate(read(config, changes), MeshConfig(data=1), chip).mfu
        ratio = found["ratio_to_matmul"]
        lines.append(
            f"| `{config}`, {name} | {found['step_seconds']:.2f} | {ratio:.2f} "
            f"| {predicted:.2f} | {predicted / ratio:.2f} |"
        )
    return "\n".join(lines)


def main(values: flags.FlagValues) -> None:
    path = output_file("--json", values.json)  # a mistyped one must not cost minutes of measuring
    measured = {FITTED: benchmark(read(FITTED, {}), values.trials)}
    for (name, config), changes in SHAPES.items():
        measured[name] = benchmark(read(config, changes), values.trials)
    write_whole(path, json.dumps(measured, indent=2) + "\n")
    print(table(measured))


if __name__ == "__main__":
    flags.DEFINE_string("json", None, "The file to write the measurements to.", required=True)
    flags.DEFINE_integer("trials", 9, "How often each step is timed.", lower_bound=1)
    command_line.run(main, __doc__)
