"""Evaluates a model on a split, and summarises the statistics of its routers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe import losses
from moe.config import RunConfig
from moe.data.loader import evaluation_batches
from moe.data.rows import JoinedRows, Rows
from moe.parallel import watch
from moe.parallel.mesh import global_batch, host_rows
from moe.storage.paths import RunPath
from moe.training.train_step import Program
from moe.workdir.tracking import read_metrics

# An evaluation reports these statistics of the routers. A training step reports all of them.
_ROUTER_NAMES = ("max_vio", "load_entropy", "dropped_fraction")
Fields = Mapping[str, np.ndarray]  # this host's part of a batch


def evaluate_sources(
    config: RunConfig,
    program: Program,
    variables: Any,
    rows: JoinedRows,
    stops: Callable[[Any], bool] = lambda sums: False,
) -> dict[str, float]:
    """Evaluates a model on the first `config.train.eval_batches` batches of sources (0: on all).

    Returns the task's metrics and scores. For a model with sparse layers it also returns
    `max_vio`, `load_entropy` and `dropped_fraction`: each is computed from a layer's sums over all
    batches, and is the mean over these layers. The values of a source with a name are returned as
    NAME/loss and so on, and those of all sources together follow from the sums over all their
    batches. The result is empty if `stops`, which is asked after each batch with the sums up to it,
    says that the evaluation must end early.
    """
    totals: losses.Sums = {}
    values: dict[str, float] = {}
    counts = _TextCounts(0.0, 0.0)
    for name, source_rows in rows.sources.items():
        sums = _sum_over_batches(config, program, variables, source_rows, stops)
        if not sums:
            return {}
        prefix = f"{name}/" if name else ""
        source_values = _values(program, sums, source_rows)
        values |= {prefix + key: value for key, value in source_values.items()}
        totals = jax.tree.map(lambda a, b: a + b, totals, sums) if totals else sums
        counts = counts.plus(float(sums["targets"]), source_rows)
    return values if "" in rows.sources else _values(program, totals, counts) | values


class _TextCounts(NamedTuple):
    """Counts the text that was read of several sources. `Task.score` takes it in place of rows."""

    num_targets: float
    num_bytes: float  # 0 if a source does not know its bytes

    def plus(self, num_targets: float, rows: Any) -> "_TextCounts":
        """Adds the first `num_targets` targets of `rows`, and the bytes that these stand for."""
        all_bytes = getattr(rows, "num_bytes", 0)
        is_known = all_bytes and (self.num_bytes or not self.num_targets)
        num_bytes = self.num_bytes + num_targets * all_bytes / rows.num_targets if is_known else 0.0
        return _TextCounts(self.num_targets + num_targets, num_bytes)


def _values(program: Program, sums: losses.Sums, rows: Any) -> dict[str, float]:
    """Returns the metrics and scores that follow from the sums over some rows."""
    metrics = program.task.metrics(sums)
    router = router_summary(metrics.pop("router", {}))
    values = {name: float(value) for name, value in metrics.items()}
    values |= program.task.score(sums, rows)
    return values | {name: router[name] for name in _ROUTER_NAMES if name in router}


def _sum_over_batches(
    config: RunConfig, program: Program, variables: Any, rows: Rows, stops: Callable[[Any], bool]
) -> losses.Sums:
    """Returns the task's sums and counts over an evaluation's batches, or {} if it ends early."""
    size = config.train.batch_size
    batches = evaluation_batches(
        rows,
        batch_size=size,
        num_batches=config.train.eval_batches,
        host_rows=host_rows(program.mesh, size),
        transform=program.task.transform(config),
    )
    totals: losses.Sums = {}
    sums: losses.Sums = {}
    with jax.set_mesh(program.mesh):
        for number, fields in _watched(batches):
            batch = global_batch(fields, program.mesh, size, program.task.dims)
            before, sums = sums, program.eval_step(variables, batch)
            if number > 1:
                watch.report("waiting")
                # The devices have one more batch to work on, and the watch knows how far they are.
                totals = add_on_host(totals, before)
            if stops(sums):
                return {}
        watch.report("waiting")
        totals = add_on_host(totals, sums)
        watch.report("evaluating")  # what follows is no batch, and may take any time
    return totals


def add_on_host(totals: losses.Sums, sums: losses.Sums) -> losses.Sums:
    """Waits for a batch's sums, and returns them added to `totals` in float64.

    A float32 total of more than 2**24 targets would lose whole targets.
    """
    on_host = jax.tree.map(np.float64, jax.device_get(sums))
    return jax.tree.map(np.add, totals, on_host) if totals else on_host


def _watched(batches: Iterator[Fields]) -> Iterator[tuple[int, Fields]]:
    """Yields the batches of an evaluation with their numbers, which it reports to the watch.

    The first batch may take any time, since the program may have to be compiled.
    """
    watch.report("evaluating", batch=1)
    for number, fields in enumerate(batches, 1):
        yield number, fields
        watch.report("scoring", batch=number + 1)


def router_summary(router: Mapping[str, Any]) -> dict[str, float]:
    """Returns one number for each of the routers' statistics [L]; none for a dense model.

    `dead_experts` is summed over the sparse layers, and `bias_range` is the largest one. All other
    statistics are means over these layers. `worst_max_vio` is the largest `max_vio`.
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


def is_validated(workdir: RunPath, step: int) -> bool:
    """Returns whether a run's metrics.jsonl has validation metrics of a step."""
    return any(
        line["step"] == step and any(name.startswith("validation/") for name in line)
        for line in read_metrics(workdir)
    )


def last_validation(workdir: RunPath) -> dict[str, float]:
    """Returns a run's newest validation metrics; none if its metrics.jsonl has none."""
    lines = [line for line in read_metrics(workdir) if "validation/loss" in line]
    return {
        name: value
        for line in lines[-1:]
        for name, value in line.items()
        if name.startswith("validation/")
    }
