"""Runs every check and measurement that needs a GPU, and prints what beats what.

Examples:
    python -m launch.gpu --out=docs/benchmarks/h100
    python -m launch.gpu --out=docs/benchmarks/h100 --only=attention,dense_1b

The kernels are first held against float64, then they are timed beside other libraries, and whole
training steps are measured. Each step of the list is a command of its own, and its result is the
file --out/NAME.json. A step whose file is there is not run again, so a run that was cut short goes
on where it stopped. What a step printed is in --out/logs/NAME.log.

docs/gpu_queue.md lists the steps.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch import command_line
from launch.child_processes import gpu_names
from launch.output_paths import check_directory
from moe.config import ConfigError
from moe.config.checks import expand_path
from moe.files import write_whole
from moe.storage.paths import make_directory

# The fastest layout of layers that fit one GPU: nothing is computed again, and no layer copies what
# it keeps into an array of all layers.
_LAYERS = ("model.remat=none", "model.scan_layers=False", "mesh.fsdp=1")


class Step(NamedTuple):
    """A command of `python`, and the seconds that it may take.

    {json} in its arguments is the file that it writes. A check writes none: that it has ended
    without an error is its result.
    """

    arguments: tuple[str, ...]
    limit_s: int


def _train_step(config: str, *fields: str) -> Step:
    command = ("-m", "launch.benchmark", f"--config=configs/{config}.py")
    config_fields = tuple(f"--config.{field}" for field in fields)
    return Step((*command, *config_fields, "--json={json}"), 240)


def _attention(name: str, *arguments: str) -> Step:
    module = "moe.kernels.benchmarks.attention"
    return Step(("-m", module, f"--implementation={name}", *arguments, "--json={json}"), 240)


# Cases compile for longer than they run, so several processes share the GPU.
_NUMERICS = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:benchmark", "--numprocesses=8")

STEPS: dict[str, Step] = {
    "numerics_attention": Step((*_NUMERICS, "tests/kernels/attention"), 400),
    "numerics_grouped_matmul": Step((*_NUMERICS, "tests/kernels/grouped_matmul"), 400),
    "attention": _attention("hopper"),
    "attention_fused": _attention("hopper_fused", "--lengths", "4096", "16384"),
    "decode": Step(("-m", "moe.kernels.benchmarks.decode", "--json={json}"), 120),
    "grouped_matmul": Step(
        (
            "-m",
            "moe.kernels.benchmarks.grouped_matmul",
            "--implementation=hopper",
            "--json={json}",
        ),
        240,
    ),
    # As large as OLMoE's (arXiv 2409.02060).
    "moe_layer": Step(
        (
            "-m",
            "launch.benchmark",
            "--config=configs/benchmark_moe.py:64x8",
            "--config.model.compute_dtype=bfloat16",
            "--config.model.model_dim=2048",
            "--config.model.moe.expert_dim=1024",
            # A layer alone has no mesh, whose chip would be asked for.
            "--config.model.moe.implementation=hopper",
            "--layer",
            "--json={json}",
        ),
        120,
    ),
    "dense_125m": _train_step("dense_125m", "train.batch_size=32", "train.accumulation=1"),
    "dense_1b": _train_step("dense_1b", *_LAYERS, "train.batch_size=64", "train.gather_once=False"),
    "moe_1b_7b_4_layers": _train_step(
        "moe_1b_7b",
        *_LAYERS,
        "model.num_layers=4",
        "train.batch_size=64",
        "train.loss_chunk=256",
    ),
}


def run_step(name: str, step: Step, out: Path) -> str | None:
    """Runs a step unless its result is there. Returns what went wrong, or None."""
    result, log = out / f"{name}.json", out / "logs" / f"{name}.log"
    if result.exists():
        print(f"{name}: done before")
        return None
    unfinished = result.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    begin = time.monotonic()
    if problem := _execute(step, unfinished, log):
        return f"{problem}: see {log}"
    if not unfinished.exists():
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        last_line = lines[-1] if lines else "it has printed nothing"
        if " passed" not in last_line:
            return f"ran nothing ({last_line}): see {log}"
        write_whole(unfinished, json.dumps({"passed": last_line}, indent=1) + "\n")
    unfinished.rename(result)
    print(f"{name}: done in {time.monotonic() - begin:.0f} s", flush=True)
    return None


def _execute(step: Step, result: Path, log: Path) -> str | None:
    """Runs the command of a step. Returns what went wrong, or None."""
    arguments = [argument.replace("{json}", str(result)) for argument in step.arguments]
    # With a share of the memory for each process, those of the numerics would not fit. Steps take
    # more than the three quarters of 80 GB that JAX would take at most.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    with log.open("w", encoding="utf-8") as lines:
        try:
            code = subprocess.run(
                [sys.executable, *arguments],
                stdout=lines,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=step.limit_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {step.limit_s} s"
    return f"ended with exit code {code}" if code else None


def summary(out: Path) -> list[str]:
    """Returns a line for each result in the folder: a ratio, a share of the peak, or a verdict."""
    lines = []
    for name in STEPS:
        path = out / f"{name}.json"
        if path.exists():
            try:
                told = _describe(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                told = [f"{path} is no result of this step: delete it, and run the command again"]
            lines += [f"{name}: {line}" for line in told]
    return lines


def _describe(result: dict[str, Any]) -> list[str]:
    if "rows" in result:
        return _compare_rows(result["rows"])
    if "mfu" in result:
        return [f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.1%}"]
    if "sparse_over_dense" in result:
        return [f"{result['sparse_over_dense']:.2f} times the time of a dense layer"]
    return [str(result["passed"])]


def _compare_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Returns how fast the first implementation of each case is beside the best of the others."""
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            cases.setdefault(_case(row), {})[row["implementation"]] = row["ms"]
    lines = []
    for case, times in cases.items():
        (ours, time_ms), *others = times.items()
        text = f"{case}: {ours} {time_ms:.2f} ms"
        if others:
            best, best_ms = min(others, key=lambda other: other[1])
            text += f", {best_ms / time_ms:.2f} times as fast as {best}"
        lines.append(text)
    return lines


def _case(row: dict[str, Any]) -> str:
    """Returns what a row shares with those of other implementations, as text."""
    shape = row.get("shape", {})
    sizes = [f"{name}={size}" for name, size in shape.items()]
    keys = ("mask", "length", "pass", "filled", "dtype")
    return " ".join(sizes + [str(row[key]) for key in keys if key in row])


def main(values: flags.FlagValues) -> int:
    unknown = [name for name in values.only or () if name not in STEPS]
    if unknown:
        raise ConfigError(f"--only={unknown[0]} is no step: set it to some of {', '.join(STEPS)}")
    out = Path(expand_path("--out", values.out))
    check_directory("--out", out)
    if not gpu_names(os.environ):
        raise ConfigError(
            "this machine has no NVIDIA GPU in /dev, or CUDA_VISIBLE_DEVICES hides it: run this on "
            "one that has, or set CUDA_VISIBLE_DEVICES to the GPU's number"
        )
    make_directory(out / "logs", "--out")
    failed = {}
    for name in values.only or STEPS:
        if problem := run_step(name, STEPS[name], out):
            failed[name] = problem
            print(f"{name}: {problem}", flush=True)
    print("\n".join(["", *summary(out)]))
    if failed:
        print(f"error: {len(failed)} of the steps failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The folder for the results. Required.", required=True)
    flags.DEFINE_list("only", None, "The steps to run, by name; by default all of them.")
    command_line.run(main, __doc__)
