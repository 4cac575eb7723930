"""Which metrics of a run stand in which figure of its report, and which in its headlines."""

import dataclasses
import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from launch.plotting import (
    Colours,
    Drawing,
    draw_crosses,
    draw_series,
    place_legend,
    set_percentages,
    set_steps,
    set_values,
)
from launch.series import AllSeries, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class MetricPlot:
    """One figure over steps: its file name, title and unit, and a label for each of its metrics."""

    stem: str
    title: str
    unit: str
    labels: dict[str, str]  # by the metric's name: at most three
    log: bool = False
    percent: bool = False  # values are shares, and are drawn times 100
    noisy: bool = True  # a long series is drawn with its medians


TRAINING_PLOTS = (
    MetricPlot(
        "loss",
        "Loss",
        "nats per token",
        {"train/loss": "training", "validation/loss": "validation"},
        log=True,
    ),
    MetricPlot(
        "bits_per_byte",
        "Bits per byte",
        "bits per byte of text",
        {"validation/bits_per_byte": "validation"},
        log=True,
    ),
    MetricPlot(
        "gradient_norm",
        "Gradient norm",
        "global norm before clipping",
        {"train/gradient_norm": "training"},
        log=True,
    ),
    MetricPlot(
        "learning_rate",
        "Learning rate",
        "learning rate",
        {"train/learning_rate": "training"},
        noisy=False,
    ),
    MetricPlot(
        "throughput", "Throughput", "tokens per second", {"train/tokens_per_second": "training"}
    ),
    MetricPlot(
        "mfu",
        "Model FLOPs utilisation (MFU)",
        "% of peak FLOP/s",
        {"train/mfu": "training"},
        percent=True,
    ),
    MetricPlot(
        "data_wait",
        "Wait for data",
        "% of a step's time",
        {"train/data_wait_fraction": "training"},
        percent=True,
    ),
)
ROUTING_PLOTS = (
    MetricPlot(
        "max_vio",
        "MaxVio",
        "largest load / mean − 1",
        {
            "router/max_vio": "mean of layers",
            "router/worst_max_vio": "worst layer",
            "validation/max_vio": "validation",
        },
    ),
    MetricPlot(
        "load_entropy",
        "Entropy of the load",
        "over log E: 1 is even",
        {
            "router/load_entropy": "mean of layers",
            "router/worst_load_entropy": "worst layer",
            "validation/load_entropy": "validation",
        },
    ),
    MetricPlot(
        "dropped",
        "Dropped assignments",
        "% of assignments",
        {
            "router/dropped_fraction": "mean of layers",
            "router/worst_dropped_fraction": "worst layer",
            "validation/dropped_fraction": "validation",
        },
        percent=True,
    ),
    MetricPlot(
        "dead_experts",
        "Experts without a token",
        "experts, over all layers",
        {"router/dead_experts": "training"},
    ),
    MetricPlot(
        "load_variation",
        "Variation of the load",
        "standard deviation / mean",
        {"router/load_variation": "training"},
    ),
    MetricPlot(
        "balance_loss", "Balance loss, unweighted", "1 is even", {"router/balance_loss": "training"}
    ),
    MetricPlot(
        "z_loss",
        "z-loss, unweighted",
        "(log-sum-exp of the logits)²",
        {"router/z_loss": "training"},
    ),
    MetricPlot(
        "logit_norm",
        "Norm of the router's logits",
        "mean of tokens",
        {"router/logit_norm": "training"},
    ),
    MetricPlot(
        "router_entropy",
        "Entropy of the router",
        "nats, mean of tokens",
        {"router/router_entropy": "training"},
    ),
    MetricPlot(
        "top1_margin",
        "Margin of the likeliest expert",
        "probability",
        {"router/top1_margin": "training"},
    ),
    MetricPlot(
        "bias_range",
        "Range of the biases",
        "largest − smallest, widest layer",
        {"router/bias_range": "training"},
    ),
)
GROUPS = {"Training": TRAINING_PLOTS, "Routing": ROUTING_PLOTS}  # by the heading on the page
SKIPPED = "train/skipped_steps"  # a running total, drawn as crosses at the steps where it grew


@dataclasses.dataclass(frozen=True)
class Headline:
    """A metric whose last value a reader looks for first, and how it is written."""

    metric: str
    label: str
    form: str
    unit: str


HEADLINES = (
    Headline("validation/loss", "validation loss", "{:.4f}", "nats per token"),
    Headline("validation/bits_per_byte", "bits per byte", "{:.4f}", "of text"),
    Headline("train/loss", "training loss", "{:.4f}", "nats per token"),
    Headline("router/worst_max_vio", "worst MaxVio", "{:.2f}", "largest load / mean − 1"),
    Headline("router/dropped_fraction", "dropped", "{:.1%}", "of assignments"),
    Headline("train/tokens_per_second", "throughput", "{:,.0f}", "tokens per second"),
    Headline("train/mfu", "MFU", "{:.1%}", "of peak FLOP/s"),
    Headline("train/data_wait_fraction", "wait for data", "{:.1%}", "of a step's time"),
    Headline(SKIPPED, "skipped updates", "{:,.0f}", "since the run began"),
)


def group_plots(metrics: AllSeries) -> dict[str, list[MetricPlot]]:
    """Returns the plots that have data, by their heading.

    A metric that is in none of GROUPS gets a plot of its own, under the prefix of its name.
    """
    groups = {
        heading: [plot for plot in plots if plot.labels.keys() & metrics]
        for heading, plots in GROUPS.items()
    }
    known = {SKIPPED}.union(*(plot.labels for plots in GROUPS.values() for plot in plots))
    for number, name in enumerate(sorted(metrics.keys() - known)):
        prefix, title = name.split("/", 1) if "/" in name else ("other", name)
        # The number keeps apart two names that differ only in their punctuation.
        stem = f"{number}_{re.sub('[^A-Za-z0-9]+', '_', name)[:60]}"
        groups.setdefault(prefix, []).append(MetricPlot(stem, title, "value", {name: title}))
    return groups


def is_always_zero(plot: MetricPlot, metrics: AllSeries) -> bool:
    """Returns whether all metrics of a plot are 0 at every step."""
    return not any(metrics[name].values.any() for name in plot.labels if name in metrics)


def plot_drawing(plot: MetricPlot, metrics: AllSeries, last_step: int) -> Drawing:
    """Returns the figure of a plot, over steps up to `last_step`."""
    return Drawing(plot.stem, plot.title, functools.partial(_paint, plot, metrics, last_step))


def _paint(
    plot: MetricPlot, metrics: AllSeries, last_step: int, axes: "Axes", colours: Colours
) -> None:
    axes.set_ylabel(plot.unit)
    drawn: list[Series] = []
    # Each metric has its own colour, also where the metrics before it were not logged.
    for role, (name, label) in zip(("first", "second", "third"), plot.labels.items(), strict=False):
        if name in metrics:
            steps, values = metrics[name]
            drawn.append(Series(steps, values * 100 if plot.percent else values))
            draw_series(axes, drawn[-1], label, colours[role], noisy=plot.noisy)
    _mark_steps(axes, plot, metrics, drawn, colours["alarm"])
    set_steps(axes, 1.02 * max(1, last_step))
    values = np.concatenate([series.values for series in drawn])
    finite = values[np.isfinite(values)]
    if plot.percent:
        set_percentages(axes, finite)
    else:
        set_values(axes, finite, log=plot.log)
    place_legend(axes)


def _mark_steps(
    axes: "Axes", plot: MetricPlot, metrics: AllSeries, drawn: list[Series], colour: str
) -> None:
    """Marks the steps whose value is not finite or, in the gradient norm's plot, was not used.

    A step whose gradient is not finite skips its update, and train/skipped_steps counts it.
    """
    if "train/gradient_norm" in plot.labels:
        label = "update skipped"
        steps, totals = metrics.get(SKIPPED, Series(np.zeros(0), np.zeros(0)))
        marked = set(steps[np.diff(totals, prepend=0) > 0])
    else:
        label = "not finite"
        marked = {step for steps, values in drawn for step in steps[~np.isfinite(values)]}
    if marked:
        draw_crosses(axes, sorted(marked), label, colour)
