"""Draws a run: one page with plots of its metrics, its numbers, its config and its environment.

Examples:
    python -m launch.report --workdir=runs/dense_tiny
    python -m launch.routing --workdir=runs/moe_tiny
    python -m launch.report --workdir=runs/moe_tiny
    python -m launch.report --workdir=runs/moe_tiny --card

Writes report/index.html and the plots beside it, in the run directory, and prints the page's path.
A run that is still going can be drawn too; run the command again for newer numbers. The page needs
nothing but its directory: copy report/ anywhere. It is for light and dark screens, wide ones and
phones. Each plot is also a PDF file, for papers.

The page has, from top to bottom: the last values that a reader looks for first; curves of every
metric, where a metric that is always 0 is only named; a table of all metrics; the config, with what
differs from the defaults in bold; and the environment of each start. A curve of more than 60 values
is faint, with a line of medians over it; the learning rate is drawn as it was logged.

A run over several processes has their step times, slowest and median, and the name of a straggler.

For a model with experts the page also shows how even their load is: as curves, and as a heat map
for each of at most 8 sparse layers. After launch.routing it also shows what the routers learnt:
which tokens chose which experts (specialisation), which experts are chosen together
(co-activation), and how early the choices settled (saturation).

--card writes MODEL_CARD.md in the run directory instead: what is known of the model, its data,
training, evaluation and compute, and marked places for what a person must write. Written again, the
card keeps what stands between these marks.
"""

import json
from collections.abc import Iterator
from shlex import quote
from typing import Any

from absl import flags

from launch import command_line, routing_figures
from launch.figure_files import write_drawings
from launch.report_card import write_card
from launch.report_hosts import hosts_section
from launch.report_load import load_drawing, load_maps, read_router_lines, worst_layers
from launch.report_page import RunFacts, Section, page
from launch.report_plots import group_plots, is_always_zero, plot_drawing
from launch.series import AllSeries, Metrics, read_all_series
from moe.storage.lines import line_parts, read_lines
from moe.storage.paths import RunPath, make_directory, resolve, run_path, write_whole
from moe.workdir.identity import read_config
from moe.workdir.tracking import ENVIRONMENT_FILE, METRICS_FILE, read_metrics


def report(workdir: RunPath) -> RunPath:
    """Writes <workdir>/report/ and returns the path of its index.html.

    Raises FileNotFoundError where no metrics were written yet, and ConfigError for a damaged file.
    """
    lines = _read_metrics(workdir)
    config, last_step = read_config(workdir), lines[-1]["step"]
    router_lines, every = read_router_lines(workdir, config)
    metrics = read_all_series(worst_layers(router_lines) + lines)
    sections = metric_sections(metrics, last_step)
    if hosts := hosts_section(workdir):
        sections.append(hosts)
    if config.model.sparse_layers:
        drawings = [load_drawing(load_map) for load_map in load_maps(router_lines, config)]
        note = _load_note(every) if drawings else ""
        sections += [Section("Load of the experts", drawings, note), routing_section(workdir)]
    directory = workdir / "report"
    make_directory(directory)
    write_drawings([drawing for section in sections for drawing in section.drawings], directory)
    environments = list(_read_environments(workdir))
    facts = RunFacts(resolve(workdir).name, last_step, config.to_dict(), environments)
    index = directory / "index.html"
    write_whole(index, page(facts, metrics, sections))
    return index


def _read_metrics(workdir: RunPath) -> Metrics:
    """Returns the run's logged lines, of which there is at least one. Raises FileNotFoundError."""
    path = workdir / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: set --workdir to the directory of a run")
    metrics = read_metrics(workdir)
    if not metrics:
        raise FileNotFoundError(
            f"{path} is empty: wait for the run's first metrics, after train.log_every steps"
        )
    return metrics


def metric_sections(metrics: AllSeries, last_step: int) -> list[Section]:
    """Returns the figures of all metrics by heading; metrics that are always 0 are only named."""
    sections = []
    for heading, plots in group_plots(metrics).items():
        zeros = [plot for plot in plots if is_always_zero(plot, metrics)]
        drawings = [plot_drawing(plot, metrics, last_step) for plot in plots if plot not in zeros]
        names = ", ".join(plot.title for plot in zeros)
        note = f"Always 0, and not drawn: {names}." if zeros else ""
        sections.append(Section(heading, drawings, note))
    return sections


def routing_section(workdir: RunPath) -> Section:
    """Returns the figures of launch.routing, or says how to make them."""
    path, heading = workdir / "routing" / "routing.json", "What the routers have learnt"
    if not path.exists():
        commands = " && ".join(
            f"python -m launch.{command} --workdir={quote(str(workdir))}"
            for command in ("routing", "report")
        )
        return Section(
            heading, [], f"To see specialisation, co-activation and saturation here: {commands}"
        )
    results = routing_figures.read_results(path)
    note = (
        f"At step {results['step']:,}, over {results['tokens']:,} held-out tokens. "
        "Tables: routing/routing.md in the run directory."
    )
    return Section(heading, routing_figures.drawings(results), note)


def _load_note(every: int) -> str:
    """Returns the sentences under the heat maps, which are drawn from every n-th line."""
    note = (
        "An even load has the page's colour, less is blue, and more is orange, fully so from twice "
        "the even share on."
    )
    if every > 1:
        note += (
            f" router.jsonl is large: one of every {every} lines is shown here and in the "
            "worst layer's curves."
        )
    return note


def _read_environments(workdir: RunPath) -> Iterator[dict[str, Any]]:
    """Yields the environment of each start that has written its whole line."""
    path = workdir / ENVIRONMENT_FILE
    for line in (line for part in line_parts(path) for line in read_lines(part)):
        try:
            environment = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the start was killed while it wrote this line
        if isinstance(environment, dict):
            yield environment


def main(values: flags.FlagValues) -> None:
    workdir = run_path(values.workdir)
    if values.card:
        path = write_card(workdir, _read_metrics(workdir), list(_read_environments(workdir)))
        print(f"wrote {path}; fill in what is marked `begin` and `end`")
        return
    print(f"wrote {report(workdir)}, and its plots beside it")


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_bool("card", False, "Whether to write MODEL_CARD.md instead of the page.")
    command_line.run(main, __doc__)
