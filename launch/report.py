"""Draws a run: its metrics as PNG plots, and one page that shows them with the run's numbers, config and environment.

Example:
    python -m launch.report --workdir=runs/dense_tiny

Writes report/index.html and the plots beside it, in the run directory, and prints the page's path. A run that is still going can be
drawn too; run the command again for newer numbers. The page needs nothing but its directory: copy report/ anywhere.

Of a model with experts the page also shows how even their load is: as curves, and as a heat map for each of at most 8 sparse layers.
"""

import contextlib
import html
import json
import math
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from launch import command_line, report_routing
from launch.report_plots import HEADLINES, PLOTS, ROUTING, SKIPPED, Plot
from launch.report_routing import LoadMap
from moe.config import RunConfig
from moe.tracking import ENVIRONMENT_FILE, METRICS_FILE, read_config, read_metrics, read_router

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = list[dict[str, Any]]
Groups = dict[str, list[Plot | LoadMap]]  # by the heading they stand under

# Every plot is drawn once for light and once for dark pages. The colours are those of the page.
_ROLES = ("text", "muted", "rule", "card", "first", "second", "third", "alarm")
THEMES = {
    "light": dict(zip(_ROLES, ("#24292f", "#656d76", "#e6e8eb", "#ffffff", "#2f6fb0", "#d1711f", "#1b8a6b", "#c0392b"), strict=True)),
    "dark": dict(zip(_ROLES, ("#dfe3e8", "#98a1ab", "#30363e", "#1c2026", "#76aee6", "#eda766", "#6cc9a9", "#ef7f73"), strict=True)),
}


def report(workdir: Path) -> Path:
    """Writes <workdir>/report/ and returns the path of its index.html. Raises FileNotFoundError where no metrics were written yet."""
    if not (workdir / METRICS_FILE).exists():
        raise FileNotFoundError(f"{workdir / METRICS_FILE} does not exist: set --workdir to the directory of a run")
    metrics = read_metrics(workdir)
    if not metrics:
        raise FileNotFoundError(f"{workdir / METRICS_FILE} is empty: wait for the run's first metrics, after train.log_every steps")
    config, router = read_config(workdir), list(read_router(workdir))
    metrics = report_routing.worst_layers(router) + metrics
    groups = group_plots(metrics) | {"Load of the experts": report_routing.load_maps(router, config.model)}
    directory = workdir / "report"
    directory.mkdir(exist_ok=True)
    for plot in (plot for plots in groups.values() for plot in plots):
        for theme in THEMES:
            draw(plot, metrics, theme, directory / f"{plot.stem}-{theme}.png")
    page = directory / "index.html"
    environments = list(_read_environments(workdir))
    page.write_text(_page(workdir.resolve().name, metrics, config.to_dict(), environments, groups), encoding="utf-8")
    return page


def group_plots(metrics: Metrics) -> Groups:
    """The plots that have data, by heading: the known ones, then one for every other metric, by the prefix of its name."""
    names = sorted({name for line in metrics for name in line if name != "step"})
    sections = {"Training": PLOTS, "Routing": ROUTING}
    groups = {heading: [plot for plot in plots if any(name in names for name in plot.lines)] for heading, plots in sections.items()}
    known = {SKIPPED}.union(*(plot.lines for plot in PLOTS + ROUTING))
    for number, name in enumerate(name for name in names if name not in known):
        prefix, title = name.split("/", 1) if "/" in name else ("other", name)
        stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', name)}"  # numbered, since two names may differ in their signs alone
        groups.setdefault(prefix, []).append(Plot(stem, title, "", {name: title}))
    return groups


def column(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have a metric."""
    lines = [(line["step"], line[name]) for line in metrics if name in line]
    return np.array([step for step, _ in lines]), np.array([value for _, value in lines], dtype=float)


def summarise(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` medians of neighbouring values, at the middle of their steps; a block with no finite value is a gap."""
    blocks = np.array_split(np.where(np.isfinite(values), values, np.nan), points)
    medians = [np.nanmedian(block) if np.isfinite(block).any() else np.nan for block in blocks]
    return np.array([np.mean(block) for block in np.array_split(steps, points)]), np.array(medians)


def draw(plot: Plot | LoadMap, metrics: Metrics, theme: str, path: Path) -> None:
    """Writes one plot as a PNG file of 1120 x 660 pixels."""
    # Imported here because it takes a second, in which a mistyped --workdir is answered.
    import matplotlib
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    with matplotlib.rc_context(style(colours)):
        figure = Figure(figsize=(5.6, 3.3), dpi=200, layout="constrained")
        axes = figure.subplots()
        axes.set(title=plot.title, xlabel="step")
        if isinstance(plot, LoadMap):
            report_routing.draw_load(axes, plot, colours)
            _set_steps(axes, plot.steps[-1])
        else:
            _draw_lines(axes, plot, metrics, colours)
            _set_steps(axes, 1.02 * max(1, metrics[-1]["step"]))
            _set_values(axes, plot, metrics)
        figure.savefig(path)


def style(colours: Mapping[str, str]) -> dict[str, Any]:
    """Matplotlib's settings for a figure in the colours of a theme."""
    return {
        "figure.facecolor": colours["card"],
        "axes.facecolor": colours["card"],
        "axes.edgecolor": colours["rule"],
        "axes.titlecolor": colours["text"],
        "axes.labelcolor": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "legend.labelcolor": colours["text"],
        "grid.color": colours["rule"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.titlepad": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 9.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }


def _draw_lines(axes: "Axes", plot: Plot, metrics: Metrics, colours: Mapping[str, str]) -> None:
    axes.set_ylabel(plot.unit)
    for role, (name, label) in zip(("first", "second", "third"), plot.lines.items(), strict=False):
        steps, values = column(metrics, name)
        if len(steps):
            _draw_line(axes, steps, values * (100 if plot.percent else 1), label, colours[role])
    _draw_marks(axes, plot, metrics, colours["alarm"])


def _draw_line(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    if len(steps) <= 60:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35, zorder=1.5)  # behind every summary
    axes.plot(*summarise(steps, values, min(80, len(steps) // 5)), color=colour, linewidth=1.6, label=label)


def _draw_marks(axes: "Axes", plot: Plot, metrics: Metrics, colour: str) -> None:
    """Crosses at the foot of the plot where a value is not finite or, under the gradient's norm, an update was skipped."""
    if "train/gradient_norm" in plot.lines:
        steps, totals = column(metrics, SKIPPED)
        marked, label = set(steps[np.diff(totals, prepend=0) > 0]), "update skipped"
    else:
        marked, label = set(), "not finite"
        for name in plot.lines:
            steps, values = column(metrics, name)
            marked.update(steps[~np.isfinite(values)])
    if marked:
        foot = np.full(len(marked), 0.02)
        axes.plot(sorted(marked), foot, "x", color=colour, markersize=4.5, clip_on=False, label=label, transform=axes.get_xaxis_transform())


def _set_steps(axes: "Axes", end: float) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _set_values(axes: "Axes", plot: Plot, metrics: Metrics) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    values = np.concatenate([column(metrics, name)[1] for name in plot.lines])
    if plot.log and np.any(np.isfinite(values) & (values > 0)):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif plot.percent:
        axes.set_ylim(0, 110 * np.max(values, where=np.isfinite(values), initial=1e-3))
    else:
        large = np.any(np.isfinite(values) & (np.abs(values) >= 1e4))
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if large else FuncFormatter(lambda value, _: f"{value:g}"))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc=plot.legend)


def _read_environments(workdir: Path) -> Iterator[dict[str, Any]]:
    path = workdir / ENVIRONMENT_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a start that was killed while it wrote its line
            yield json.loads(line)


def _page(name: str, metrics: Metrics, config: dict[str, Any], environments: list[dict[str, Any]], groups: Groups) -> str:
    sections = [_header(name, metrics, config, environments), _headlines(metrics)]
    for heading, plots in groups.items():
        if plots:
            sections.append(f"<h2>{html.escape(heading)}</h2>\n<div class=plots>{''.join(_figure(plot) for plot in plots)}</div>")
    sections.append("<h2>Numbers</h2>\n" + _table(("metric", "last", "at step", "lowest", "highest"), _numbers(metrics)))
    sections.append("<h2>Config</h2>\n<p class=muted>Values that differ from the defaults are in colour.</p>\n" + _config(config))
    sections.append("<h2>Environment</h2>\n" + "".join(map(_environment, environments)))
    colours = {f"{theme}_colours": "".join(f"--{role}:{colour};" for role, colour in THEMES[theme].items()) for theme in THEMES}
    return _PAGE.substitute(colours, title=html.escape(name), body="\n".join(sections))


def _header(name: str, metrics: Metrics, config: dict[str, Any], environments: list[dict[str, Any]]) -> str:
    step, steps = metrics[-1]["step"], config["train"]["steps"]
    tokens = step * config["train"]["batch_size"] * config["data"]["sequence_length"]
    facts = [f"step {step:,} of {steps:,}", f"{tokens:,} tokens"]
    if environments:
        devices = environments[-1]["devices"]
        facts += [f"{devices['count']} × {' and '.join(devices['kinds'])}", f"started {environments[0]['time'][:16].replace('T', ' ')} UTC"]
    return f"<h1>{html.escape(name)}</h1>\n<p class=muted>{html.escape(' · '.join(facts))}</p>"


def _headlines(metrics: Metrics) -> str:
    cards = []
    for name, label, written in HEADLINES:
        _, values = column(metrics, name)
        if len(values):
            cards.append(f"<div class=card><dt>{label}</dt><dd>{written.format(values[-1])}</dd></div>")
    return f"<dl class=headlines>{''.join(cards)}</dl>"


def _figure(plot: Plot | LoadMap) -> str:
    alternative = html.escape(f"{plot.title} over steps")
    return (
        f'<figure class=card><picture><source srcset="{plot.stem}-dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="{plot.stem}-light.png" width=1120 height=660 alt="{alternative}"></picture></figure>'
    )


def _numbers(metrics: Metrics) -> Iterator[tuple[str, ...]]:
    for name in sorted({name for line in metrics for name in line if name != "step"}):
        steps, values = column(metrics, name)
        finite = values[np.isfinite(values)]
        lowest, highest = (finite.min(), finite.max()) if len(finite) else (math.nan, math.nan)
        yield name, _number(values[-1]), f"{steps[-1]:,}", _number(lowest), _number(highest)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='card scroll'><table class=numbers><tr>{header}</tr>{body}</table></div>"


def _config(config: dict[str, Any]) -> str:
    defaults = RunConfig().to_dict()
    groups = {"run": {name: value for name, value in config.items() if not isinstance(value, dict)}}
    groups |= {name: value for name, value in config.items() if isinstance(value, dict)}
    cards = []
    for group, fields in groups.items():
        default = defaults.get(group, defaults)
        rows = "".join(_config_row(name, value, name in default and value == default[name]) for name, value in fields.items())
        cards.append(f"<div class=card><h3>{html.escape(group)}</h3><table>{rows}</table></div>")
    return f"<div class=config>{''.join(cards)}</div>"


def _config_row(name: str, value: Any, is_default: bool) -> str:
    kind = "" if is_default else " class=changed"
    return f"<tr{kind}><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"


def _environment(start: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(_plain(value))}</td></tr>" for name, value in start.items())
    return f"<details class=card><summary>Start at {html.escape(start['time'])}</summary><table>{rows}</table></details>"


def _plain(value: Any) -> str:
    """JSON as people write it: a list with spaces, an object as names and values."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else "unknown" if value is None else str(value)


_PAGE = string.Template("""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>$title</title>
<style>
:root { $light_colours --page: #f6f7f8; }
@media (prefers-color-scheme: dark) { :root { $dark_colours --page: #14171b; } }
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1rem 4rem; background: var(--page); color: var(--text);
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .4rem; font-size: .95rem; }
p { margin: .35rem 0 .9rem; }
small, dt, .muted, th, td:first-child { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem 1rem; }
.headlines { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
dt { font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
dd small { display: block; font-size: .8rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: .75rem; }
.config { columns: 19rem; column-gap: .75rem; }
.config .card { break-inside: avoid; margin-bottom: .75rem; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { font-weight: 500; }
td, th { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td + td, th + th { padding-right: 0; padding-left: .75rem; }
.numbers td + td, .numbers th + th, .config td + td { text-align: right; }
.numbers th, .numbers td { white-space: nowrap; }
.numbers td { border-top: 1px solid var(--rule); }
.changed td + td { color: var(--first); font-weight: 600; }
details { margin-bottom: .75rem; }
summary { cursor: pointer; }
details td:first-child { width: 6rem; }
</style>
$body
</html>
""")


def main(values: flags.FlagValues) -> None:
    print(report(Path(values.workdir)))


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    command_line.run(main, __doc__)
