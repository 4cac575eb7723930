"""Holds `fit`, the loop that trains a run from a checked config to its last checkpoint."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from moe.config import RunConfig, TrainConfig
from moe.data.loader import make_loader
from moe.data.mixtures import TrainingRows, open_training, open_validation
from moe.data.rows import JoinedRows
from moe.parallel import watch
from moe.parallel.distributed import from_first
from moe.parallel.mesh import global_batch, host_rows
from moe.storage.owner import Check
from moe.storage.paths import RunPath, run_path
from moe.tasks import Task
from moe.tasks.task import Batch
from moe.training.evaluation import evaluate_sources, is_validated, last_validation
from moe.training.log import Log, Records
from moe.training.profile import Profile, open_profile
from moe.training.progress import Bar
from moe.training.signals import catch_signals
from moe.training.start import (
    check_memory,
    claim_run,
    first_state,
    load_run,
    open_records,
    report_new_schedule,
    show_first_lines,
    show_sources,
)
from moe.training.train_step import Program, TrainState, make_program
from moe.training.vote import Vote, asks_to_stop
from moe.workdir import checkpoint
from moe.workdir.checkpoint import Checkpoints
from moe.workdir.identity import use_stored_tokenizer
from moe.workdir.source import Origin, read_source

__all__ = ["Diverged", "Interrupted", "fit", "load_run"]

_ADVICE = "lower optimizer.learning_rate, or look at the data"


class Interrupted(Exception):
    """Says that SIGINT or SIGTERM arrived. The state is saved, and the same call resumes."""


class Diverged(Exception):
    """Says that updates in a row were skipped, or that the last validation is not finite.

    An update is skipped if its loss or its gradient is not finite.
    """


class _Run(NamedTuple):
    """Holds the open parts of a run while it trains."""

    config: RunConfig
    program: Program
    train_rows: TrainingRows
    validation_rows: JoinedRows
    checkpoints: Checkpoints
    records: Records
    bar: Bar
    vote: Vote  # whether a signal or the end of the job has asked the run to stop
    profile: Profile | None


class Start(NamedTuple):
    """Says what a run starts from, once its lock is held."""

    origin: Origin | None  # the checkpoint, of this run or of another one
    check: Check  # is called before each write
    kernels: Mapping[str, Any]  # what was found out about kernels on this kind of device


def fit(
    config: RunConfig,
    workdir: str | os.PathLike[str],
    devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # a class
    *,
    task: Task | None = None,
    init_from: str | os.PathLike[str] | None = None,
    init_step: int | None = None,
    fork_from: str | os.PathLike[str] | None = None,
    fork_step: int | None = None,
    profile_steps: range | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Trains to `config.train.steps` and returns the last validation metrics.

    If `workdir` has a checkpoint, the run goes on from the latest one, and may train to more steps
    than it began with. Otherwise it is new. A new run takes its parameters and router biases from
    step `init_step` (by default, the latest) of the run in `init_from`, if that is given. The rest
    of its state is new. If `fork_from` is given instead, it takes the whole state of that run's
    step `fork_step`, and becomes bit for bit the run of `config` without a fork. `task` is the
    caller's own, where `config.task` is "custom". Each process writes a trace of `profile_steps`,
    if these are given, into the folder `profile`. `kernels` is what `launch.kernel_check` found.

    Raises ConfigError if the workdir holds a run of another config or if another process writes
    it, OSError if a checkpoint cannot be saved, Interrupted on SIGINT or SIGTERM once the state is
    saved, and Diverged.
    """
    watch.report("preparing")
    source = read_source(init_from, init_step, fork_from, fork_step)
    with catch_signals() as interrupted:
        kernels = kernels or {}
        program = make_program(config, devices, task=task, refused=kernels.get("refused"))
        # A model that is too large is refused before the lock is taken, which makes the directory.
        # The parameters count twice, since the gradient is as large as they are.
        check_memory(program.mesh, program.abstract_state, program.abstract_state.params)
        workdir = run_path(workdir)
        with claim_run(workdir, config, source, interrupted) as (origin, check):
            show_first_lines(config, workdir, program.mesh)
            start = Start(origin, check, kernels)
            return _fit(config, workdir, program, start, interrupted, profile_steps)


def _fit(
    config: RunConfig,
    workdir: RunPath,
    program: Program,
    start: Start,
    interrupted: Callable[[], bool],
    profile_steps: range | None,
) -> dict[str, float]:
    """Trains as `fit` does, once this run's lock is held, and returns the last validation."""
    origin, check, kernels = start
    given, config = config, use_stored_tokenizer(workdir, config)
    train_rows = open_training(config, program.task.rows)
    rows = train_rows, open_validation(config, program.task.rows)
    sources = show_sources(config, train_rows)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(config.train.steps, shown=jax.process_index() == 0))
        checkpoints = stack.enter_context(checkpoint.open_checkpoints(workdir, config, check))
        state = first_state(config, workdir, program, checkpoints, *rows, origin, bar, check)
        report_new_schedule(workdir, config, state)
        records = open_records(workdir, given, program, sources, int(state.step), check, kernels)
        records = stack.enter_context(records)
        save_seconds = lambda: checkpoints.longest_save_seconds
        vote = Vote(program.mesh, asks_to_stop(interrupted, os.environ, save_seconds))
        profile = stack.enter_context(open_profile(workdir, profile_steps, int(state.step), check))
        run = _Run(config, program, *rows, checkpoints, records, bar, vote, profile)
        batches = stack.enter_context(_train_batches(run, int(state.examples)))
        stack.enter_context(jax.set_mesh(program.mesh))
        # The run may have been stopped in the evaluation of the step that it goes on from.
        if not _lacks_validation(workdir, config, int(state.step)) or _evaluate(run, state):
            state = _train(run, state, batches)
    # A signal may also arrive in the last step, or while that step is saved. The caller must know
    # of it, so that a sweep does not begin its next run.
    if vote.has_stopped(state.step):
        raise Interrupted(
            f"{workdir} stopped at step {int(state.step)} and saved: "
            "run the same command again to go on"
        )
    metrics = from_first("the last validation", lambda: last_validation(workdir))
    check_outcome(int(state.step), int(state.skipped), metrics)
    return metrics


def _train(run: _Run, state: TrainState, batches: Iterator[Batch]) -> TrainState:
    """Takes the run's steps, evaluates and saves on the way, and returns the last state."""
    train = run.config.train
    log = Log(run.config, run.program, run.records, run.bar)
    start = int(state.step)
    begin = f"resuming from step {start}" if start else "starting"
    run.bar.show(f"{begin}: compiling the training step")
    for step in range(start + 1, train.steps + 1):
        watch.report("training" if log.finished_step else "compiling", step)
        if run.profile:
            run.profile.begin(step)
        state, metrics = run.program.train_step(state, log.next_batch(batches))
        if run.profile:
            run.profile.end(step, metrics)
        log.add(step, metrics)
        _check_skipped(log, train.max_skipped_steps)
        with log.waiting():
            must_stop = run.vote.stops(metrics)
        must_evaluate = _evaluates(train, step)
        if must_evaluate or must_stop or step % train.checkpoint_every == 0:
            # A step's metrics are written before its checkpoint, so that resuming loses none.
            log.pause()
            _check_skipped(log, train.max_skipped_steps)
        # A run that stops leaves the evaluation to the run that goes on from here.
        if must_evaluate and not must_stop:
            must_stop = not _evaluate(run, state)
        if must_stop or step == train.steps or step % train.checkpoint_every == 0:
            run.bar.show(f"{'stopping: ' if must_stop else ''}saving step {step}")
            watch.report("saving")
            run.records.flush()
            sha256, validation_sha256 = run.train_rows.rows.sha256, run.validation_rows.sha256
            checkpoint.save(run.checkpoints, run.config, sha256, state, validation_sha256)
        if must_stop:
            break
    return state


def _evaluate(run: _Run, state: TrainState) -> bool:
    """Evaluates the model and records the result. Returns False if the run must stop instead."""
    run.bar.show(f"evaluating step {int(state.step)}")
    watch.report("evaluating")
    variables, rows = state.variables, run.validation_rows
    values = evaluate_sources(run.config, run.program, variables, rows, run.vote.stops)
    if values:
        metrics = {f"validation/{name}": value for name, value in values.items()}
        run.records.metrics(int(state.step), metrics)
    return bool(values)


def _evaluates(train: TrainConfig, step: int) -> bool:
    """Returns whether the model is evaluated after a step."""
    return step == train.steps or step % train.eval_every == 0


def _lacks_validation(workdir: RunPath, config: RunConfig, step: int) -> bool:
    """Returns whether the evaluation of the step from which a run resumes was not finished."""
    if not step or not _evaluates(config.train, step):
        return False
    # Other hosts may see the files of a run later than process 0 does.
    return not from_first("the validation", lambda: is_validated(workdir, step))


@contextlib.contextmanager
def _train_batches(run: _Run, examples: int) -> Iterator[Iterator[Batch]]:
    """Yields the endless stream of global batches, from the example number `examples` on.

    Batches are read ahead until the context ends.
    """
    mesh, size = run.program.mesh, run.config.train.batch_size
    loader = make_loader(
        run.train_rows,
        batch_size=size,
        examples=examples,
        host_rows=host_rows(mesh, size),
        transform=run.program.task.transform(run.config),
    )
    with contextlib.closing(loader):
        yield (global_batch(fields, mesh, size, run.program.task.dims) for fields in loader)


def _check_skipped(log: Log, max_skipped: int) -> None:
    """Raises Diverged if as many updates in a row were skipped as the config allows."""
    if log.skipped_in_row >= max_skipped:
        raise Diverged(
            f"step {log.finished_step}: {log.skipped_in_row} updates in a row were skipped, since "
            f"their loss or their gradient was not finite: {_ADVICE} of these steps"
        )


def check_outcome(step: int, skipped: int, metrics: Mapping[str, float]) -> None:
    """Raises Diverged if a run came to its end without learning.

    That is so if every update was skipped, or if a validation metric is not finite.
    """
    if step and skipped == step:
        raise Diverged(
            f"step {step}: every update was skipped, since its loss or its gradient was not "
            f"finite: {_ADVICE}"
        )
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}: {_ADVICE}")
