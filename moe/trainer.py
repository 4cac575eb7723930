"""fit(): one run, from a checked config to its last checkpoint. The loop; nothing in it computes."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moe import checkpoint, losses, sharding
from moe.config import ConfigError, MeshConfig, RunConfig
from moe.data.files import sole
from moe.data.loader import evaluation_batches, make_loader
from moe.data.prepare import PreparedRows, prepare
from moe.identity import LOCK_FILE
from moe.scaling.flops import training_flops_per_token
from moe.scaling.hardware import peak_flops
from moe.tracking import MetricWriter, check_workdir, read_config, read_metrics, write_config, write_environment
from moe.train_step import Program, TrainState, make_program

Record = Callable[..., None]  # tracking.MetricWriter.write: (step, metrics by name, arrays over sparse layers by name)


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is saved, and the same call goes on from there."""


class Diverged(Exception):
    """Too many updates in a row had a loss or gradient that was not finite."""


def fit(config: RunConfig, workdir: Path, devices: list[jax.Device] | None = None) -> dict[str, float]:
    """Trains to `config.train.steps`, from the run's latest checkpoint if `workdir` has one; returns the last validation metrics.

    Raises ConfigError for a workdir of another config or that another process writes, OSError where a checkpoint cannot be saved,
    Interrupted on SIGINT or SIGTERM once the state is saved, and Diverged.
    """
    with lock_run(workdir):
        return _fit(config, workdir, devices)


def _fit(config: RunConfig, workdir: Path, devices: list[jax.Device] | None) -> dict[str, float]:
    """Does what fit() says, for the one process that holds the run's lock."""
    check_workdir(workdir, config)
    program = make_program(config, devices)
    train_rows = prepare(config.data, config.data.train_split)
    validation_rows = prepare(config.data, config.data.validation_split)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(catch_signals())
        checkpoints = stack.enter_context(checkpoint.open_checkpoints(workdir, config))
        state = first_state(checkpoints, program, train_rows)
        start = int(state.step)
        record = stack.enter_context(open_records(workdir, config, program, start))
        log = stack.enter_context(Log(config, program, record, start))
        batches = stack.enter_context(train_batches(config, program, train_rows, int(state.examples)))
        stack.enter_context(jax.set_mesh(program.mesh))
        for step in range(start + 1, config.train.steps + 1):
            state, metrics = program.train_step(state, log.next_batch(batches))
            log.add(step, metrics)
            last, stop = step == config.train.steps, interrupted()
            if last or step % config.train.eval_every == 0:
                log.pause()
                values = evaluate(config, program, state.variables, validation_rows)
                record(step, {f"validation/{name}": value for name, value in values.items()})
            if last or stop or step % config.train.checkpoint_every == 0:
                log.pause()  # a step's metrics are written before its checkpoint, so that resuming loses none
                checkpoint.save(checkpoints, config, train_rows.sha256, state)
            if stop and not last:
                raise Interrupted(f"{workdir} stopped at step {step} and saved: run the same command again to go on")
    return last_validation(workdir)


@contextlib.contextmanager
def lock_run(workdir: Path) -> Iterator[None]:
    """Makes this process the only one that writes the run. Raises ConfigError where another one does.

    Of a run's processes, the first alone holds the lock.
    """
    if jax.process_index() > 0:
        yield
        return
    with sole(workdir / LOCK_FILE) as holder:
        if holder:
            raise ConfigError(f"{workdir} is being written by {holder}: wait until it ends, or set another --workdir")
        yield


def first_state(checkpoints: Any, program: Program, rows: PreparedRows) -> TrainState:
    """The state of the latest checkpoint, which must have been trained on these rows, or that of a new run."""
    if checkpoints.latest_step() is None:
        return program.init_state()
    checkpoint.check_rows(checkpoints, rows.sha256)
    return checkpoint.restore(checkpoints, program.abstract_state)


@contextlib.contextmanager
def open_records(workdir: Path, config: RunConfig, program: Program, step: int) -> Iterator[Record]:
    """Yields the function that writes a step's metrics; of a run's processes, the first alone writes."""
    if jax.process_index() > 0:
        yield lambda step, metrics, layers=None: None
        return
    write_config(workdir, config)
    write_environment(workdir, program.attention)
    logging.info("attention: %s", program.attention)
    with MetricWriter(workdir, config.tracking, step) as writer:
        yield writer.write


def load_run(workdir: Path, step: int | None = None) -> tuple[RunConfig, Program, Any, int]:
    """The config, program, model variables and step of a run's checkpoint (the latest, by default), on this machine's devices.

    Parameters are split over as many devices as divide them, however the run was laid out. Raises ConfigError where there is no
    such run or step.
    """
    config = read_config(workdir)
    devices = jax.device_count()
    mesh = MeshConfig(data=-1, fsdp=math.gcd(config.model.model_dim, devices))
    rows = -(-config.train.batch_size // devices) * devices
    train = dataclasses.replace(config.train, batch_size=rows, accumulation=1)
    config = dataclasses.replace(config, mesh=mesh, train=train)
    program = make_program(config)
    with checkpoint.read_checkpoints(workdir) as checkpoints:
        variables, step = checkpoint.restore_variables_and_step(checkpoints, program.abstract_state, step)
        return config, program, variables, step


@contextlib.contextmanager
def train_batches(config: RunConfig, program: Program, rows: PreparedRows, examples: int) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """The run's endless stream of global batches, from the `examples`-th row on; read ahead until the context ends."""
    size = config.train.batch_size
    held = sharding.host_rows(program.mesh, size)
    loader = make_loader(rows, batch_size=size, seed=config.seed, examples=examples, host_rows=held)
    with contextlib.closing(loader):
        yield (sharding.global_batch(batch, program.mesh, size) for batch in loader)


def evaluate(config: RunConfig, program: Program, variables: Any, rows: PreparedRows) -> dict[str, float]:
    """Loss (nats per token) and bits per byte over `config.train.eval_batches` batches of a split, all if that is 0.

    For sparse layers also means over them of `max_vio`, `load_entropy` and `dropped_fraction` of the load over all these batches.
    """
    size = config.train.batch_size
    held = sharding.host_rows(program.mesh, size)
    totals: losses.Sums = {}
    with jax.set_mesh(program.mesh):
        for batch in evaluation_batches(rows, batch_size=size, num_batches=config.train.eval_batches, host_rows=held):
            sums = program.eval_step(variables, sharding.global_batch(batch, program.mesh, size))
            totals = jax.tree.map(lambda a, b: a + b, totals, sums) if totals else sums
    metrics = losses.metrics(totals)
    loss = float(metrics["loss"])
    values = {"loss": loss, "bits_per_byte": losses.bits_per_byte(loss, rows.num_targets, rows.num_bytes)}
    router = router_summary(metrics.get("router", {}))
    return values | {name: router[name] for name in ("max_vio", "load_entropy", "dropped_fraction") if name in router}


def router_summary(router: Mapping[str, Any]) -> dict[str, float]:
    """One number for each of the router's statistics [L] (`losses.metrics`); none for a dense model.

    Means over the sparse layers, except `dead_experts`, their sum, `bias_range`, the largest, and `worst_max_vio`, the largest `max_vio`.
    """
    reductions = {"dead_experts": np.sum, "bias_range": np.max}
    values = {name: reductions.get(name, np.mean)(value) for name, value in router.items() if name != "load"}
    if router:
        values["worst_max_vio"] = np.max(router["max_vio"])
    return {name: float(value) for name, value in values.items()}


def last_validation(workdir: Path) -> dict[str, float]:
    """The newest validation metrics of a run; none where its metrics.jsonl has none."""
    lines = [line for line in read_metrics(workdir) if "validation/loss" in line]
    return {name: value for line in lines[-1:] for name, value in line.items() if name.startswith("validation/")}


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM has come; a second one of either acts at once."""
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield arrived.is_set  # only the main thread may have signal handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, _: Any) -> None:
        arrived.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, remember)
    try:
        yield arrived.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """The progress bar and the metrics of training steps, read one step late so that devices never wait for the host."""

    def __init__(self, config: RunConfig, program: Program, record: Record, start: int):
        self._config, self._record = config, record
        devices = list(program.mesh.devices.flat)
        self._peak = peak_flops(devices, config.model.compute_dtype)
        self._flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        self._bar = tqdm(total=config.train.steps, initial=start, unit="step", disable=jax.process_index() > 0)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._restart_clock(None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next batch; the wait for it is a metric."""
        begin = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begin
        return batch

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before. Raises Diverged."""
        self._read()
        self._pending = (step, metrics)

    def pause(self) -> None:
        """Reads the last step's metrics before something else takes the devices; its time is not counted as training."""
        self._read()
        self._restart_clock(None)

    def _restart_clock(self, now: float | None) -> None:
        """Begins to count steps and waits from `now`, or, where that is None, from the end of the next step, which may compile."""
        self._started, self._steps, self._waited = now, 0, 0.0

    def _read(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        skipped_in_row = int(metrics["skipped_in_row"])  # waits for the step
        self._bar.update()
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
        values = {f"train/{name}": float(metrics[name]) for name in ("loss", "gradient_norm", "learning_rate", "skipped_steps")}
        layers = {name: np.asarray(value) for name, value in metrics.get("router", {}).items()}
        values |= self._rates() | {f"router/{name}": value for name, value in router_summary(layers).items()}
        self._record(step, values, layers)
        self._bar.set_postfix(postfix(values))

    def _rates(self) -> dict[str, float]:
        """Speeds since the clock was restarted, which this does again; none where no step has ended since."""
        if not self._steps:
            return {}
        seconds = time.perf_counter() - self._started
        tokens = self._config.train.batch_size * self._config.data.sequence_length * self._steps
        values = {
            "train/tokens_per_second": tokens / seconds,
            "train/mfu": tokens / seconds * self._flops_per_token / self._peak,
            "train/data_wait_fraction": self._waited / seconds,
        }
        self._restart_clock(time.perf_counter())
        return values


def postfix(values: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows of a step's metrics."""
    texts = {"loss": f"{values['train/loss']:.3f}"}
    if "train/mfu" in values:
        texts |= {"tokens/s": f"{values['train/tokens_per_second']:.3g}", "MFU": f"{values['train/mfu']:.1%}"}
    if "router/worst_max_vio" in values:
        texts["MaxVio"] = f"{values['router/worst_max_vio']:.2f}"
        if values["router/dropped_fraction"]:
            texts["dropped"] = f"{values['router/dropped_fraction']:.1%}"
    if values["train/skipped_steps"]:
        texts["skipped"] = f"{values['train/skipped_steps']:.0f}"
    return texts
