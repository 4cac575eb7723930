"""The values of one metric over a run's steps: how they are read, and thinned for a plot."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Metrics = list[dict[str, Any]]  # lines of metrics.jsonl: `step`, and values by a metric's name

MAX_POINTS = 2000  # of a line: more than a plot has pixels in width


class Series(NamedTuple):
    """One metric: the steps at which it was logged, and its values there."""

    steps: np.ndarray
    values: np.ndarray


AllSeries = Mapping[str, Series]  # by the metric's name


def read_series(metrics: Metrics, name: str) -> Series:
    """Returns the series of one metric, which is empty if no line has it."""
    lines = [(line["step"], line[name]) for line in metrics if name in line]
    return Series(
        np.array([step for step, _ in lines]), np.array([value for _, value in lines], dtype=float)
    )


def read_all_series(metrics: Metrics) -> dict[str, Series]:
    """Returns the series of every metric by its name, in one pass over the lines."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return {
        name: Series(np.array(steps), np.array(values, dtype=float))
        for name, (steps, values) in found.items()
    }


def mean_series(runs: Sequence[Series]) -> Series:
    """Returns the means of several runs' values, at the steps that all of them have.

    Of a step that a run has twice, the last value counts.
    """
    by_step = [dict(zip(*map(np.ndarray.tolist, run), strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    means = [np.mean([values[step] for values in by_step]) for step in steps]
    return Series(np.array(steps, dtype=int), np.array(means, dtype=float))


def block_medians(series: Series, num_blocks: int) -> Series:
    """Returns the medians of `num_blocks` blocks of neighbours, at the means of their steps.

    A block without a finite value has the median NaN, which leaves a gap in a line.
    """
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    medians = [
        np.nanmedian(block) if np.isfinite(block).any() else np.nan
        for block in np.array_split(values, num_blocks)
    ]
    steps = [np.mean(block) for block in np.array_split(series.steps, num_blocks)]
    return Series(np.array(steps), np.array(medians))


def keep_extremes(series: Series) -> Series:
    """Thins a long series to MAX_POINTS values: each block's smallest and largest, in their order.

    A block without a finite value keeps its first, so that the line has a gap there.
    """
    steps, values = series
    if len(steps) <= MAX_POINTS:
        return series
    chosen = []
    for block in np.array_split(np.arange(len(steps)), MAX_POINTS // 2):
        finite = block[np.isfinite(values[block])]
        if len(finite):
            extremes = {finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]}
            chosen.extend(sorted(extremes))
        else:
            chosen.append(block[0])
    return Series(steps[chosen], values[chosen])
