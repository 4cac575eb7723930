"""fit(): one run, from a checked config to its last checkpoint. The loop; nothing in it computes."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe import losses
from moe.config import ConfigError, MeshConfig, RunConfig
from moe.data.loader import evaluation_batches, make_loader
from moe.data.prepare import PreparedRows, prepare
from moe.files import sole
from moe.parallel.mesh import global_batch, host_rows
from moe.scaling.flops import training_flops_per_token
from moe.scaling.hardware import memory_bytes, peak_flops
from moe.training.optimizer import make_schedule
from moe.training.progress import Bar
from moe.training.signals import catch_signals
from moe.training.train_step import Program, TrainState, make_program
from moe.workdir import checkpoint
from moe.workdir.identity import LOCK_FILE, read_config, read_saved_config, write_config
from moe.workdir.origin import Origin, find_origin, read_variables, write_origin
from moe.workdir.tracking import MetricWriter, check_workdir, read_metrics, write_environment

Record = Callable[
    ..., None
]  # tracking.MetricWriter.write: (step, metrics by name, arrays over sparse layers by name)


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is saved, and the same call goes on from there."""


class Diverged(Exception):
    """Too many updates in a row had a loss or gradient that was not finite, or the validation of
    the last state is not.
    """


def fit(
    config: RunConfig,
    workdir: Path,
    devices: list[jax.Device] | None = None,
    *,
    init_from: Path | None = None,
    init_step: int | None = None,
) -> dict[str, float]:
    """Trains to `config.train.steps`, from the run's latest checkpoint if `workdir` has one;
    returns the last validation metrics.

    These steps may be more than the run began with. A new run starts from the parameters of step
    `init_step` (the latest) of the run in `init_from`, if that is given; all else of its state is
    new.

    Raises ConfigError for a workdir of another config or that another process writes, OSError where
    a checkpoint cannot be saved, Interrupted on SIGINT or SIGTERM once the state is saved, and
    Diverged.
    """
    with lock_run(workdir):
        return _fit(config, workdir, devices, init_from, init_step)


def _fit(
    config: RunConfig,
    workdir: Path,
    devices: list[jax.Device] | None,
    init_from: Path | None,
    init_step: int | None,
) -> dict[str, float]:
    """Does what fit() says, for the one process that holds the run's lock."""
    check_workdir(workdir, config)
    origin = find_origin(workdir, config.model, init_from, init_step)
    program = make_program(config, devices)
    check_memory(
        program.mesh, program.abstract_state, program.abstract_state.params
    )  # a gradient is as large as the parameters
    train_rows = prepare(config.data, config.data.train_split)
    validation_rows = prepare(config.data, config.data.validation_split)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(catch_signals())
        bar = stack.enter_context(Bar(config.train.steps, shown=jax.process_index() == 0))
        checkpoints = stack.enter_context(checkpoint.open_checkpoints(workdir, config))
        latest = checkpoints.latest_step()
        bar.show("initialising the parameters" if latest is None else f"restoring step {latest}")
        state = first_state(checkpoints, program, train_rows)
        if latest is None and origin:
            bar.show(f"restoring the parameters of step {origin.step} of {origin.run}")
            state = start_from(origin, workdir, program, state)
            checkpoint.save(
                checkpoints, config, train_rows.sha256, state
            )  # from here on the other run is not needed
        start = int(state.step)
        report_new_schedule(workdir, config, state)
        record = stack.enter_context(open_records(workdir, config, program, start))
        log = Log(config, program, record, bar)
        batches = stack.enter_context(
            train_batches(config, program, train_rows, int(state.examples))
        )
        stack.enter_context(jax.set_mesh(program.mesh))
        bar.show(
            f"{'starting' if latest is None else f'resuming from step {start}'}: compiling the training step"
        )
        for step in range(start + 1, config.train.steps + 1):
            state, metrics = program.train_step(state, log.next_batch(batches))
            log.add(step, metrics)
            last, stop = step == config.train.steps, interrupted()
            if last or step % config.train.eval_every == 0:
                log.pause()
                bar.show(f"evaluating step {step}")
                values = evaluate(config, program, state.variables, validation_rows)
                record(step, {f"validation/{name}": value for name, value in values.items()})
            if last or stop or step % config.train.checkpoint_every == 0:
                # a step's metrics are written before its checkpoint, so that resuming loses none
                log.pause()
                bar.show(f"{'stopping: ' if stop else ''}saving step {step}")
                checkpoint.save(checkpoints, config, train_rows.sha256, state)
            if stop:
                break
    if (
        interrupted()
    ):  # also in the last step or while it was saved, so that a caller does not begin another run
        raise Interrupted(
            f"{workdir} stopped at step {int(state.step)} and saved: run the same command again to go on"
        )
    metrics = last_validation(workdir)
    check_outcome(int(state.step), int(state.skipped), metrics)
    return metrics


def start_from(origin: Origin, workdir: Path, program: Program, state: TrainState) -> TrainState:
    """The state of a new run with the model's variables of another run's checkpoint, which
    `workdir` notes down.
    """
    variables = read_variables(origin, program.abstract_state)
    check_finite(origin.run / "checkpoints" / str(origin.step), variables)
    if jax.process_index() == 0:
        write_origin(workdir, origin)
    return state.replace(**variables)


def report_new_schedule(workdir: Path, config: RunConfig, state: TrainState) -> None:
    """Logs what the learning rate becomes where a run goes on to another number of steps than it
    was told before.
    """
    before, update = read_saved_config(workdir), int(state.step) - int(state.skipped)
    if before and before.train.steps != config.train.steps:
        rates = [float(make_schedule(run)(update)) for run in (before, config)]
        logging.warning(
            "train.steps is %d now, and was %d: at step %d the learning rate goes from %.3g, of the old schedule, to %.3g",
            *(config.train.steps, before.train.steps, int(state.step), *rates),
        )


def check_memory(mesh: jax.sharding.Mesh, *trees: Any) -> None:
    """Raises ConfigError where arrays of these shapes and shardings cannot fit in the memory of the
    mesh's devices, before any is made.
    """
    devices = [
        device for device in mesh.devices.flat if device.process_index == jax.process_index()
    ]
    sharers = (
        len(devices) if devices[0].platform == "cpu" else 1
    )  # a CPU's virtual devices share the machine's memory
    needed = sharers * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(trees)
    )
    memory = memory_bytes(devices[0])
    if needed > memory:
        raise ConfigError(
            f"config.model takes {needed / 2**30:.1f} GiB of memory without its activations, and there are {memory / 2**30:.1f} GiB: "
            "split it over more devices (mesh.fsdp), or set a smaller model"
        )


def check_finite(checkpoint_path: Path, variables: Any) -> None:
    """Raises ConfigError naming the first of a checkpoint's variables that holds NaN or an
    infinity.
    """
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        if not jax.numpy.isfinite(leaf).all():
            raise ConfigError(
                f"{checkpoint_path} holds numbers that are not finite in {jax.tree_util.keystr(keys, simple=True, separator='/')}: "
                "set the step to that of an earlier checkpoint"
            )


def check_outcome(step: int, skipped: int, metrics: Mapping[str, float]) -> None:
    """Raises Diverged where a run came to its end without learning: every update was skipped, or
    the validation is not finite.
    """
    advice = "lower optimizer.learning_rate, or look at the data"
    if step and skipped == step:
        raise Diverged(
            f"step {step}: every update had a loss or gradient that was not finite, and was skipped: {advice}"
        )
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}: {advice}")


@contextlib.contextmanager
def lock_run(workdir: Path) -> Iterator[None]:
    """Makes this process the only one that writes the run. Raises ConfigError where another one
    does.

    Of a run's processes, the first alone holds the lock.
    """
    if jax.process_index() > 0:
        yield
        return
    with sole(workdir / LOCK_FILE) as holder:
        if holder:
            raise ConfigError(
                f"{workdir} is being written by {holder}: wait until it ends, or set another --workdir"
            )
        yield


def first_state(checkpoints: Any, program: Program, rows: PreparedRows) -> TrainState:
    """The state of the latest checkpoint, which must have been trained on these rows, or that of a
    new run.
    """
    if checkpoints.latest_step() is None:
        return program.init_state()
    checkpoint.check_rows(checkpoints, rows.sha256)
    return checkpoint.restore(checkpoints, program.abstract_state)


@contextlib.contextmanager
def open_records(workdir: Path, config: RunConfig, program: Program, step: int) -> Iterator[Record]:
    """Yields the function that writes a step's metrics; of a run's processes, the first alone
    writes.
    """
    if jax.process_index() > 0:
        yield lambda step, metrics, layers=None: None
        return
    write_config(workdir, config)
    write_environment(workdir, program.attention)
    logging.info("attention: %s", program.attention)
    with MetricWriter(workdir, config.tracking, step) as writer:
        yield writer.write


def load_run(workdir: Path, step: int | None = None) -> tuple[RunConfig, Program, Any, int]:
    """The config, program, model variables and step of a run's checkpoint (the latest, by default),
    on this machine's devices.

    Parameters are split over as many devices as divide them, however the run was laid out. Raises
    ConfigError where there is no such run or step.
    """
    config = read_config(workdir)
    devices = jax.device_count()
    mesh = MeshConfig(data=-1, fsdp=math.gcd(config.model.model_dim, devices))
    rows = -(-config.train.batch_size // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation=1)
    config = dataclasses.replace(config, mesh=mesh, train=train)
    program = make_program(config)
    check_memory(program.mesh, program.abstract_state.variables)
    with checkpoint.read_checkpoints(workdir) as checkpoints:
        variables, step = checkpoint.restore_variables_and_step(
            checkpoints, program.abstract_state, step
        )
        return config, program, variables, step


@contextlib.contextmanager
def train_batches(
    config: RunConfig, program: Program, rows: PreparedRows, examples: int
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """The run's endless stream of global batches, from the `examples`-th row on; read ahead until
    the context ends.
    """
    size = config.train.batch_size
    held = host_rows(program.mesh, size)
    loader = make_loader(rows, batch_size=size, seed=config.seed, examples=examples, host_rows=held)
    with contextlib.closing(loader):
        yield (global_batch(batch, program.mesh, size) for batch in loader)


def evaluate(
    config: RunConfig, program: Program, variables: Any, rows: PreparedRows
) -> dict[str, float]:
    """Loss (nats per token) and bits per byte over `config.train.eval_batches` batches of a split,
    all if that is 0.

    For sparse layers also means over them of `max_vio`, `load_entropy` and `dropped_fraction` of
    the load over all these batches.
    """
    size = config.train.batch_size
    held = host_rows(program.mesh, size)
    totals: losses.Sums = {}
    with jax.set_mesh(program.mesh):
        for batch in evaluation_batches(
            rows, batch_size=size, num_batches=config.train.eval_batches, host_rows=held
        ):
            sums = program.eval_step(variables, global_batch(batch, program.mesh, size))
            totals = jax.tree.map(lambda a, b: a + b, totals, sums) if totals else sums
    metrics = losses.metrics(totals)
    loss = float(metrics["loss"])
    values = {
        "loss": loss,
        "bits_per_byte": losses.bits_per_byte(loss, rows.num_targets, rows.num_bytes),
    }
    router = router_summary(metrics.get("router", {}))
    return values | {
        name: router[name]
        for name in ("max_vio", "load_entropy", "dropped_fraction")
        if name in router
    }


def router_summary(router: Mapping[str, Any]) -> dict[str, float]:
    """One number for each of the router's statistics [L] (`losses.metrics`); none for a dense
    model.

    Means over the sparse layers, except `dead_experts`, their sum, `bias_range`, the largest, and
    `worst_max_vio`, the largest `max_vio`.
    """
    reductions = {"dead_experts": np.sum, "bias_range": np.max}
    values = {
        name: reductions.get(name, np.mean)(value)
        for name, value in router.items()
        if name != "load"
    }
    if router:
        values["worst_max_vio"] = np.max(router["max_vio"])
    return {name: float(value) for name, value in values.items()}


def last_validation(workdir: Path) -> dict[str, float]:
    """The newest validation metrics of a run; none where its metrics.jsonl has none."""
    lines = [line for line in read_metrics(workdir) if "validation/loss" in line]
    return {
        name: value
        for line in lines[-1:]
        for name, value in line.items()
        if name.startswith("validation/")
    }


class Log:
    """The metrics of training steps, written and shown; read one step late so that devices never
    wait for the host.
    """

    def __init__(self, config: RunConfig, program: Program, record: Record, bar: Bar):
        self._config, self._record, self._bar = config, record, bar
        devices = list(program.mesh.devices.flat)
        self._peak = peak_flops(devices)
        self._flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._restart_clock(None)

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; the wait for it is a metric."""
        begin = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begin
        return batch

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before. Raises
        Diverged.
        """
        self._read()
        self._pending = (step, metrics)

    def pause(self) -> None:
        """Reads the last step's metrics before something else takes the devices; its time is not
        counted as training.
        """
        self._read()
        self._restart_clock(None)

    def _restart_clock(self, now: float | None) -> None:
        """Begins to count steps and waits from `now`, or, where that is None, from the end of the
        next step, which may compile.
        """
        self._started, self._steps, self._waited = now, 0, 0.0

    def _read(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        skipped_in_row = int(metrics["skipped_in_row"])  # waits for the step
        self._bar.step(step)
        if self._started is None:
            self._restart_clock(time.perf_counter())
        else:
            self._steps += 1
        if step % self._config.train.log_every == 0:
            self._write(step, metrics)
        if skipped_in_row >= self._config.train.max_skipped_steps:
            raise Diverged(
                f"step {step}: {skipped_in_row} updates in a row had a loss or gradient that was not finite: "
                "lower optimizer.learning_rate, or look at the data of these steps"
            )

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        values = {
            f"train/{name}": float(metrics[name])
            for name in ("loss", "gradient_norm", "learning_rate", "skipped_steps")
        }
        layers = {name: np.asarray(value) for name, value in metrics.get("router", {}).items()}
        values |= self._rates() | {
            f"router/{name}": value for name, value in router_summary(layers).items()
        }
        self._record(step, values, layers)
        self._bar.show_metrics(postfix(values))

    def _rates(self) -> dict[str, float]:
        """Speeds since the clock was restarted, which this does again; none where no step has ended
        since.
        """
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._started
        tokens = self._config.train.batch_size * self._config.data.sequence_length * self._steps
        values = {
            "train/tokens_per_second": tokens / seconds,
            "train/data_wait_fraction": self._waited / seconds,
        }
        if self._peak:
            values["train/mfu"] = tokens / seconds * self._flops_per_token / self._peak
        self._restart_clock(time.perf_counter())
        return values


def postfix(values: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows of a step's metrics."""
    texts = {"loss": f"{values['train/loss']:.3f}"}
    if "train/tokens_per_second" in values:
        texts["tokens/s"] = f"{values['train/tokens_per_second']:.3g}"
    if "train/mfu" in values:
        texts["MFU"] = f"{values['train/mfu']:.1%}"
    if "router/worst_max_vio" in values:
        texts["MaxVio"] = f"{values['router/worst_max_vio']:.2f}"
        if values["router/dropped_fraction"]:
            texts["dropped"] = f"{values['router/dropped_fraction']:.1%}"
    if values["train/skipped_steps"]:
        texts["skipped"] = f"{values['train/skipped_steps']:.0f}"
    return texts
