"""Draws a run: its metrics as PNG plots, and one page that shows them with the run's numbers,
config and environment.

Examples:
    python -m launch.report --workdir=runs/dense_tiny
    python -m launch.routing --workdir=runs/moe_tiny && python -m launch.report --workdir=runs/moe_tiny

Writes report/index.html and the plots beside it, in the run directory, and prints the page's path.
A run that is still going can be drawn too; run the command again for newer numbers. The page needs
nothing but its directory: copy report/ anywhere. It is for light and dark screens, wide ones and
phones.

The page has, from top to bottom: the last values that a reader looks for first; curves of every
metric, where a metric that is always 0 is only named; a table of all metrics; the config, with what
differs from the defaults in bold; and the environment of each start.

Of a model with experts the page also shows how even their load is: as curves, and as a heat map for
each of at most 8 sparse layers. After launch.routing it shows what the routers have learnt, too:
which tokens chose which experts (specialisation), which experts are chosen together
(co-activation), and how early the choices settled (saturation).
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from launch import command_line, report_routing, routing_figures
from launch.figures import THEMES, Drawing, place_legend, set_steps, style, write_drawing
from launch.report_page import Columns, Section, page
from launch.report_plots import PLOTS, ROUTING, SKIPPED, Plot
from moe.files import write_whole
from moe.workdir.identity import read_config
from moe.workdir.tracking import ENVIRONMENT_FILE, METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "THEMES",
    "Metrics",
    "column",
    "report",
    "style",
    "summarise",
]  # what launch.compare draws with, too

Metrics = list[dict[str, Any]]

MAX_POINTS = 2000  # of a faint line: more than a plot has pixels in width


def report(workdir: Path) -> Path:
    """Writes <workdir>/report/ and returns the path of its index.html. Raises FileNotFoundError
    where no metrics were written yet.
    """
    if not (workdir / METRICS_FILE).exists():
        raise FileNotFoundError(
            f"{workdir / METRICS_FILE} does not exist: set --workdir to the directory of a run"
        )
    metrics = read_metrics(workdir)
    if not metrics:
        raise FileNotFoundError(
            f"{workdir / METRICS_FILE} is empty: wait for the run's first metrics, after train.log_every steps"
        )
    config = read_config(workdir)
    router, every = report_routing.read_lines(workdir, config.model)
    last, columns = metrics[-1]["step"], read_columns(report_routing.worst_layers(router) + metrics)
    sections = group_plots(columns, last)
    if config.model.sparse_layers:
        maps = [
            Drawing(found.stem, found.title, functools.partial(report_routing.draw_load, found))
            for found in report_routing.load_maps(router, config.model)
        ]
        sections += [
            Section("Load of the experts", maps, _load_note(every) if maps else ""),
            learnt(workdir),
        ]
    directory = workdir / "report"
    directory.mkdir(exist_ok=True)
    for drawing in tqdm(
        [drawing for section in sections for drawing in section.drawings],
        desc="drawing",
        disable=None,
        leave=False,
    ):
        write_drawing(drawing, directory)
    index = directory / "index.html"
    environments = list(_read_environments(workdir))
    write_whole(
        index, page(workdir.resolve().name, last, columns, config.to_dict(), environments, sections)
    )
    return index


def group_plots(columns: Columns, last: int) -> list[Section]:
    """The plots that have data, by heading: the known ones, then one for every other metric, by the
    prefix of its name.

    A plot whose values are all 0 would be an empty panel: its section's note names it.
    """
    groups = {
        heading: [plot for plot in plots if plot.lines.keys() & columns]
        for heading, plots in _KNOWN.items()
    }
    known = {SKIPPED}.union(*(plot.lines for plots in _KNOWN.values() for plot in plots))
    for number, name in enumerate(sorted(columns.keys() - known)):
        prefix, title = name.split("/", 1) if "/" in name else ("other", name)
        # numbered, since two names may differ in their signs alone
        stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', name)[:60]}"
        groups.setdefault(prefix, []).append(Plot(stem, title, "value", {name: title}))
    sections = []
    for heading, plots in groups.items():
        drawn = [
            plot
            for plot in plots
            if any(columns[name][1].any() for name in plot.lines if name in columns)
        ]
        zeros = ", ".join(plot.title for plot in plots if plot not in drawn)
        drawings = [
            Drawing(plot.stem, plot.title, functools.partial(draw_plot, plot, columns, last))
            for plot in drawn
        ]
        sections.append(
            Section(heading, drawings, f"Always 0, and not drawn: {zeros}." if zeros else "")
        )
    return sections


_KNOWN = {"Training": PLOTS, "Routing": ROUTING}


def learnt(workdir: Path) -> Section:
    """The figures of launch.routing, or how to make them."""
    path, heading = workdir / "routing" / "routing.json", "What the routers have learnt"
    if not path.exists():
        return Section(
            heading,
            [],
            f"To see specialisation, co-activation and saturation here: {_routing_command(workdir)}",
        )
    results = routing_figures.read_results(path)
    note = f"At step {results['step']:,}, over {results['tokens']:,} held-out tokens. Tables: routing/routing.md in the run directory."
    return Section(heading, routing_figures.drawings(results), note)


def _routing_command(workdir: Path) -> str:
    return " && ".join(
        f"python -m launch.{command} --workdir={quote(str(workdir))}"
        for command in ("routing", "report")
    )


def _load_note(every: int) -> str:
    note = "An even load has the page's colour, less is blue, and more is orange, fully so from twice the even share on."
    if every > 1:
        note += f" router.jsonl is large: of every {every} of its lines, one is shown here and in the worst layer's curves."
    return note


def column(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have a metric."""
    lines = [(line["step"], line[name]) for line in metrics if name in line]
    return np.array([step for step, _ in lines]), np.array(
        [value for _, value in lines], dtype=float
    )


def read_columns(metrics: Metrics) -> Columns:
    """The same for every metric, by name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return {
        name: (np.array(steps), np.array(values, dtype=float))
        for name, (steps, values) in found.items()
    }


def summarise(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` medians of neighbouring values, at the middle of their steps; a block with
    no finite value is a gap.
    """
    blocks = np.array_split(np.where(np.isfinite(values), values, np.nan), points)
    medians = [np.nanmedian(block) if np.isfinite(block).any() else np.nan for block in blocks]
    return np.array([np.mean(block) for block in np.array_split(steps, points)]), np.array(medians)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest of neighbouring values, in their order, where there are more
    than a line can show.
    """
    if len(steps) <= MAX_POINTS:
        return steps, values
    chosen = [np.arange(0)]
    for block in np.array_split(np.arange(len(steps)), MAX_POINTS // 2):
        finite = block[np.isfinite(values[block])]
        both = (
            {finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]}
            if len(finite)
            else {block[0]}
        )
        chosen.append(np.array(sorted(both)))
    return steps[np.concatenate(chosen)], values[np.concatenate(chosen)]


def draw_plot(
    plot: Plot, columns: Columns, last: int, axes: "Axes", colours: Mapping[str, str]
) -> None:
    """Draws the lines of a plot over steps up to `last`."""
    lines = {name: columns[name] for name in plot.lines if name in columns}
    axes.set_ylabel(plot.unit)
    for role, (name, label) in zip(("first", "second", "third"), plot.lines.items(), strict=False):
        if name in lines:
            steps, values = lines[name]
            _draw_line(axes, steps, values * (100 if plot.percent else 1), label, colours[role])
    _draw_marks(axes, plot, columns, colours["alarm"])
    set_steps(axes, 1.02 * max(1, last))
    _set_values(axes, plot, np.concatenate([values for _, values in lines.values()]))
    place_legend(axes)


def _draw_line(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str, colour: str
) -> None:
    if len(steps) <= 60:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    axes.plot(
        *thin(steps, values), color=colour, linewidth=0.7, alpha=0.35, zorder=1.5
    )  # behind every summary
    axes.plot(
        *summarise(steps, values, min(80, len(steps) // 5)),
        color=colour,
        linewidth=1.6,
        label=label,
    )


def _draw_marks(axes: "Axes", plot: Plot, columns: Columns, colour: str) -> None:
    """Crosses at the foot of the plot where a value is not finite or, under the gradient's norm, an
    update was skipped.
    """
    if "train/gradient_norm" in plot.lines:
        steps, totals = columns.get(SKIPPED, (np.zeros(0), np.zeros(0)))
        marked, label = set(steps[np.diff(totals, prepend=0) > 0]), "update skipped"
    else:
        marked, label = set(), "not finite"
        for steps, values in (columns[name] for name in plot.lines if name in columns):
            marked.update(steps[~np.isfinite(values)])
    if marked:
        foot = np.full(len(marked), 0.02)
        axes.plot(
            sorted(marked),
            foot,
            "x",
            color=colour,
            markersize=4.5,
            clip_on=False,
            label=label,
            transform=axes.get_xaxis_transform(),
        )


def _set_values(axes: "Axes", plot: Plot, values: np.ndarray) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    finite = values[np.isfinite(values)]
    plain, positive = FuncFormatter(lambda value, _: f"{value:g}"), finite[finite > 0]
    few = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=bool(np.all(finite == np.round(finite))))
    axes.yaxis.set_major_formatter(plain)
    if not len(finite):
        axes.set_yticks([])
    elif (
        plot.log and len(positive) and positive.max() > positive.min()
    ):  # of one value alone a logarithmic axis would show decades
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            few if positive.max() < 10 * positive.min() else LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(plain)
    elif plot.percent:
        axes.set_ylim(0, 110 * max(finite.max(), 1e-3))
    else:
        axes.yaxis.set_major_locator(few)
        if 1e4 <= np.abs(finite).max() < 1e15:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _read_environments(workdir: Path) -> Iterator[dict[str, Any]]:
    path = workdir / ENVIRONMENT_FILE
    for line in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ()
    ):
        try:
            start = json.loads(line)
        except ValueError:
            continue  # a start that was killed while it wrote its line
        if isinstance(start, dict):
            yield start


def main(values: flags.FlagValues) -> None:
    print(f"wrote {report(Path(values.workdir))}, and its plots beside it")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    command_line.run(main, __doc__)
