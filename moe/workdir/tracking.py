"""Writes down what a run does: its metrics, and the environment of each start.

metrics.jsonl has one JSON object per line: `{"step": 10, "train/loss": 2.5, ...}`. JSON has no
numbers that are not finite, so these are the strings "NaN", "Infinity" and "-Infinity". TensorBoard
gets a copy.

router.jsonl has, instead of each number, a list with one entry for each sparse layer:
`{"step": 10, "max_vio": [0.25, 0.5], "load": [[0.5, 0.5], [0.25, 0.75]], ...}`.

hosts.jsonl, of a job of several processes, has lists with one entry for each process, in seconds a
step: `{"step": 10, "step_seconds": [0.5, 0.5], "host_seconds": [0.125, 0.25]}`.
"""

import datetime
import errno
import importlib.metadata
import json
import math
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeVar

import numpy as np

from moe.config import ConfigError, RunConfig, TrackingConfig
from moe.parallel.hub import HostTimes
from moe.storage.lines import LineWriter, line_parts, read_lines
from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, is_lost, make_directory, open_whole, write_whole
from moe.storage.tokenizer import FIELDS, names_file, read_stored, store_tokenizer
from moe.workdir.identity import (
    UNFINISHED_FILE,
    checkpoint_steps,
    differing_fields,
    read_saved_config,
    use_stored_tokenizer,
)

if TYPE_CHECKING:
    from moe.workdir.tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"
ROUTER_FILE = "router.jsonl"
HOSTS_FILE = "hosts.jsonl"
ENVIRONMENT_FILE = "environment.jsonl"
_COMPILERS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # the variables that compilers read flags from
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

Numbers = float | list["Numbers"]  # a number, or lists of numbers nested to any depth
T = TypeVar("T")


def check_workdir(workdir: RunPath, config: RunConfig) -> None:
    """Creates a new run directory, or checks that the run in it has the same config.

    A new run gets copies of its tokenizer's file and of its chat template. `mesh`, `data.directory`
    and the paths of the two files, though not their contents, may differ: they say where a run is
    computed, and are no part of the experiment. `train.steps` may differ too, if the run has not
    trained that many steps yet: from its latest checkpoint on, it follows the schedule for the new
    number. (With the schedule "wsd" the learning rates so far must be those of the new number.)
    Where config.json is missing, the latest checkpoint says which run this is. Raises ConfigError
    that names all other differences.
    """
    make_directory(workdir)
    unfinished = workdir / UNFINISHED_FILE
    if unfinished.exists():
        reason = unfinished.read_text(encoding="utf-8").strip()
        raise ConfigError(f"{workdir} is no run yet ({reason}): delete it, and make it again")
    if not is_same_run(workdir, config):
        store_tokenizer(workdir, config.data)
        return
    files = [field for field in FIELDS if names_file(config.data, field)]
    if any(read_stored(workdir, field) is None for field in files):
        store_tokenizer(workdir, config.data)


def is_same_run(workdir: RunPath, config: RunConfig) -> bool:
    """Returns whether a directory holds this run, or False if it holds none. Writes nothing.

    Raises ConfigError for another run, as `check_workdir` does.
    """
    saved = read_saved_config(workdir)
    if saved is None:
        return False
    differing = differing_fields(saved, config, allowed=("train.steps",))
    if differing:
        raise ConfigError(
            f"{workdir} holds a run of another config ({'; '.join(differing)}): set another workdir"
        )
    use_stored_tokenizer(workdir, config)
    if config.train.steps != saved.train.steps:
        _check_steps(workdir, saved, config)
    return True


def _check_steps(workdir: RunPath, saved: RunConfig, config: RunConfig) -> None:
    """Raises ConfigError if a run cannot go on with the number of steps of `config`.

    It cannot if it has trained that many already. A "wsd" run cannot either once it decays, since
    its stable phase, from which others may fork, would then have a decay in it.
    """
    before, after = saved.train.steps, config.train.steps
    trained = max(checkpoint_steps(workdir / "checkpoints"), default=0)
    if after <= trained:
        raise ConfigError(
            f"train.steps={after} is not more than the {trained} steps that {workdir} has trained: "
            f"set train.steps to {before}, or to more than {trained}"
        )
    shared = saved.shared_updates(config)
    if config.optimizer.schedule == "wsd" and trained > shared:
        raise ConfigError(
            f"train.steps={after} has other learning rates from step {shared} on, and {workdir} "
            f"has trained {trained} steps with train.steps={before}: fork it instead, with a new "
            f"workdir, --fork_from={workdir} and a --fork_step of at most {shared}"
        )


class MetricWriter:
    """Appends metrics to the files of a run directory.

    Only one process of a run opens it. `step` is the step from which the run starts or resumes.
    Lines of later steps, which an interrupted run has written, are dropped, so the files of a
    resumed run read like those of an uninterrupted one. This needs the metrics of a step to be
    written before its checkpoint. `check` raises an error if another process owns the run now.
    """

    def __init__(
        self, workdir: RunPath, config: TrackingConfig, step: int, check: Check = unchecked
    ):
        self._workdir = workdir
        for path in (workdir / METRICS_FILE, workdir / ROUTER_FILE, workdir / HOSTS_FILE):
            _drop_later_lines(path, step, check)
        if not (workdir / METRICS_FILE).exists():
            # This marks a run that has not logged anything yet as a run.
            check()
            write_whole(workdir / METRICS_FILE, "")
        self._metrics = LineWriter(workdir / METRICS_FILE, check)
        self._router = LineWriter(workdir / ROUTER_FILE, check)
        self._hosts = LineWriter(workdir / HOSTS_FILE, check)
        self._tensorboard = _open_tensorboard(workdir, step, check) if config.tensorboard else None

    def write(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        layers: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Writes the scalars of one step.

        In a file system metrics.jsonl holds them when this returns. In an object store it holds
        them after `flush`, or after a call of this that comes ten seconds or more after the last
        writing. `layers` are arrays [L, ...] over the sparse layers of a model. They go to
        router.jsonl, rounded to five digits.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.append(_format_line(step, values))
        if layers:
            rounded = {name: _round_digits(value.tolist()) for name, value in layers.items()}
            self._router.append(_format_line(step, rounded))
        if self._tensorboard:
            self._tensorboard.write(step, values)

    def write_hosts(self, times: HostTimes) -> None:
        """Writes how long the steps up to a logged one took on each host, to five digits."""
        values = {
            "step_seconds": _round_digits([*times.step_seconds]),
            "host_seconds": _round_digits([*times.host_seconds]),
        }
        self._hosts.append(_format_line(times.step, values))

    def flush(self) -> None:
        """Writes the lines that were not written yet, as before a checkpoint of their step."""
        self._metrics.flush()
        self._router.flush()
        self._hosts.flush()

    def close(self) -> None:
        """Writes what was not written yet."""
        self.flush()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Each try takes half a minute where the store does not answer.
        if not is_lost(self._workdir, error):
            self.close()


def copy_lines(source: RunPath, workdir: RunPath, step: int, check: Check) -> None:
    """Copies the metrics of another run up to `step`, with which a fork's own files begin."""
    for name in (METRICS_FILE, ROUTER_FILE):
        lines = [
            _format_line(line_step, values)
            for line_step, values in _parse_lines(line_parts(source / name), _decode)
            if line_step <= step
        ]
        if lines:
            check()
            write_whole(workdir / name, "".join(lines))


def read_metrics(workdir: RunPath) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl in order: `step` is an int, every other value a float.

    A last line that is still being written is left out. Raises FileNotFoundError, and ConfigError
    where the file is damaged.
    """
    path = workdir / METRICS_FILE
    parts = line_parts(path)
    if not parts:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return [{"step": step} | values for step, values in _parse_lines(parts, float)]


def read_router(workdir: RunPath, every: int = 1) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Returns the step and the arrays [L, ...] of each line of router.jsonl, in order.

    There are none for a run without sparse layers. If `every` is more than 1, only the first of
    each `every` lines is parsed. Raises ConfigError where the file is damaged.
    """
    parts = line_parts(workdir / ROUTER_FILE)
    return _parse_lines(parts, lambda value: np.array(_decode(value), np.float32), every)


def read_hosts(workdir: RunPath) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Returns the step and the arrays [processes] of each line of hosts.jsonl, in order.

    There are none for a run of one process. Raises ConfigError where the file is damaged.
    """
    parts = line_parts(workdir / HOSTS_FILE)
    return _parse_lines(parts, lambda value: np.array(_decode(value), float))


def write_environment(
    workdir: RunPath,
    attention: str,
    sources: Sequence[Mapping[str, Any]] = (),
    check: Check = unchecked,
    kernels: Mapping[str, Any] | None = None,
) -> None:
    """Appends the machine, packages, compiler flags and attention of a start to environment.jsonl.

    `sources` says what the run reads of each source, as `describe_sources` does, and `kernels` what
    was found out about kernels on this kind of device, if anything.
    """
    environment = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "compiler": {name: os.environ.get(name, "") for name in _COMPILERS},
        "attention": attention,
        "kernels": dict(kernels or {}),
        "sources": list(sources),
        "git": git_state(Path(__file__).resolve()),
    }
    path = workdir / ENVIRONMENT_FILE
    # A killed process may have left half a line. The new line must not become its second half.
    has_half_line = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    lines = LineWriter(path, check)
    lines.append(("\n" if has_half_line else "") + json.dumps(environment) + "\n")
    lines.flush()


def _format_line(step: int, values: Mapping[str, Numbers]) -> str:
    """Returns the line of one step as JSON."""
    line = {"step": step} | {name: _encode(value) for name, value in values.items()}
    return json.dumps(line) + "\n"


def _encode(value: Numbers) -> Any:
    """Returns numbers for JSON: those that are not finite become strings."""
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value if math.isfinite(value) else json.dumps(value)


def _decode(value: Any) -> Numbers:
    """Returns the numbers that `_encode` was given."""
    return [_decode(item) for item in value] if isinstance(value, list) else float(value)


def _round_digits(value: Numbers) -> Numbers:
    """Rounds numbers to five significant digits."""
    if isinstance(value, list):
        return [_round_digits(item) for item in value]
    return float(f"{value:.5g}")


def _parse_lines(
    parts: Sequence[RunPath], decode: Callable[[Any], T], every: int = 1
) -> Iterator[tuple[int, dict[str, T]]]:
    """Yields the step and the values of each line, or of the first of each `every` lines."""
    for path in parts:
        for number, line in enumerate(read_lines(path)):
            if number % every:
                continue
            try:
                values = json.loads(line)
                step = operator.index(values.pop("step"))
                yield step, {name: decode(value) for name, value in values.items()}
            except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
                # kill -9 can cut the last line short. Any other broken line is damage, and to skip
                # it would hide that.
                if line.endswith("\n"):
                    raise ConfigError(
                        f"{path}, line {number + 1} is not a JSON object of a step and numbers: "
                        "delete that line"
                    ) from None


def _drop_later_lines(path: RunPath, step: int, check: Check) -> None:
    """Removes the lines of steps after `step` from a file, if there is one.

    A kill leaves the old file or the new one, never half of either. In an object store a file may
    consist of several parts. The last part is removed first, so that a kill leaves no gap between
    the parts.
    """
    for part in reversed(line_parts(path)):
        is_empty = True
        check()
        with open_whole(part) as file:
            for line_step, values in _parse_lines([part], _decode):
                if line_step <= step:
                    file.write(_format_line(line_step, values).encode())
                    is_empty = False
        if not is_empty:
            return
        if part != path:
            check()
            part.unlink()


def _open_tensorboard(workdir: RunPath, step: int, check: Check) -> "TensorBoard":
    """Opens TensorBoard's copy of the metrics."""
    # TensorBoard is imported only here because importing it takes half a second, and reading
    # metrics does not need it.
    from moe.workdir.tensorboard import TensorBoard

    return TensorBoard(workdir / "tensorboard", step, check)


def _version(package: str) -> str | None:
    """Returns the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """Returns the platform, the kinds and the number of JAX's devices."""
    import jax

    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "platform": jax.default_backend(),
        "kinds": kinds,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def git_state(file: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout that tracks `file`, and whether it has changes.

    The result is None if no checkout tracks the file (as in an installed package) or without git.
    """
    try:
        # A virtual environment may lie inside somebody else's checkout, whose commit says nothing
        # about this library. So git is first asked whether it tracks this very file.
        _git(file, "ls-files", "--error-unmatch", file.name)
        description = _git(file, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": description.removesuffix("-dirty"), "dirty": description.endswith("-dirty")}


def _git(file: Path, *arguments: str) -> str:
    """Returns what a git command prints in the directory of `file`."""
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(
        command, cwd=file.parent, capture_output=True, encoding="utf-8", timeout=10, check=True
    ).stdout.strip()
