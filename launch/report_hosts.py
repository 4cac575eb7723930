"""How long a step took on each process of a job: curves, a heat map, and the name of a straggler.

They are made from hosts.jsonl, which process 0 writes. A run of one process has none.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch.plotting import (
    Colours,
    Drawing,
    add_colour_bar,
    ratio_shades,
    set_steps,
    set_whole_ticks,
)
from launch.report_page import Section
from launch.report_plots import MetricPlot, plot_drawing
from launch.series import Series
from moe.config import ConfigError
from moe.storage.paths import RunPath
from moe.workdir.tracking import HOSTS_FILE, read_hosts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 400  # the most columns of the heat map: about as many as fit
RECENT_LINES = 20  # a straggler is looked for in so many of the last lines
# A straggler's host works more than STRAGGLER_RATIO times as long as the median of the others, and
# exceeds that median by more than STRAGGLER_SHARE of a step. A smaller excess delays nobody.
STRAGGLER_RATIO, STRAGGLER_SHARE = 1.5, 0.05
NAMES = ("step_seconds", "host_seconds")
PLOTS = (
    MetricPlot(
        "hosts_step",
        "Step time of the processes",
        "seconds per step",
        {"slowest step": "slowest process", "median step": "median process"},
    ),
    MetricPlot(
        "hosts_work",
        "Work of the hosts in a step",
        "seconds per step",
        {"slowest work": "slowest host", "median work": "median host"},
    ),
)


class HostLine(NamedTuple):
    """One line of hosts.jsonl, with a number of seconds for each process."""

    step: int
    step_seconds: np.ndarray
    host_seconds: np.ndarray  # the part of a step in which the host did not wait for devices


def hosts_section(workdir: RunPath) -> Section | None:
    """Returns the figures of a run's processes, or None if it never had several.

    Raises ConfigError where hosts.jsonl is damaged.
    """
    lines = [line for line in read_host_lines(workdir) if len(line.step_seconds) > 1]
    if not lines:
        return None
    last_step, metrics = lines[-1].step, _series(lines)
    drawings = [plot_drawing(plot, metrics, last_step) for plot in PLOTS]
    # A restarted job may have another number of processes: the heat map shows the last one.
    lines = [line for line in lines if len(line.step_seconds) == len(lines[-1].step_seconds)]
    paint = functools.partial(_paint, lines)
    drawings.append(Drawing("hosts_map", "Work of each process's host", paint))
    return Section("Processes", drawings, straggler_note(lines))


def read_host_lines(workdir: RunPath) -> list[HostLine]:
    """Returns the lines of hosts.jsonl in the order of their steps.

    Of two lines of a step, which a resumed run has written again, the last one counts.
    """
    lines = {}
    for step, arrays in read_hosts(workdir):
        shapes = {arrays[name].shape for name in NAMES if name in arrays}
        if len(shapes) != 1 or set(NAMES) - arrays.keys() or len(*shapes) != 1:
            raise ConfigError(
                f"{workdir / HOSTS_FILE}: step {step} lacks two lists of seconds of equal length: "
                "delete that line"
            )
        lines[step] = HostLine(step, *(arrays[name] for name in NAMES))
    return [lines[step] for step in sorted(lines)]


def straggler_note(lines: list[HostLine]) -> str:
    """Returns the sentences over the figures, which name a straggler if there is one."""
    recent = lines[-RECENT_LINES:]
    work = np.median([line.host_seconds for line in recent], axis=0)
    step = float(np.median([line.step_seconds for line in recent]))
    worst = int(np.argmax(work))
    median = float(np.median(np.delete(work, worst)))
    facts = (
        f"From step {recent[0].step:,} to {recent[-1].step:,}, a step took {step:.3g} s. In it the "
        f"host of process {worst} worked {work[worst]:.3g} s, the longest of {len(work)}, and the "
        f"median of the others is {median:.3g} s."
    )
    if work[worst] > STRAGGLER_RATIO * median and work[worst] - median > STRAGGLER_SHARE * step:
        return (
            f"Process {worst} is a straggler. {facts} All processes wait for it in each step: look "
            "at what else runs on its host, and at its disk and network."
        )
    return f"{facts} No process is a straggler."


def _series(lines: list[HostLine]) -> dict[str, Series]:
    """Returns the slowest and the median process of each line, by the names in PLOTS."""
    steps = np.array([line.step for line in lines])
    values = {
        "slowest step": [np.max(line.step_seconds) for line in lines],
        "median step": [np.median(line.step_seconds) for line in lines],
        "slowest work": [np.max(line.host_seconds) for line in lines],
        "median work": [np.median(line.host_seconds) for line in lines],
    }
    return {name: Series(steps, np.array(value)) for name, value in values.items()}


def _paint(lines: list[HostLine], axes: "Axes", colours: Colours) -> None:
    columns = np.array_split(np.array([line.host_seconds for line in lines]), _num_columns(lines))
    seconds = np.array([np.mean(column, axis=0) for column in columns])  # [columns, processes]
    ends = np.array([part[-1] for part in np.array_split([x.step for x in lines], len(columns))])
    # The median can be 0, where hosts work for less than the clock's precision.
    ratios = seconds / np.maximum(np.median(seconds, axis=1, keepdims=True), 1e-9)
    processes = np.arange(seconds.shape[1] + 1) - 0.5
    steps = np.concatenate([[0], ends])
    mesh = axes.pcolormesh(steps, processes, ratios.T, cmap=ratio_shades(colours), vmin=0, vmax=2)
    add_colour_bar(axes, mesh, "work / median host", extend="max", ticks=(0, 0.5, 1, 1.5, 2))
    axes.set(ylabel="process", ylim=(processes[-1], processes[0]))
    set_whole_ticks(axes.yaxis)
    set_steps(axes, ends[-1])


def _num_columns(lines: list[HostLine]) -> int:
    return min(len(lines), MAX_COLUMNS)
