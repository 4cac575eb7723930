"""The figures of a law: what was fitted, how far it is off, and what it says of other budgets.

Runs are dots, whose shade is their training FLOPs. A law is a line of the first colour, with its
95 % interval as a band around it. A diamond of the second colour is the model that the table names
for a budget that was asked for. It exists, while the line is the best over models of any size.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.fit.axes import (
    BAND,
    DOT,
    add_bar,
    diamonds,
    padded,
    power_text,
    round_levels,
    set_counts,
    set_flops,
    set_losses,
    shade_by,
    shade_of,
    shades,
    tick_values,
)
from launch.plotting import Colours, Drawing, place_legend
from moe.scaling.laws.isoflop import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Surface = Callable[[np.ndarray, np.ndarray], np.ndarray]  # the loss at parameters and tokens


@dataclasses.dataclass(frozen=True)
class Words:
    """How the axes name what they show: which parameters are counted, and the unit of losses."""

    size: str = "parameters"
    loss: str = "loss, nats per token"


@dataclasses.dataclass(frozen=True)
class Points:
    """The runs that a law was fitted to, as columns, and what the law says of each."""

    parameters: np.ndarray  # those that the law counts
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Best:
    """The best models over budgets. Each array [budgets, 3] holds values, low and high ends."""

    budgets: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray  # empty for a law that says no loss


def isoflop_drawing(curves: Sequence[Curve], words: Words) -> Drawing:
    """Returns the losses of each budget over sizes, with their parabolas and minima."""
    paint = functools.partial(_paint_curves, curves, words)
    return Drawing("isoflop", "Loss over size for each budget", paint)


def _paint_curves(curves: Sequence[Curve], words: Words, axes: "Axes", colours: Colours) -> None:
    mapped = shade_by(colours, np.array([curve.flops for curve in curves]))
    for curve in curves:
        shade = shade_of(mapped, curve.flops)
        low, high = np.log(padded(curve.parameters[curve.used], 0.05))
        x = np.linspace(low, high, 100)
        # A parabola whose minimum does not count is dashed.
        style: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--" if curve.problem else "-"}
        axes.plot(np.exp(x), np.polyval(curve.parabola[::-1], x), color=shade, **style)
        axes.plot(curve.parameters[curve.used], curve.loss[curve.used], color=shade, **DOT)
        others: dict[str, Any] = DOT | {"markerfacecolor": "none", "markeredgewidth": 0.9}
        axes.plot(curve.parameters[~curve.used], curve.loss[~curve.used], color=shade, **others)
    good = [curve for curve in curves if not curve.problem]
    if good:
        x, y = [curve.best_parameters for curve in good], [curve.best_loss for curve in good]
        diamonds(axes, x, y, colours["second"], colours["card"], "minimum")
    if len(good) < len(curves):
        dashes: dict[str, Any] = {"linewidth": 1.3, "linestyle": "--"}
        axes.plot([], [], color=colours["muted"], label="without a minimum", **dashes)
    sizes = np.concatenate([curve.parameters for curve in curves])
    losses = np.concatenate([curve.loss for curve in curves])
    near = np.concatenate([curve.loss[curve.used] for curve in curves])
    bottom, top = padded(losses)
    # Runs far from the minima would leave the parabolas no room. Those above the top are counted.
    top = min(top, float(near.max() * (near.max() / near.min()) ** 0.4))
    top = max(top, 1.001 * float(near.max()))
    if any(not curve.used.all() for curve in curves):
        hidden = int((losses > top).sum())
        above = f" ({hidden} above)" if hidden else ""
        hollow: dict[str, Any] = DOT | {"markerfacecolor": "none"}
        axes.plot(
            [], [], color=colours["muted"], label=f"run far from the minimum{above}", **hollow
        )
    axes.plot([], [], color=colours["muted"], label="run", **DOT)
    set_counts(axes.xaxis, words.size, *padded(sizes))
    set_losses(axes.yaxis, words.loss, bottom, top)
    add_bar(axes, mapped, "training FLOPs", power_text)
    place_legend(axes)


def contour_drawing(
    loss: Surface, points: Points, best: Best, asked: Best, words: Words
) -> Drawing:
    """Returns the law as lines of equal loss over parameters and tokens."""
    paint = functools.partial(_paint_contours, loss, points, best, asked, words)
    return Drawing("contours", "Lines of equal loss", paint)


def _paint_contours(
    loss: Surface,
    points: Points,
    best: Best,
    asked: Best,
    words: Words,
    axes: "Axes",
    colours: Colours,
) -> None:
    x_ends = padded(np.concatenate([points.parameters, asked.parameters[:, 0]]), 0.08)
    y_ends = padded(np.concatenate([points.tokens, asked.tokens[:, 0]]), 0.08)
    x, y = np.geomspace(*x_ends, 160), np.geomspace(*y_ends, 160)
    surface = loss(*np.meshgrid(x, y))
    highest = min(float(np.max(points.predicted)), float(np.percentile(surface, 97)))
    levels = round_levels(float(surface.min()), highest)
    # Labels find their places on the lines by the axes' scale, so it comes first.
    set_counts(axes.xaxis, words.size, *x_ends)
    set_counts(axes.yaxis, "tokens", *y_ends)
    if len(levels) > 1:
        _paint_levels(axes, colours, x, y, surface, levels)
    small = DOT | {"markersize": 3, "alpha": 0.8}
    axes.plot(points.parameters, points.tokens, color=colours["muted"], label="run", **small)
    line = {"color": colours["text"], "linewidth": 1.6, "label": "best for its budget"}
    axes.plot(best.parameters[:, 0], best.tokens[:, 0], **line)
    _paint_asked(axes, colours, asked.parameters[:, 0], asked.tokens[:, 0])
    axes.grid(False)
    place_legend(axes)


def _paint_levels(
    axes: "Axes",
    colours: Colours,
    x: np.ndarray,
    y: np.ndarray,
    surface: np.ndarray,
    levels: list[float],
) -> None:
    """Paints lines at some losses, with the losses on them, and the areas between them."""
    from matplotlib.patheffects import withStroke

    shown: dict[str, Any] = {"levels": levels, "cmap": shades(colours).reversed()}
    axes.contourf(x, y, surface, alpha=0.16, extend="both", **shown)
    lines = axes.contour(x, y, surface, linewidths=0.9, **shown)
    labels = axes.clabel(lines, fontsize=7, fmt="%g", colors=colours["text"], inline=False)
    for label in labels:
        label.set_path_effects([withStroke(linewidth=2, foreground=colours["card"])])


def residual_drawing(points: Points, words: Words) -> Drawing:
    """Returns how far each run is above or below the law."""
    paint = functools.partial(_paint_residuals, points, words)
    return Drawing("residuals", "Residuals of the fitted runs", paint)


def _paint_residuals(points: Points, words: Words, axes: "Axes", colours: Colours) -> None:
    percent = 100 * (points.loss / points.predicted - 1)
    spread = float(np.sqrt(np.mean(percent**2)))
    mapped = shade_by(colours, points.flops)
    axes.axhline(0, color=colours["text"], linewidth=1)
    axes.axhspan(-spread, spread, color=colours["first"], alpha=BAND / 2, linewidth=0)
    shown = {"c": points.flops, "norm": mapped.norm, "cmap": mapped.cmap}
    axes.scatter(points.predicted, percent, s=18, zorder=3, **shown)
    set_losses(axes.xaxis, f"predicted {words.loss}", *padded(points.predicted))
    axes.set_ylabel("measured − predicted, %")
    limit = 1.3 * float(np.max(np.abs(percent), initial=1e-3))
    axes.set_ylim(-limit, limit)
    note = f"band: root mean square, {spread:.2g} %"
    axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize=8.5)
    add_bar(axes, mapped, "training FLOPs", power_text)


def held_out_drawing(
    budget: float, x: np.ndarray, errors: np.ndarray, repeated: np.ndarray, x_name: str
) -> Drawing:
    """Returns the errors of predicting the largest budget from the others, over `x`.

    `errors` are relative. So are those of `repeated`, which predicts the loss that the next smaller
    budget reached.
    """
    paint = functools.partial(_paint_held_out, x, errors, repeated, x_name)
    return Drawing("held_out", f"Predicting {power_text(budget)} FLOP from less", paint)


def _paint_held_out(
    x: np.ndarray,
    errors: np.ndarray,
    repeated: np.ndarray,
    x_name: str,
    axes: "Axes",
    colours: Colours,
) -> None:
    axes.axhline(0, color=colours["text"], linewidth=1)
    for values, role, marker, label in (
        (repeated, "second", "X", "repeating the next smaller budget's loss"),
        (errors, "first", "o", "the law"),
    ):
        axes.vlines(x, 0, 100 * values, color=colours[role], linewidth=1, alpha=0.5)
        style = DOT | {"marker": marker, "markersize": 6, "markeredgewidth": 0}
        axes.plot(x, 100 * values, color=colours[role], label=label, **style)
    set_counts(axes.xaxis, x_name, *padded(x))
    tick_values(axes, x)
    axes.set_ylabel("predicted − measured, %")
    axes.margins(y=0.12)
    place_legend(axes)


def best_drawings(
    best: Best, points: Points, asked: Best, curves: Sequence[Curve], words: Words
) -> list[Drawing]:
    """Returns the best parameters, tokens and loss over budgets, with their intervals."""
    drawings = []
    for name, title, label in (
        ("parameters", "The best size for a budget", words.size),
        ("tokens", "The best number of tokens for a budget", "tokens"),
        ("loss", "The best loss for a budget", words.loss),
    ):
        if len(getattr(best, name)):
            paint = functools.partial(_paint_best, name, label, best, points, asked, curves)
            drawings.append(Drawing(f"best_{name}", title, paint))
    return drawings


def _paint_best(
    name: str,
    label: str,
    best: Best,
    points: Points,
    asked: Best,
    curves: Sequence[Curve],
    axes: "Axes",
    colours: Colours,
) -> None:
    value, low, high = getattr(best, name).T
    measured = getattr(points, name)
    band = {"alpha": BAND, "linewidth": 0, "color": colours["first"]}
    heights = np.concatenate([value, low, high, measured])
    if np.isfinite(low).any():  # else nothing shows the noise
        axes.fill_between(best.budgets, low, high, label="95 % interval", **band)
    axes.plot(best.budgets, value, color=colours["first"], linewidth=1.6, label="the law")
    faint = DOT | {"markersize": 3, "alpha": 0.7}
    axes.plot(points.flops, measured, color=colours["muted"], label="run", **faint)
    minima = [curve for curve in curves if not curve.problem]
    if minima:
        lowest = [getattr(curve, f"best_{name}") for curve in minima]
        style = DOT | {"marker": "s", "markersize": 4.5}
        budgets = [curve.flops for curve in minima]
        axes.plot(budgets, lowest, color=colours["third"], label="iso-FLOP minimum", **style)
    found = getattr(asked, name)  # empty where no budget was asked for
    _paint_asked(axes, colours, asked.budgets, found[:, 0], found[:, 1:])
    ends = padded(np.concatenate([best.budgets, points.flops]), 0.02)
    set_flops(axes.xaxis, "training FLOPs", *ends)
    set_vertical = set_losses if name == "loss" else set_counts
    set_vertical(axes.yaxis, label, *padded(heights[np.isfinite(heights)]))
    place_legend(axes)


def _paint_asked(
    axes: "Axes", colours: Colours, x: np.ndarray, y: np.ndarray, ends: np.ndarray | None = None
) -> None:
    """Marks the best models of the budgets that were asked for, with bars between both `ends`."""
    if len(x) == 0:
        return
    if ends is not None:
        axes.vlines(x, ends[:, 0], ends[:, 1], color=colours["second"], linewidth=1.3, zorder=4)
    diamonds(axes, x, y, colours["second"], colours["card"], "asked for")
