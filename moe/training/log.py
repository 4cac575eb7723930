"""Writes the metrics of training steps to a run's files, and shows them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe.config import RunConfig
from moe.parallel import watch
from moe.parallel.hub import HostTimes
from moe.scaling.hardware import peak_flops
from moe.tasks.task import Batch
from moe.training.evaluation import router_summary
from moe.training.progress import Bar
from moe.training.train_step import Metrics, Program

# These metrics of a step are not logged as train/NAME.
_NOT_LOGGED = ("router", "targets", "skipped_in_row")


class Record(Protocol):
    """Writes a step's metrics, and a sparse model's arrays over its layers, by name."""

    def __call__(
        self,
        step: int,
        metrics: Mapping[str, Any],
        layers: Mapping[str, np.ndarray] | None = None,
        /,
    ) -> None: ...


class Records(NamedTuple):
    """Holds the functions that write to a run's files. On all processes but one they do nothing."""

    metrics: Record
    hosts: Callable[[HostTimes], None]  # writes how long a step took on each host
    flush: Callable[[], None]  # writes all records out, before a checkpoint is saved


class Log:
    """Writes and shows the metrics of training steps.

    A step's metrics are read when the next step has been dispatched, so that the devices never
    wait for the host.
    """

    def __init__(self, config: RunConfig, program: Program, records: Records, bar: Bar):
        self._config, self._records, self._bar = config, records, bar
        self._peak_flops = peak_flops(list(program.mesh.devices.flat))
        count = program.task.training_flops
        self._flops_per_token = None if count is None else count(config)
        self._pending: tuple[int, Metrics] | None = None
        self.finished_step = 0  # the newest step whose metrics were read
        self._timed_step = 0  # the newest step whose times were sent to process 0
        self.skipped_in_row = 0  # how many updates in a row were skipped up to that step
        self._restart_clock(None)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch. The wait for it is a metric."""
        begin = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begin
        return batch

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time until the context ends as a wait for the devices."""
        begin = time.perf_counter()
        if self.finished_step:  # until then the run is still compiling
            watch.report("waiting")
        yield
        self._waited_for_devices += time.perf_counter() - begin

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before it."""
        self._read()
        self._pending = step, metrics

    def pause(self) -> None:
        """Reads the last step's metrics before something else takes the devices.

        The time until the end of the next step is not counted as training.
        """
        self._read()
        self._write_hosts(self._timed_step)
        self._restart_clock(None)

    def _restart_clock(self, now: float | None) -> None:
        """Begins to count steps and waits from `now`.

        If that is None, it begins at the end of the next step, since that step may compile.
        """
        self._started, self._steps = now, 0
        self._waited = self._waited_for_devices = 0.0

    def _read(self) -> None:
        """Waits for the pending step, if there is one, and takes its metrics."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with self.waiting():
            self.skipped_in_row = int(metrics["skipped_in_row"])  # this line waits for the step
        self.finished_step = step
        self._bar.step(step)
        if self._started is None:
            self._restart_clock(time.perf_counter())
        else:
            self._steps += 1
        if step % self._config.train.log_every == 0:
            self._write(step, metrics)

    def _write(self, step: int, metrics: Metrics) -> None:
        """Writes a step's metrics, the routers' and the speeds, and shows them behind the bar."""
        values = {
            f"train/{name}": float(value)
            for name, value in metrics.items()
            if name not in _NOT_LOGGED
        }
        layers = {name: np.asarray(value) for name, value in metrics.get("router", {}).items()}
        router = {f"router/{name}": value for name, value in router_summary(layers).items()}
        values |= self._rates(step) | router
        self._records.metrics(step, values, layers)
        self._write_hosts()
        self._bar.show_metrics(postfix(values))

    def _write_hosts(self, last: int = 0) -> None:
        """Writes the times that have come from all hosts, and waits for those of a last step."""
        for times in watch.take_times(last):
            self._records.hosts(times)

    def _rates(self, step: int) -> dict[str, float]:
        """Returns the speeds up to a step since the clock was restarted, and restarts it.

        Process 0 gets the times of all hosts, to find one that is slower than the others. The
        result is empty if no step has ended since then.
        """
        if self._started is None or not self._steps:
            return {}
        seconds = time.perf_counter() - self._started
        tokens = self._config.train.batch_size * self._config.data.sequence_length * self._steps
        values = {
            "train/tokens_per_second": tokens / seconds,
            "train/data_wait_fraction": self._waited / seconds,
        }
        host_seconds = max(0.0, seconds - self._waited_for_devices)
        self._timed_step = step
        watch.send_times(step, seconds / self._steps, host_seconds / self._steps)
        if self._peak_flops and self._flops_per_token:
            values["train/mfu"] = tokens / seconds * self._flops_per_token / self._peak_flops
        self._restart_clock(time.perf_counter())
        return values


def postfix(values: Mapping[str, float]) -> dict[str, str]:
    """Returns what the progress bar shows of a step's metrics, as short texts by name."""
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
