"""Draws a comparison: losses of the variants, their training losses, and what a loss costs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.comparison import COSTS
from launch.plotting import THEMES, as_pdf, as_png, style
from launch.series import Series, block_medians, mean_series, read_series
from moe.storage.paths import RunPath, write_whole
from moe.workdir.tracking import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe & Ito 2008, which colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")


def variant_colours(variants: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each variant; they repeat from the ninth on."""
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(variants)}


def write_losses(
    results: Mapping[str, dict[str, Any]], workdirs: Mapping[str, Sequence[RunPath]], path: RunPath
) -> None:
    """Writes a figure of two panels.

    The left one has the finished runs' validation losses with error bars, the right one the
    training loss of each variant: the mean of the runs that have begun, and each run as a faint
    line. `workdirs` are the run directories of each variant.
    """
    import matplotlib  # takes a second, which bad input need not wait for
    from matplotlib.figure import Figure

    colours = variant_colours(list(results))
    with matplotlib.rc_context(style(THEMES["light"])):
        figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
        losses, curves = figure.subplots(1, 2)
        _draw_losses(losses, results, colours)
        _draw_curves(curves, workdirs, colours)
        _save(figure, path)


def write_fronts(compared: Mapping[str, Any], path: RunPath) -> None:
    """Writes a figure with a panel for each cost: the variants, and the front among them."""
    import matplotlib
    from matplotlib.figure import Figure

    results, fronts = compared["variants"], compared["pareto_fronts"]
    with matplotlib.rc_context(style(THEMES["light"])):
        figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
        panels = figure.subplots(2, 2).flat
        for axes, (cost, title) in zip(panels, COSTS.items(), strict=True):
            _draw_front(axes, results, fronts[cost], cost, title)
        # Another panel may lack a variant whose step time is not known, but none has more.
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        _save(figure, path)


def _save(figure: "Figure", path: RunPath) -> None:
    """Writes a figure as a PNG file, and as a PDF file beside it."""
    write_whole(path, as_png(figure))
    write_whole(path.with_suffix(".pdf"), as_pdf(figure))


def _draw_losses(
    axes: "Axes", results: Mapping[str, dict[str, Any]], colours: Mapping[str, str]
) -> None:
    axes.set(title="Validation loss", xlabel="nats per token: each seed, mean ± standard error")
    axes.set_yticks(range(len(results)), list(results), color=THEMES["light"]["text"])
    # The first variant is on top. One without a loss has an empty row.
    axes.set_ylim(len(results) - 0.5, -0.5)
    for row, (variant, values) in enumerate(results.items()):
        loss, colour = values["loss"], colours[variant]
        if loss["mean"] is None:
            continue
        of_seeds = list(loss["of_seeds"].values())
        axes.plot(of_seeds, [row] * len(of_seeds), ".", color=colour, alpha=0.4)
        error = loss["standard_error"]
        axes.errorbar(loss["mean"], row, xerr=error, fmt="o", capsize=4, color=colour)


def _draw_curves(
    axes: "Axes", workdirs: Mapping[str, Sequence[RunPath]], colours: Mapping[str, str]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(title="Training loss", xlabel="step", ylabel="nats per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for variant, paths in workdirs.items():
        runs = [loss for path in paths if len((loss := _training_loss(path)).steps)]
        line: dict[str, Any] = {"color": colours[variant]}
        for loss in runs if len(runs) > 1 else ():
            axes.plot(*_smooth(loss), linewidth=0.7, alpha=0.2, **line)
        if runs and len((mean := mean_series(runs)).steps):
            mean = _smooth(mean)
            line["marker"] = "o" if len(mean.steps) == 1 else None  # else it would not be seen
            axes.plot(*mean, label=variant, linewidth=1.4, **line)
    if axes.lines:
        axes.legend()


def _training_loss(workdir: RunPath) -> Series:
    """Returns the training loss of a run, which is empty if the run has not begun."""
    metrics = read_metrics(workdir) if (workdir / METRICS_FILE).exists() else []
    return read_series(metrics, "train/loss")


def _smooth(series: Series) -> Series:
    return block_medians(series, min(40, len(series.steps)))


def _draw_front(
    axes: "Axes",
    results: Mapping[str, dict[str, Any]],
    front: Sequence[str],
    cost: str,
    title: str,
) -> None:
    """Draws each variant, filled if it is on the front, and the front as steps."""
    axes.set(title=f"Loss and {title}", xlabel=title, ylabel="nats per token")
    ends = [(results[name][cost], results[name]["loss"]["mean"]) for name in front]
    if ends:
        line = {"color": "#b0b6bd", "linewidth": 1.2, "zorder": 1}
        axes.step(*zip(*ends, strict=True), where="post", **line)
    paid = []
    for name, colour in variant_colours(list(results)).items():
        loss, error = results[name]["loss"]["mean"], results[name]["loss"]["standard_error"]
        if loss is None or results[name][cost] is None:
            continue
        paid.append(results[name][cost])
        face = colour if name in front else THEMES["light"]["card"]
        (point, *_) = axes.errorbar(
            results[name][cost], loss, yerr=error, fmt="o", color=colour, label=name
        )
        point.set_markerfacecolor(face)
    if paid:
        # Without a unit, 3.3 ms would read as 3.3 m.
        _set_costs(axes, paid, unit="s" if cost == "step_seconds" else "")
    else:  # an axis of no values would show numbers that mean nothing
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not known yet", ha="center", transform=axes.transAxes)


def _set_costs(axes: "Axes", paid: Sequence[float], unit: str) -> None:
    """Makes the horizontal axis logarithmic if the costs span a decade, and names a few of them."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if max(paid) >= 10 * min(paid):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(unit, sep=" "))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.1, y=0.12)
