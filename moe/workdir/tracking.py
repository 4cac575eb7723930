"""What a run writes down about itself: its config, metrics.jsonl, TensorBoard, and the environment
of each start.

metrics.jsonl has one JSON object per line, `{"step": 10, "train/loss": 2.5, ...}`, with numbers
that are not finite as the strings "NaN", "Infinity" and "-Infinity", since JSON has none.
TensorBoard, and whatever comes beside it, is a copy. router.jsonl has a list over the sparse layers
where metrics.jsonl has a number: `{"step": 10, "max_vio": [0.25, 0.5], "load": [[0.5, 0.5], [0.25,
0.75]], ...}`.
"""

import datetime
import importlib.metadata
import json
import math
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import ConfigError, RunConfig, TrackingConfig
from moe.workdir.identity import (
    UNFINISHED_FILE,
    checkpoint_steps,
    differing_fields,
    read_saved_config,
)

METRICS_FILE = "metrics.jsonl"
ROUTER_FILE = "router.jsonl"
ENVIRONMENT_FILE = "environment.jsonl"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "array_record",
    "numpy",
)

Numbers = float | list["Numbers"]


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Makes a new run directory, or checks that the run that is there has the same config. Raises
    ConfigError naming what differs.

    `mesh` and `data.directory` may differ: they say where a run is laid out, and are no part of the
    experiment. `train.steps` may differ too, as long as it is more than the run has trained: the
    schedule from there on is that of the new number. Where config.json is missing, the latest
    checkpoint says which run this is.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    unfinished = workdir / UNFINISHED_FILE
    if unfinished.exists():
        raise ConfigError(
            f"{workdir} is no run yet ({unfinished.read_text().strip()}): delete it, and make it again"
        )
    saved = read_saved_config(workdir)
    if saved is None:
        return
    differing = differing_fields(saved, config, allowed=("train.steps",))
    if differing:
        raise ConfigError(
            f"{workdir} holds a run of another config ({'; '.join(differing)}): set another --workdir"
        )
    _check_steps(workdir, saved.train.steps, config.train.steps)


def _check_steps(workdir: Path, before: int, after: int) -> None:
    """Raises ConfigError where a run's number of steps is changed to no more than it has trained."""
    trained = max(checkpoint_steps(workdir / "checkpoints"), default=0)
    if after != before and after <= trained:
        raise ConfigError(
            f"train.steps={after} is not more than the {trained} steps that {workdir} has trained: set train.steps to {before}, or to more "
            f"than {trained}"
        )


class MetricWriter:
    """Appends metrics to the files of a run directory; one process of a run opens it.

    `step` is the step the run starts or resumes from: what an interrupted run wrote of later steps
    is dropped, so that a resumed run's files read like an uninterrupted one's. A step's metrics
    therefore have to be written before its checkpoint is.
    """

    def __init__(self, workdir: Path, config: TrackingConfig, step: int):
        self._metrics, self._router = workdir / METRICS_FILE, workdir / ROUTER_FILE
        for path in (self._metrics, self._router):
            _drop_later_lines(path, step)
        self._metrics.touch()  # a run that has logged nothing yet is a run all the same
        self._tensorboard = _tensorboard(workdir, step) if config.tensorboard else None

    def write(
        self, step: int, metrics: Mapping[str, Any], layers: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Writes the scalars of one step (Python, numpy or JAX ones); metrics.jsonl holds them when
        this returns.

        `layers` are arrays [L, ...] over a model's sparse layers, for router.jsonl, to five
        significant digits.
        """
        values = {name: float(value) for name, value in metrics.items()}
        _append_line(self._metrics, step, values)
        if layers:
            _append_line(
                self._router,
                step,
                {name: _rounded(value.tolist()) for name, value in layers.items()},
            )
        if self._tensorboard:
            self._tensorboard.write(step, values)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order: `step` an int, every other value a float (NaN and
    infinities included).

    A last line still being written is left out. Raises FileNotFoundError, and ConfigError where the
    file is damaged.
    """
    return [{"step": step} | values for step, values in _parse_lines(workdir / METRICS_FILE, float)]


def read_router(workdir: Path, every: int = 1) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The step and the arrays [L, ...] of each line of router.jsonl, in order; none for a run
    without sparse layers.

    With `every` above 1 only the first of every so many lines is parsed. Raises ConfigError where
    the file is damaged.
    """
    path = workdir / ROUTER_FILE
    return (
        _parse_lines(path, lambda value: np.array(_decode(value), np.float32), every)
        if path.exists()
        else iter(())
    )


def write_environment(workdir: Path, attention: str) -> None:
    """Appends one line to environment.jsonl: what this start of the run runs on, and by which
    implementation of attention.
    """
    environment = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "attention": attention,
        "git": _git_state(Path(__file__).resolve()),
    }
    path = workdir / ENVIRONMENT_FILE
    # A killed process may have left half a line, which must not swallow this one.
    begin = (
        "\n"
        if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
        else ""
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(begin + json.dumps(environment) + "\n")


def _append_line(path: Path, step: int, values: Mapping[str, Numbers]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_format_line(step, values))


def _format_line(step: int, values: Mapping[str, Numbers]) -> str:
    return (
        json.dumps({"step": step} | {name: _encode(value) for name, value in values.items()}) + "\n"
    )


def _encode(value: Numbers) -> Any:
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value if math.isfinite(value) else json.dumps(value)


def _decode(value: Any) -> Numbers:
    return [_decode(item) for item in value] if isinstance(value, list) else float(value)


def _rounded(value: Numbers) -> Numbers:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.5g}")


def _parse_lines(
    path: Path, decode: Callable[[Any], Any], every: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The step and the decoded values of each line, or of the first of every so many lines."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file):
            if number % every:
                continue
            try:
                values = json.loads(line)
                step = operator.index(values.pop("step"))
                yield step, {name: decode(value) for name, value in values.items()}
            except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
                # kill -9 can cut the last line short. Anywhere else the file was damaged, and
                # guessing would hide that.
                if line.endswith("\n"):
                    raise ConfigError(
                        f"{path}, line {number + 1} is not a JSON object of a step and numbers: delete that line"
                    ) from None


def _drop_later_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(
            _format_line(line_step, values)
            for line_step, values in _parse_lines(path, _decode)
            if line_step <= step
        )
        file.flush()
        os.fsync(file.fileno())
    # A kill before this line leaves the old file, and after it the new one: never half of either.
    partial.replace(path)


def _tensorboard(workdir: Path, step: int) -> Any:
    # Imported here because reading metrics needs none of it, and it takes half a second.
    from moe.workdir.tensorboard import TensorBoard

    return TensorBoard(workdir / "tensorboard", step)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "platform": jax.default_backend(),
        "kinds": kinds,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that tracks `file`; None outside one (an installed
    package, or no git).
    """
    try:
        # Asking for the file keeps a virtual environment inside somebody else's checkout from
        # reporting that one's commit.
        _git(file, "ls-files", "--error-unmatch", file.name)
        description = _git(file, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": description.removesuffix("-dirty"), "dirty": description.endswith("-dirty")}


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(
        command, cwd=file.parent, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
