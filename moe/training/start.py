"""Prepares a run for its first step, and a saved run for being used.

A run is checked before anything is allocated. Then its lock is taken, and its state is made,
restored, or started from another run's.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from moe.config import ConfigError, MeshConfig, RunConfig
from moe.data.mixtures import TrainingRows, describe_sources
from moe.data.rows import JoinedRows, source_line
from moe.parallel import watch
from moe.parallel.cluster import is_restarted
from moe.parallel.distributed import from_first
from moe.parallel.mesh import device_bytes
from moe.scaling.hardware import memory_bytes
from moe.storage.owner import (
    RESTART_WAIT_SECONDS,
    Check,
    Ownership,
    check_lease,
    own_run,
    unchecked,
)
from moe.storage.paths import RunPath, run_path
from moe.tasks import Task
from moe.training.log import Records
from moe.training.optimizer import make_schedule
from moe.training.progress import Bar, Stream
from moe.training.train_step import Program, TrainState, make_program
from moe.workdir import checkpoint
from moe.workdir.checkpoint import Checkpoints
from moe.workdir.first_lines import first_lines
from moe.workdir.identity import read_config, read_saved_config, use_stored_tokenizer, write_config
from moe.workdir.origin import read_state, read_variables, write_origin
from moe.workdir.source import Origin, Source, find_origin
from moe.workdir.tracking import MetricWriter, check_workdir, copy_lines, write_environment

_VISIBLE_SECONDS = 60.0
T = TypeVar("T")


def check_memory(mesh: jax.sharding.Mesh, *trees: Any) -> None:
    """Raises ConfigError if arrays of these shapes and shardings exceed the devices' memory.

    No array is made. Each device of `mesh` must have room for its own shards.
    """
    devices = [
        device for device in mesh.devices.flat if device.process_index == jax.process_index()
    ]
    # A CPU's virtual devices share the machine's memory.
    sharers = len(devices) if devices[0].platform == "cpu" else 1
    needed, memory = sharers * device_bytes(trees), memory_bytes(devices[0])
    if needed > memory:
        raise ConfigError(
            f"config.model takes {needed / 2**30:.1f} GiB of memory without its activations, and "
            f"there are {memory / 2**30:.1f} GiB: "
            "split it over more devices (mesh.fsdp, which commands that read a run choose "
            "themselves), or take a smaller model"
        )


def check_finite(checkpoint_path: RunPath, variables: Any) -> None:
    """Raises ConfigError for the first variable of a checkpoint with NaN or an infinity."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        if not jax.numpy.isfinite(leaf).all():
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ConfigError(
                f"{checkpoint_path} holds numbers that are not finite in {name}: "
                "set the step to that of an earlier checkpoint"
            )


@contextlib.contextmanager
def claim_run(
    workdir: RunPath,
    config: RunConfig,
    source: Source | None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Origin | None, Check]]:
    """Locks a run, checks that it is this one, and yields the checkpoint that it starts from.

    It also yields the function to call before each write, as `lock_run` does. Only process 0 looks
    at the files. It tells the other processes which checkpoint it found, since their hosts may see
    the files later.
    """

    def look() -> tuple[str, int, bool] | None:
        check_workdir(workdir, config)
        origin = find_origin(workdir, config, source)
        return origin and (str(origin.run), origin.step, origin.is_fork)

    with lock_run(workdir, look, interrupted) as (origin, check):
        yield origin and Origin(run_path(origin[0], ask=False), *origin[1:]), check


@contextlib.contextmanager
def lock_run(
    workdir: RunPath, begin: Callable[[], T], interrupted: Callable[[], bool] = lambda: False
) -> Iterator[tuple[T, Check]]:
    """Makes this job the only one that writes the run.

    It yields what `begin` returned in process 0, once that process had the lock, and a function
    that each process must call before each write: it raises LostRun if another job has taken the
    run. Raises ConfigError if another job is writing it. If a scheduler has started this job again,
    the other one gets some minutes to end. From here on the logs of the job's processes are in the
    directory of the run.
    """
    wait_seconds = RESTART_WAIT_SECONDS if is_restarted(os.environ) else 0.0
    ownership = Ownership(unchecked)
    with contextlib.ExitStack() as stack:

        def lock() -> tuple[int | None, T]:
            nonlocal ownership
            sleep = functools.partial(_sleep_unless, interrupted)
            ownership = stack.enter_context(own_run(workdir, wait_seconds, sleep))
            return ownership.lease, begin()

        lease, value = from_first("the lock of the run", lock)
        check = ownership.check
        if jax.process_index() > 0 and lease is not None:
            check = functools.partial(check_lease, workdir, lease)
        watch.log_into(workdir, lease)
        yield value, check


def _sleep_unless(interrupted: Callable[[], bool], seconds: float) -> None:
    """Sleeps. Raises KeyboardInterrupt if a signal has asked this process to stop."""
    time.sleep(seconds)
    if interrupted():
        raise KeyboardInterrupt


def first_state(
    config: RunConfig,
    workdir: RunPath,
    program: Program,
    checkpoints: Checkpoints,
    rows: TrainingRows,
    validation: JoinedRows,
    origin: Origin | None,
    bar: Bar,
    check: Check,
) -> TrainState:
    """Returns the state of the run's latest checkpoint, or that of a new run.

    The checkpoint must be of a run on these rows, which all processes must have. A new run starts
    from `origin`, if there is one. It saves its first state at once, so that the other run is not
    needed later.
    """
    rows_sha256, validation_sha256 = rows.rows.sha256, validation.sha256
    _check_same_rows(rows_sha256, validation_sha256)
    latest = from_first("the step to restore", checkpoints.latest_step)
    if latest is not None:
        bar.show(f"restoring step {latest}")
        wait_for_step(checkpoints, latest)
        checkpoint.check_rows(checkpoints, rows_sha256, latest, validation_sha256)
        return checkpoint.restore(checkpoints, program.abstract_state, latest)
    if origin is None:
        bar.show("initialising the parameters")
        return program.init_state()
    bar.show(f"restoring step {origin.step} of {origin.run}")
    run_path(origin.run)  # whose bucket this host may be unable to reach
    start = fork_from if origin.is_fork else start_from
    state = start(origin, workdir, program, rows_sha256, check)
    checkpoint.save(checkpoints, config, rows_sha256, state, validation_sha256)
    return state


def _check_same_rows(*checksums: str) -> None:
    """Raises ConfigError if process 0, whose files may be others, has other rows than this one."""
    first = from_first("the checksums of the rows", lambda: checksums)
    for split, ours, theirs in zip(("train", "validation"), checksums, first, strict=True):
        if ours != theirs:
            raise ConfigError(
                f"data.directory on this host has {split} rows with checksum {ours[:8]}, and on "
                f"that of process 0 with {theirs[:8]}: give all hosts the same files"
            )


def wait_for_step(checkpoints: Checkpoints, step: int) -> None:
    """Waits until this host sees the checkpoint that process 0 has chosen.

    A shared file system may show files late. Raises ConfigError if it never shows this one.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while step not in checkpoints.all_steps():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{checkpoints.directory} has no step {step} on this host, and process 0 sees it: "
                "set workdir to a directory that all hosts share"
            )
        time.sleep(0.1)


def start_from(
    origin: Origin, workdir: RunPath, program: Program, _: str, check: Check
) -> TrainState:
    """Returns a new run's state with the model's variables of another run's checkpoint.

    It also writes down in `workdir` which checkpoint that is. Raises ConfigError if the checkpoint
    holds numbers that are not finite.
    """
    state = program.init_state()
    variables = read_variables(origin, program.abstract_state)
    check_finite(origin.run / "checkpoints" / str(origin.step), variables)
    if jax.process_index() == 0:
        write_origin(workdir, origin, check)
    return state.replace(**variables)


def fork_from(
    origin: Origin, workdir: RunPath, program: Program, rows_sha256: str, check: Check
) -> TrainState:
    """Returns the whole state of another run's checkpoint, from which this run goes on.

    It also writes down in `workdir` which checkpoint that is, and copies the metrics up to it.
    Raises ConfigError if the checkpoint was trained on other rows than these.
    """
    state = read_state(origin, program.abstract_state, rows_sha256)
    if jax.process_index() == 0:
        copy_lines(origin.run, workdir, origin.step, check)
        write_origin(workdir, origin, check)
    return state


def show_first_lines(config: RunConfig, workdir: RunPath, mesh: jax.sharding.Mesh) -> None:
    """Prints, only on process 0, what the run runs on and where it writes."""
    if jax.process_index() == 0:
        print(first_lines(config, workdir, mesh), file=Stream(sys.stderr), flush=True)


def show_sources(config: RunConfig, rows: TrainingRows) -> list[dict[str, Any]]:
    """Prints, only on process 0, how much the run reads of each source, and returns it."""
    sources = describe_sources(config, rows)
    if jax.process_index() == 0:
        lines = [f"data:     {source_line(source)}" for source in sources]
        print("\n".join(lines), file=Stream(sys.stderr), flush=True)
    return sources


def report_new_schedule(workdir: RunPath, config: RunConfig, state: TrainState) -> None:
    """Logs how the learning rate changes if the run was begun with another number of steps."""
    before, update = read_saved_config(workdir), int(state.step) - int(state.skipped)
    if before and before.train.steps != config.train.steps:
        old, new = (np.asarray(make_schedule(run)(update)).item() for run in (before, config))
        logging.warning(
            "train.steps is %d now, and was %d: "
            "at step %d the learning rate goes from %.3g, of the old schedule, to %.3g",
            *(config.train.steps, before.train.steps, int(state.step), old, new),
        )


@contextlib.contextmanager
def open_records(
    workdir: RunPath,
    config: RunConfig,
    program: Program,
    sources: Sequence[Mapping[str, Any]],
    step: int,
    check: Check = unchecked,
    kernels: Mapping[str, Any] | None = None,
) -> Iterator[Records]:
    """Yields the functions that write to the run's files.

    What was written must be flushed before a checkpoint is saved. Among a run's processes, only the
    first one writes.
    """
    if jax.process_index() > 0:
        yield Records(lambda step, metrics, layers=None, /: None, lambda times: None, lambda: None)
        return
    write_config(workdir, config, check)
    write_environment(workdir, program.attention, sources, check, kernels)
    logging.info("attention: %s", program.attention)
    with MetricWriter(workdir, config.tracking, step, check) as writer:
        yield Records(writer.write, writer.write_hosts, writer.flush)


def load_run(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    *,
    task: Task | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, Program, Any, int]:
    """Returns the config, program, model variables and step of a run's checkpoint.

    The checkpoint is the latest one if `step` is None. A run of a custom task needs its `task`.
    `kernels` is what `launch.kernel_check` found out here, whatever the run itself has used. The
    mesh of the run does not matter. Here the size of the fsdp axis, which splits the parameters, is
    the greatest common divisor of the number of devices and the model's width. Raises ConfigError
    if there is no such run or step.
    """
    workdir = run_path(workdir)
    config = use_stored_tokenizer(workdir, read_config(workdir), must_match=False)
    devices = jax.device_count()
    mesh = MeshConfig(data=-1, fsdp=math.gcd(config.model.model_dim, devices))
    # The devices must be able to split a batch, so the batch size is rounded up to a multiple.
    batch_size = -(-config.train.batch_size // devices) * devices
    train = dataclasses.replace(config.train, batch_size=batch_size, accumulation=1)
    config = dataclasses.replace(config, mesh=mesh, train=train)
    program = make_program(config, task=task, refused=(kernels or {}).get("refused"))
    check_memory(program.mesh, program.abstract_state.variables)
    with checkpoint.read_checkpoints(workdir) as checkpoints:
        variables, step = checkpoint.restore_variables_and_step(
            checkpoints, program.abstract_state, step
        )
        return config, program, variables, step
