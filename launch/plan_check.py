"""Compares what launch.plan counts with compiled programs, for all configs and the chips they name.

Examples:
    python -m launch.plan_check --json=docs/benchmarks/plan_memory.json
    python -m launch.plan_check --json=docs/benchmarks/plan_memory.json --compile=False

It compiles the real train step of each case, one after the other, and writes the bytes that the
program holds on each device. A file that is there already is gone on with: only cases that it lacks
are compiled, which takes from seconds to several minutes each. Then it counts the same cases, and
prints both as a table in Markdown. The compilers come with pip install '.[aot]'; a case whose
compiler is not installed is left out, and so is one that its compiler refuses.
"""

import dataclasses
import importlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from launch import command_line
from launch.output_paths import output_file
from launch.plan_program import compile_for
from launch.plan_text import GIB
from launch.topologies import Target, find_target
from moe.config import ConfigError, RunConfig
from moe.files import write_whole
from moe.scaling.hardware import CHIPS, Platform
from moe.scaling.memory import step_bytes


class Case(NamedTuple):
    """Names a config, the devices that it is compiled for, and what is set in it."""

    config: str
    chip: str  # of the table, or "cpu"
    devices: int
    changes: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """Returns the case as text, by which the file of results knows it."""
        changes = [f"{name}={value}" for name, value in self.changes.items()]
        return " ".join([self.config, self.chip, str(self.devices), *changes])

    @property
    def platform(self) -> Platform:
        """Returns what JAX calls the platform of the case's devices."""
        return CHIPS[self.chip].platform if self.chip in CHIPS else "cpu"

    def read(self) -> RunConfig:
        """Returns the config of the case, with its mesh resolved."""
        config: ConfigDict = importlib.import_module(f"configs.{self.config}").get_config()
        config.update_from_flattened_dict(dict(self.changes))
        run = RunConfig.from_config_dict(config)
        return dataclasses.replace(run, mesh=run.mesh.resolve(self.devices))


_ON_CPU = (
    "dense_tiny moe_tiny bpe_tiny chat_tiny fill_in_the_middle_tiny masked_tiny mixture_tiny "
    "packages_tiny span_corruption_tiny text_tiny benchmark_dense"
)
_IN_TURN = {"train.gather_once": False}
_SMALL_BATCH = {"train.batch_size": 64, "train.accumulation": 4, "model.remat": "full", **_IN_TURN}
_CAPACITY = {"model.moe.dispatch": "capacity", "model.moe.exchange": "all_to_all"}
_STAGES = {"mesh.pipeline": 2, "train.accumulation": 8, "train.gather_once": False}
_REPLICAS = {"mesh.pipeline": 2, "mesh.data": 2, "mesh.fsdp": 2, "train.accumulation": 8}
_SPARSE_REPLICAS = {**_REPLICAS, "mesh.expert": 2, "train.batch_size": 64, "model.remat": "none"}
_GATHERED = {"mesh.tensor": 8, "train.batch_size": 64, "train.accumulation": 1}
_KEPT = {"model.remat": "none", **_IN_TURN, "train.batch_size": 256, "train.accumulation": 4}
_UNROLLED = {"model.remat": "none", "model.scan_layers": False, "train.batch_size": 512}
CASES = (
    # The configs, on the hardware that they name.
    *(Case(name, "cpu", 1) for name in _ON_CPU.split()),
    Case("moe_pipeline_tiny", "cpu", 2),
    Case("moe_pipeline_tiny", "h200", 2),
    Case("dense_125m", "h200", 1),
    *(Case(name, chip, 8) for name in ("dense_1b", "dense_1b_32k") for chip in ("h200", "v5p")),
    *(
        Case(name, chip, 64)
        for name in ("dense_7b", "moe_1b_7b", "moe_8x7b", "moe_30b_a3b")
        for chip in ("h200", "v5p")
    ),
    Case("moe_671b", "h200", 1024),
    Case("moe_671b", "v5p", 1024),
    Case("moe_671b_pipeline", "h200", 1024),
    # The compiler of v5p refuses ragged exchanges in a pipeline.
    Case("moe_671b_pipeline", "v5p", 1024, _CAPACITY),
    # Other layouts.
    *(
        Case("dense_7b", chip, 8, {"mesh.tensor": tensor, **_SMALL_BATCH})
        for chip in ("h200", "v5p")
        for tensor in (1, 2)
    ),
    *(
        Case(name, "h200", devices, {**changes, "model.remat": remat})
        for name, devices, changes, remats in (
            ("dense_7b", 8, {"mesh.tensor": 1, **_SMALL_BATCH}, ("save_attention", "offload")),
            ("moe_8x7b", 64, _IN_TURN, ("full", "save_exchange", "save_attention", "offload")),
        )
        for remat in remats
    ),
    Case("moe_8x7b", "v5p", 64, _IN_TURN),
    *(Case("moe_30b_a3b", chip, 64, _IN_TURN) for chip in ("h200", "v5p")),
    Case("moe_1b_7b", "h200", 64, {"train.gather_once": True}),
    Case("dense_7b", "h200", 8, {"mesh.tensor": 1, **_SMALL_BATCH, "train.gather_once": True}),
    Case("dense_1b", "h200", 8, _STAGES),
    Case("dense_1b", "h200", 8, {**_STAGES, "train.pipeline_rounds": 4}),
    Case("dense_1b", "v5p", 8, _STAGES),
    Case("dense_1b", "h200", 8, {**_STAGES, "train.batch_size": 128, "model.remat": "none"}),
    *(Case("dense_1b", chip, 8, _REPLICAS) for chip in ("h200", "v5p")),
    Case("moe_1b_7b", "h200", 16, _SPARSE_REPLICAS),
    # Where the tensor axis splits the time, gathered inputs are kept.
    *(Case("dense_7b", chip, 64, _GATHERED) for chip in ("h200", "v5p")),
    # Experts' rows are kept as they were received.
    *(Case("moe_30b_a3b", chip, 64, _KEPT) for chip in ("h200", "v5p")),
    # Layers that are unrolled keep no stacked copies.
    Case("dense_1b", "h200", 8, _UNROLLED),
)


def program_bytes(case: Case) -> dict[str, Any]:
    """Compiles a case, and returns the bytes of each device and how long it took.

    If its compiler refuses it, it returns the last line of why, and without its compiler nothing.
    """
    if case.chip == "cpu":
        target = Target("cpu", str(case.devices), "compiled for this machine")
    else:
        target = find_target(CHIPS[case.chip], case.devices)
        if target.platform == "cpu":
            return {}
    begin = time.monotonic()
    try:
        program = compile_for(case.read(), target)
    except (ConfigError, RuntimeError) as error:
        return {"error": str(error).strip().splitlines()[-1]}
    return {
        "bytes": program.memory.total,
        "sent_bytes": sum(use.bytes for use in program.collectives),
        "seconds": round(time.monotonic() - begin),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of programs beside what is counted now, in GiB of a device."""
    lines = [
        "| config | compiled for | program | counted | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        found = results.get(case.name, {})
        if "bytes" not in found:
            continue
        config = case.read()
        counted = step_bytes(config, config.mesh, case.platform).total
        name = ", ".join([f"`{case.config}`", *(f"{k}={v}" for k, v in case.changes.items())])
        chips = f"{case.devices:,} {case.chip}"
        sizes = [f"{size / GIB:.3g}" for size in (found["bytes"], counted)]
        lines.append(f"| {name} | {chips} | {' | '.join(sizes)} | {counted / found['bytes']:.2f} |")
    return "\n".join(lines)


def compile_missing(values: flags.FlagValues, cases: Iterable[Case]) -> dict[str, Any]:
    """Compiles the cases that the file of results lacks, and returns all results by name.

    Each result is written as soon as it is there, so an interrupted command may go on later.
    """
    path = output_file("--json", values.json)
    results = read_results(path) if path.exists() else {}
    for case in cases if values.compile else ():
        if case.name not in results and values.only in case.name:
            found = program_bytes(case)
            print(f"{case.name}: {found or 'its compiler is not installed'}", flush=True)
            if found:
                results[case.name] = found
                write_whole(path, json.dumps(results, indent=2) + "\n")
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Returns the results in a file. Raises ConfigError if it holds something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        sizes = [found.get("bytes", 0) for found in results.values()]
        is_whole = all(isinstance(size, int | float) for size in sizes)
    except (ValueError, RecursionError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"--json={path} holds no results of this command: set --json to another file"
        )
    return results


def main(values: flags.FlagValues) -> None:
    print(table(compile_missing(values, CASES)))


if __name__ == "__main__":
    flags.DEFINE_string("json", None, "The file of what programs hold.", required=True)
    flags.DEFINE_bool("compile", True, "Whether to compile the cases that the file lacks.")
    flags.DEFINE_string("only", "", "Compiles only cases whose name contains this text.")
    command_line.run(main, __doc__)
