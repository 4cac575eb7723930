"""Trains the variants of an experiment, with several seeds each and one run after another, and
compares them.

Examples:
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py --workdir=runs/moe_vs_dense
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py --workdir=runs/short --config.train.steps=100
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py --workdir=runs/moe_vs_dense --report_only

An experiment is a config file with two more names: VARIANTS, which holds for each variant the
fields that it sets in the base that get_config() returns, such as {"wide": {"model.model_dim":
512}}; and SEEDS. --config.FIELD=VALUE changes the base, for all variants that do not set the field
themselves; config.seed is set by SEEDS.

DIR/VARIANT/seed_N is an ordinary run directory, for launch.report and launch.evaluate too. All
variants' first seeds are trained before the second ones. Ctrl-C (SIGINT) and SIGTERM save before
they stop; the same command goes on there, and repeats no run that is finished.

Writes and prints DIR/comparison.md, a table; beside it are comparison.json, with each seed's loss,
and comparison.png. With --report_only nothing is trained: they are made of the runs there are,
while others still train too.

Exit codes: 0 trained to the end; 2 bad input, told in one line; 3 a run diverged, as launch.train
says it (the others were trained); 75 interrupted and saved.
"""

import dataclasses
import io
import json
import math
import runpy
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from launch import command_line
from launch.report import THEMES, Metrics, column, style, summarise
from moe.config import ConfigError, RunConfig
from moe.data.sources import check_dataset
from moe.files import write_whole
from moe.scaling.flops import active_parameters, total_parameters, training_flops_per_token
from moe.workdir.identity import CONFIG_FILE, checkpoint_steps
from moe.workdir.tracking import METRICS_FILE, check_workdir, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAST = 10  # logged steps at the end of a run over which the router's statistics are averaged
LEGEND = (
    "Loss: mean ± standard error over the seeds that finished, and did not diverge. MaxVio, by how much the fullest expert of the worst "
    "layer exceeds an even share, and dropped, the fraction of assignments: means over the last "
    f"{LAST} logged steps. Tokens/s: median."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant trained with one seed, in a run directory."""

    variant: str
    config: RunConfig
    workdir: Path

    @property
    def finished(self) -> bool:
        """Whether the last checkpoint is there, and complete; its metrics were written before."""
        return self.config.train.steps in checkpoint_steps(self.workdir / "checkpoints")

    @property
    def diverged(self) -> bool:
        """Whether the last validation of a finished run is not finite, or none of its updates was."""
        metrics = read_metrics(self.workdir)
        last = {name: value for line in metrics for name, value in line.items()}
        return (
            not math.isfinite(last["validation/loss"])
            or last.get("train/skipped_steps") == self.config.train.steps
        )


def read_experiment(path: str, base: RunConfig) -> tuple[dict[str, RunConfig], tuple[int, ...]]:
    """The variants of `base` by name, and the seeds, that the config file at `path` names. Raises
    ConfigError.
    """
    file, _, variant = path.partition(":")
    if variant:
        raise ConfigError(
            f"--config={path} names one variant, and all are compared: set --config to {file}"
        )
    names = runpy.run_path(path)
    for name in ("VARIANTS", "SEEDS"):
        if not names.get(name):
            raise ConfigError(
                f"--config={path} has no {name}: set --config to an experiment, as those in configs/experiments are"
            )
    variants = {}
    for variant, fields in names["VARIANTS"].items():
        values = base.to_dict()
        for field, value in fields.items():
            values = _set(values, field, value)
        try:
            variants[variant] = RunConfig.from_config_dict(values)
        except ConfigError as error:
            raise ConfigError(f"VARIANTS[{variant!r}] of {path}: {error}") from None
    return variants, tuple(names["SEEDS"])


def _set(values: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """A copy with one dotted field set, also where there is no such field: RunConfig tells that in
    its own words.
    """
    name, _, rest = field.partition(".")
    if rest:
        group = values.get(name)
        value = _set(group if isinstance(group, dict) else {}, rest, value)
    return values | {name: value}


def plan(variants: dict[str, RunConfig], seeds: Sequence[int], workdir: Path) -> list[Run]:
    """The runs in the order of training: seed by seed, so that a third of the time gives a
    comparison already.

    Raises ConfigError for a seed that is none or is there twice, and where a run of another config
    is in the way.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"SEEDS={seeds} has a seed twice: set SEEDS to distinct numbers")
    runs = [
        Run(variant, dataclasses.replace(config, seed=seed), workdir / variant / f"seed_{seed}")
        for seed in seeds
        for variant, config in variants.items()
    ]
    for run in runs:
        if (run.workdir / CONFIG_FILE).exists():
            check_workdir(run.workdir, run.config)
    return runs


def train(runs: list[Run]) -> None:
    """Trains what is not finished. A run that diverges is left behind, and the next one begun.
    Raises Interrupted.
    """
    from moe.training.trainer import Diverged, fit  # loads JAX, which bad input need not wait for

    left = [run for run in runs if not run.finished]
    begin = time.monotonic()
    for number, run in enumerate(left):
        print(
            _progress(len(runs), len(left), number, time.monotonic() - begin, run.workdir),
            file=sys.stderr,
        )
        try:
            fit(run.config, run.workdir)
        except Diverged as error:
            print(f"diverged: {run.workdir}: {error}", file=sys.stderr)


def _progress(total: int, left: int, trained: int, seconds: float, workdir: Path) -> str:
    from tqdm import tqdm

    remaining = left - trained
    estimate = (
        f", about {tqdm.format_interval(seconds / trained * remaining)} left" if trained else ""
    )
    return f"run {total - remaining + 1} of {total}{estimate}: {workdir}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of seeds and its standard error, s / sqrt(n) with n - 1 under s; one seed tells no
    error.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def result(runs: list[Run]) -> dict[str, Any]:
    """What is known of one variant: counts, and statistics over the runs that finished with a
    finite loss, None where there are none.

    Losses are in nats per token; the router's statistics are means over each run's last logged
    steps; tokens/s is a median of all.
    """
    model, length = runs[0].config.model, runs[0].config.data.sequence_length
    finished = {
        run.config.seed: read_metrics(run.workdir)
        for run in runs
        if run.finished and not run.diverged
    }
    losses = {
        seed: float(column(metrics, "validation/loss")[1][-1]) for seed, metrics in finished.items()
    }
    mean, error = mean_and_error(list(losses.values())) if losses else (None, None)
    of_all = list(finished.values())
    return {
        "active_parameters": active_parameters(model),
        "total_parameters": total_parameters(model),
        "training_flops_per_token": training_flops_per_token(model, length),
        "validation_loss": {"mean": mean, "standard_error": error, "of_seeds": losses},
        "worst_max_vio": _average(statistics.fmean, of_all, "router/worst_max_vio", LAST),
        "dropped_fraction": _average(statistics.fmean, of_all, "router/dropped_fraction", LAST),
        "tokens_per_second": _average(statistics.median, of_all, "train/tokens_per_second", 0),
    }


def _average(
    average: Callable[[list[float]], float], runs: list[Metrics], name: str, last: int
) -> float | None:
    """Of a metric's `last` values in each run, all if that is 0; None where no run logged it, as
    dense ones do not the router's.
    """
    values = [float(value) for metrics in runs for value in column(metrics, name)[1][-last:]]
    return average(values) if values else None


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, a dash where there is nothing yet."""
    head = (
        "variant",
        "active parameters",
        "total parameters",
        "training FLOPs per token",
        "validation loss (nats per token)",
    )
    rows = [(*head, "seeds", "worst MaxVio", "dropped", "tokens/s"), ("---", *("---:",) * 8)]
    for variant, values in results.items():
        counts = (
            f"{values[name]:,.0f}"
            for name in ("active_parameters", "total_parameters", "training_flops_per_token")
        )
        loss = values["validation_loss"]
        mean = _written(loss["mean"], ".4f") + (
            "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.4f}"
        )
        router = (
            _written(values["worst_max_vio"], ".2f"),
            _written(values["dropped_fraction"], ".1%"),
        )
        rows.append(
            (
                variant,
                *counts,
                mean,
                str(len(loss["of_seeds"])),
                *router,
                _written(values["tokens_per_second"], ",.0f"),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def draw(results: dict[str, dict[str, Any]], runs: list[Run], path: Path) -> None:
    """Writes one figure: the finished runs' validation losses with error bars, and the training
    loss of every run that has begun.
    """
    import matplotlib  # as in launch.report: it takes a second, in which bad input is answered
    from matplotlib.figure import Figure

    colours = {variant: f"C{number % 10}" for number, variant in enumerate(results)}
    with matplotlib.rc_context(style(THEMES["light"])):
        figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
        losses, curves = figure.subplots(1, 2)
        _draw_losses(losses, results, colours)
        _draw_curves(curves, runs, colours)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def _draw_losses(axes: "Axes", results: dict[str, dict[str, Any]], colours: dict[str, str]) -> None:
    axes.set(title="Validation loss", xlabel="nats per token: each seed, mean ± standard error")
    axes.set_yticks(range(len(results)), results, color=THEMES["light"]["text"])
    axes.set_ylim(
        len(results) - 0.5, -0.5
    )  # the first on top, and a place for those that have no loss yet
    for place, (variant, values) in enumerate(results.items()):
        loss = values["validation_loss"]
        if loss["mean"] is None:
            continue
        axes.plot(
            list(loss["of_seeds"].values()),
            [place] * len(loss["of_seeds"]),
            ".",
            color=colours[variant],
            alpha=0.4,
        )
        axes.errorbar(
            loss["mean"],
            place,
            xerr=loss["standard_error"],
            fmt="o",
            capsize=4,
            color=colours[variant],
        )


def _draw_curves(axes: "Axes", runs: list[Run], colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(title="Training loss", xlabel="step", ylabel="nats per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    labelled = set()
    for run in runs:
        metrics = read_metrics(run.workdir) if (run.workdir / METRICS_FILE).exists() else []
        steps, values = column(metrics, "train/loss")
        if len(steps):
            label = None if run.variant in labelled else run.variant
            axes.plot(
                *summarise(steps, values, min(40, len(steps))),
                color=colours[run.variant],
                linewidth=1.1,
                alpha=0.8,
                label=label,
            )
            labelled.add(run.variant)
    if labelled:
        axes.legend()


def compare(runs: list[Run], workdir: Path) -> str:
    """Writes comparison.json, comparison.md and comparison.png of the runs there are, and returns
    the table.

    Raises FileNotFoundError where not one has begun.
    """
    if not any((run.workdir / METRICS_FILE).exists() for run in runs):
        raise FileNotFoundError(
            f"{workdir} holds none of the experiment's runs: leave out --report_only, or set --workdir to theirs"
        )
    results = {
        variant: result([run for run in runs if run.variant == variant])
        for variant in dict.fromkeys(run.variant for run in runs)
    }
    text = table(results)
    write_whole(workdir / "comparison.json", json.dumps(results, indent=2) + "\n")
    draw(results, runs, workdir / "comparison.png")
    write_whole(
        workdir / "comparison.md",
        f"{text}\n\n{LEGEND}\n\n![Losses by variant, and over steps](comparison.png)\n",
    )
    return text


def main(values: flags.FlagValues) -> int:
    base = command_line.read_run_config(values.config)
    workdir = Path(values.workdir)
    runs = plan(*read_experiment(config_flags.get_config_filename(values["config"]), base), workdir)
    if not values.report_only:
        # fit() has handlers of its own. Around it everything is saved, and SIGTERM may act at once,
        # as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        for run in runs:
            check_dataset(run.config.data)
        from moe.training.trainer import Interrupted  # loads JAX, which bad input need not wait for

        try:
            train(runs)
        except (Interrupted, KeyboardInterrupt) as error:
            print(f"interrupted: {error or 'run the same command again to go on'}", file=sys.stderr)
            return command_line.INTERRUPTED
    print(compare(runs, workdir))
    return (
        0
        if values.report_only or all(run.finished and not run.diverged for run in runs)
        else command_line.DIVERGED
    )


if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The directory of all runs: a new one, or one to go on with.")
    flags.DEFINE_boolean("report_only", False, "Compares the runs there are, and trains nothing.")
    command_line.run(main, __doc__)
