"""The figures of the step law: losses over learning rates, and the best learning rates."""

import functools
from typing import TYPE_CHECKING

import numpy as np

from launch.fit.axes import (
    DOT,
    add_bar,
    count_text,
    diamonds,
    padded,
    set_counts,
    set_losses,
    set_rates,
    shade_by,
    shade_of,
)
from launch.plotting import Colours, Drawing, place_legend
from moe.scaling.laws.hyperparameters import Grid, StepLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rate_drawing(found: StepLaw, loss_axis: str) -> Drawing:
    """Returns the lowest loss at each learning rate, for each size and number of tokens."""
    paint = functools.partial(_paint_rates, found, loss_axis)
    return Drawing("learning_rates", "Loss over the learning rate", paint)


def _paint_rates(found: StepLaw, loss_axis: str, axes: "Axes", colours: Colours) -> None:
    mapped = shade_by(colours, np.array([_size(grid) for grid in found.grids]))
    rates, losses = [], []
    for grid in found.grids:
        rate = np.unique(grid.runs.learning_rate)
        # Over batches, the best run of each learning rate.
        loss = [grid.runs.loss[grid.runs.learning_rate == value].min() for value in rate]
        shade = shade_of(mapped, _size(grid))
        axes.plot(rate, loss, color=shade, linewidth=1.1)
        axes.plot(rate, loss, color=shade, **DOT)
        rates.append(rate)
        losses.append(loss)
    x = [grid.runs.learning_rate[grid.best] for grid in found.grids]
    y = [grid.runs.loss[grid.best] for grid in found.grids]
    diamonds(axes, x, y, colours["second"], colours["card"], "lowest loss")
    axes.plot([], [], color=colours["muted"], label="best run of a learning rate", **DOT)
    set_rates(axes.xaxis, "learning rate", *padded(np.concatenate(rates)))
    set_losses(axes.yaxis, loss_axis, *padded(np.concatenate(losses)))
    add_bar(axes, mapped, "non-embedding parameters", count_text)
    place_legend(axes)


def best_rate_drawing(found: StepLaw) -> Drawing:
    """Returns the best learning rates over tokens, with the law as a line for each size."""
    paint = functools.partial(_paint_best_rates, found)
    return Drawing("best_learning_rates", "The best learning rate", paint)


def _paint_best_rates(found: StepLaw, axes: "Axes", colours: Colours) -> None:
    sizes = np.array([_size(grid) for grid in found.grids])
    tokens = np.array([np.median(grid.runs.tokens) for grid in found.grids])
    best = np.array([grid.runs.learning_rate[grid.best] for grid in found.grids])
    factor, by_size, by_tokens = list(found.coefficients.values())[:3]
    mapped = shade_by(colours, sizes)
    ends = np.array(padded(tokens))
    lines = []
    for size in np.unique(sizes):
        lines.append(factor * size**by_size * ends**by_tokens)
        axes.plot(ends, lines[-1], color=shade_of(mapped, size), linewidth=1.3)
    for x, y, size in zip(tokens, best, sizes, strict=True):
        axes.plot(x, y, color=shade_of(mapped, size), **DOT)
    axes.plot([], [], color=colours["muted"], linewidth=1.3, label="the law")
    axes.plot([], [], color=colours["muted"], label="best of a grid", **DOT)
    set_counts(axes.xaxis, "tokens", *ends)
    set_rates(axes.yaxis, "learning rate", *padded(np.concatenate([best, *lines])))
    add_bar(axes, mapped, "non-embedding parameters", count_text)
    place_legend(axes)


def _size(grid: Grid) -> float:
    return float(np.median(grid.runs.active_parameters - grid.runs.embedding_parameters))
