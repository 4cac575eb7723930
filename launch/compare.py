"""Trains the variants of an experiment, each with several seeds, and compares them.

Examples:
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py \\
        --workdir=runs/moe_vs_dense
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py \\
        --workdir=runs/short --config.train.steps=100
    python -m launch.compare --config=configs/experiments/moe_vs_dense.py \\
        --workdir=runs/moe_vs_dense --report_only

An experiment is a config file with two more names, VARIANTS and SEEDS. VARIANTS holds for each
variant the fields that it changes in the config that get_config() returns, the base: for example
{"wide": {"model.model_dim": 512}}. --config.FIELD=VALUE changes the base, for all variants that do
not set that field themselves. SEEDS are the values of config.seed.

The runs are trained one after another: first all variants with the first seed, then all with the
second one. DIR/VARIANT/seed_N is an ordinary run directory, which launch.report and launch.evaluate
read too. Ctrl-C (SIGINT) and SIGTERM save before they stop. The same command goes on from there,
and does not repeat a run that is finished.

Writes and prints DIR/comparison.md, a table, and writes beside it comparison.json, with each seed's
loss, and comparison.png. With --report_only nothing is trained: the runs that are there are
compared, and others may go on training meanwhile.

Exit codes: 0 trained to the end; 2 bad input, told in one line; 3 a run diverged, in the sense of
launch.train, and the others were trained; 75 interrupted and saved.
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
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from launch import command_line
from launch.plotting import THEMES, style
from launch.series import Metrics, block_medians, read_series
from moe.config import ConfigError, RunConfig
from moe.data.sources import check_dataset
from moe.exit_codes import DIVERGED, INTERRUPTED
from moe.scaling.flops import active_parameters, total_parameters, training_flops_per_token
from moe.storage.paths import RunPath, run_path, write_whole
from moe.workdir.identity import CONFIG_FILE, checkpoint_steps
from moe.workdir.tracking import METRICS_FILE, check_workdir, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAST = 10  # logged steps at the end of a run over which the router's statistics are averaged
LEGEND = (
    "Loss: mean ± standard error over the seeds that finished, and did not diverge. MaxVio (how "
    "far the fullest expert of the worst layer exceeds an even share) and dropped (the fraction of "
    f"assignments that found no room): means over the last {LAST} logged steps. Tokens/s: median."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant trained with one seed, in a run directory."""

    variant: str
    config: RunConfig
    workdir: RunPath

    @property
    def finished(self) -> bool:
        """Whether the last checkpoint is complete. All metrics were written before it."""
        return self.config.train.steps in checkpoint_steps(self.workdir / "checkpoints")

    @property
    def diverged(self) -> bool:
        """Whether a finished run ended without a finite validation, or skipped every update."""
        metrics = read_metrics(self.workdir)
        last = {name: value for line in metrics for name, value in line.items()}
        return (
            not math.isfinite(last["validation/loss"])
            or last.get("train/skipped_steps") == self.config.train.steps
        )


def read_experiment(path: str, base: RunConfig) -> tuple[dict[str, RunConfig], tuple[int, ...]]:
    """Returns the variants of `base` by name, and the seeds, of the config file at `path`.

    Raises ConfigError.
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
                f"--config={path} has no {name}: set --config to an experiment, "
                "such as those in configs/experiments"
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
    """Returns a copy with one dotted field set.

    A field that does not exist is set too: RunConfig refuses it in its own words.
    """
    name, _, rest = field.partition(".")
    if rest:
        group = values.get(name)
        value = _set(group if isinstance(group, dict) else {}, rest, value)
    return values | {name: value}


def plan_runs(variants: dict[str, RunConfig], seeds: Sequence[int], workdir: RunPath) -> list[Run]:
    """Returns the runs in the order of training.

    They are trained seed by seed, so that all variants can be compared after the first seed.
    Raises ConfigError for a seed that is invalid or repeated, and where a directory holds a run of
    another config.
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
    """Trains the runs that are not finished; after one that diverges, the next one begins.

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


def _progress(total: int, left: int, trained: int, seconds: float, workdir: RunPath) -> str:
    from tqdm import tqdm

    remaining = left - trained
    estimate = (
        f", about {tqdm.format_interval(seconds / trained * remaining)} left" if trained else ""
    )
    return f"run {total - remaining + 1} of {total}{estimate}: {workdir}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean over seeds and its standard error, s / sqrt(n).

    s is the standard deviation with the divisor n - 1. With one seed the error is unknown: None.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def result(runs: list[Run]) -> dict[str, Any]:
    """Returns what is known of one variant: counts, and statistics over its finished runs.

    Runs that diverged are left out. A statistic is None if no run remains. Losses are in nats per
    token. The router's statistics are means over each run's last logged steps, and tokens per
    second are a median over all logged steps.
    """
    model, length = runs[0].config.model, runs[0].config.data.sequence_length
    finished = {
        run.config.seed: read_metrics(run.workdir)
        for run in runs
        if run.finished and not run.diverged
    }
    losses = {
        seed: float(read_series(metrics, "validation/loss").values[-1])
        for seed, metrics in finished.items()
    }
    mean, error = mean_and_error(list(losses.values())) if losses else (None, None)
    runs_metrics = list(finished.values())
    return {
        "active_parameters": active_parameters(model),
        "total_parameters": total_parameters(model),
        "training_flops_per_token": training_flops_per_token(model, length),
        "validation_loss": {"mean": mean, "standard_error": error, "of_seeds": losses},
        "worst_max_vio": _average(statistics.fmean, runs_metrics, "router/worst_max_vio", LAST),
        "dropped_fraction": _average(
            statistics.fmean, runs_metrics, "router/dropped_fraction", LAST
        ),
        "tokens_per_second": _average(
            statistics.median, runs_metrics, "train/tokens_per_second", 0
        ),
    }


def _average(
    average: Callable[[list[float]], float], runs: list[Metrics], name: str, last: int
) -> float | None:
    """Returns the average of a metric's `last` values in each run, or of all if `last` is 0.

    Returns None where no run logged it: a dense run does not log the router's metrics.
    """
    values = [
        float(value) for metrics in runs for value in read_series(metrics, name).values[-last:]
    ]
    return average(values) if values else None


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the results as a Markdown table, with a dash where nothing is known yet."""
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


def write_plot(results: dict[str, dict[str, Any]], runs: list[Run], path: RunPath) -> None:
    """Writes one figure of two panels.

    The left one has the finished runs' validation losses with error bars, the right one the
    training loss of every run that has begun.
    """
    import matplotlib  # takes a second, which bad input need not wait for
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
    # The first variant is on top. One without a loss has an empty row.
    axes.set_ylim(len(results) - 0.5, -0.5)
    for row, (variant, values) in enumerate(results.items()):
        loss = values["validation_loss"]
        if loss["mean"] is None:
            continue
        axes.plot(
            list(loss["of_seeds"].values()),
            [row] * len(loss["of_seeds"]),
            ".",
            color=colours[variant],
            alpha=0.4,
        )
        axes.errorbar(
            loss["mean"],
            row,
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
        loss = read_series(metrics, "train/loss")
        if len(loss.steps):
            label = None if run.variant in labelled else run.variant
            axes.plot(
                *block_medians(loss, min(40, len(loss.steps))),
                color=colours[run.variant],
                linewidth=1.1,
                alpha=0.8,
                label=label,
            )
            labelled.add(run.variant)
    if labelled:
        axes.legend()


def compare(runs: list[Run], workdir: RunPath) -> str:
    """Writes comparison.json, comparison.md and comparison.png, and returns the table.

    They cover the runs that have begun. Raises FileNotFoundError where none has begun.
    """
    if not any((run.workdir / METRICS_FILE).exists() for run in runs):
        raise FileNotFoundError(
            f"{workdir} holds none of the experiment's runs: leave out --report_only, "
            "or set --workdir to the directory that has them"
        )
    results = {
        variant: result([run for run in runs if run.variant == variant])
        for variant in dict.fromkeys(run.variant for run in runs)
    }
    text = table(results)
    write_whole(workdir / "comparison.json", json.dumps(results, indent=2) + "\n")
    write_plot(results, runs, workdir / "comparison.png")
    write_whole(
        workdir / "comparison.md",
        f"{text}\n\n{LEGEND}\n\n![Losses by variant, and over steps](comparison.png)\n",
    )
    return text


def main(values: flags.FlagValues) -> int:
    base = command_line.read_run_config(values.config)
    workdir = run_path(values.workdir)
    path = config_flags.get_config_filename(values["config"])
    runs = plan_runs(*read_experiment(path, base), workdir)
    if not values.report_only:
        # fit() has signal handlers of its own. Between two runs everything is saved, so that
        # SIGTERM may end the command at once, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        for run in runs:
            check_dataset(run.config.data)
        from moe.training.trainer import Interrupted  # loads JAX, which bad input need not wait for

        try:
            train(runs)
        except (Interrupted, KeyboardInterrupt) as error:
            print(f"interrupted: {error or 'run the same command again to go on'}", file=sys.stderr)
            return INTERRUPTED
    print(compare(runs, workdir))
    if values.report_only or all(run.finished and not run.diverged for run in runs):
        return 0
    return DIVERGED


if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The directory of all runs: a new one, or one to go on with.")
    flags.DEFINE_boolean(
        "report_only", False, "Compares the runs that are there, and trains nothing."
    )
    command_line.run(main, __doc__, devices=True)
