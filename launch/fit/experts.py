"""The figure of what experts bring: losses over their number or their granularity.

The law is evaluated between the numbers that were trained, too: straight lines from one run to the
next would have kinks that the law does not have.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from launch.fit.axes import (
    DOT,
    add_bar,
    count_text,
    padded,
    set_counts,
    set_losses,
    shade_by,
    shade_of,
    tick_values,
)
from launch.plotting import Colours, Drawing, place_legend
from moe.scaling.experiments.runs import Runs, make_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME_SIZE = 1.1  # models whose sizes differ by less than this factor share a line
LINE_POINTS = 200
# Of mixtures of one size, these columns are linear in the number of experts, or constant.
LINEAR = (
    "parameters",
    "active_parameters",
    "embedding_parameters",
    "tokens",
    "flops",
    "experts",
    "granularity",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """Runs of one size on as many tokens, and the law between them, as numbers and losses."""

    size: float
    x: np.ndarray
    loss: np.ndarray
    law_x: np.ndarray
    law_loss: np.ndarray


def experts_drawing(
    runs: Runs, size: np.ndarray, size_name: str, law: Callable[[Runs], np.ndarray], loss_axis: str
) -> Drawing:
    """Returns losses over the number of experts, or over their granularity if that varies alone.

    Runs of one `size` share a line. `law` predicts the losses of runs.
    """
    has_experts = len(np.unique(runs.experts)) > 1
    name, other = ("experts", "granularity") if has_experts else ("granularity", "experts")
    title = "Loss over the number of experts" if has_experts else "Loss over granularity"
    lines = [
        _line(runs.take(chosen), float(np.median(size[chosen])), name, law)
        for same_size in size_groups(size, runs.tokens)
        for chosen in _split_kinds(runs, same_size, other)
    ]
    return Drawing("experts", title, functools.partial(_paint, name, size_name, lines, loss_axis))


def size_groups(sizes: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of runs that have nearly the same size and as many tokens."""
    order = np.argsort(sizes, kind="stable")
    jumps = np.diff(np.log(sizes[order])) > np.log(SAME_SIZE)
    size_number = np.empty(len(order), int)
    size_number[order] = np.concatenate([[0], np.cumsum(jumps)])
    token_number = np.round(np.log(tokens) / np.log(SAME_SIZE)).astype(int)
    keys = np.stack([size_number, token_number], 1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    return [np.flatnonzero(group.ravel() == number) for number in range(group.max() + 1)]


def _split_kinds(runs: Runs, chosen: np.ndarray, other: str) -> Iterator[np.ndarray]:
    """Yields the indices of each kind of mixture among `chosen`, with the dense models.

    A kind has one value of the column `other`, and as many experts for each token.
    """
    kind = np.nan_to_num(np.stack([getattr(runs, other), runs.experts_per_token], 1))[chosen]
    is_dense = runs.experts[chosen] == 1
    for one in np.unique(kind[~is_dense] if np.any(~is_dense) else kind, axis=0):
        yield chosen[is_dense | np.all(kind == one, axis=1)]


def _line(runs: Runs, size: float, name: str, law: Callable[[Runs], np.ndarray]) -> Line:
    """Returns what is drawn of runs of one size and kind, over their column `name`."""
    x = getattr(runs, name)
    known, place = np.unique(x, return_inverse=True)
    law_x = np.geomspace(known[0], known[-1], LINE_POINTS)

    def between(values: np.ndarray) -> np.ndarray:
        """Returns the values at `law_x`, between the means of those of equal runs."""
        return np.interp(law_x, known, np.bincount(place, values) / np.bincount(place))

    columns = {column: between(getattr(runs, column)) for column in LINEAR}
    active = between((1 - runs.sparsity) * runs.experts)
    columns |= {"experts_per_token": active, "sparsity": 1 - active / columns["experts"]}
    return Line(size, x, runs.loss, law_x, law(make_runs(**columns)))


def _paint(
    name: str,
    size_name: str,
    lines: Sequence[Line],
    loss_axis: str,
    axes: "Axes",
    colours: Colours,
) -> None:
    mapped = shade_by(colours, np.array([line.size for line in lines]))
    for line in lines:
        shade = shade_of(mapped, line.size)
        axes.plot(line.law_x, line.law_loss, color=shade, linewidth=1.3)
        axes.plot(line.x, line.loss, color=shade, **DOT)
    axes.plot([], [], color=colours["muted"], label="run", **DOT)
    axes.plot([], [], color=colours["muted"], linewidth=1.3, label="the law")
    x = np.concatenate([line.x for line in lines])
    losses = np.concatenate([values for line in lines for values in (line.loss, line.law_loss)])
    set_counts(axes.xaxis, name, *padded(x))
    tick_values(axes, x)
    set_losses(axes.yaxis, loss_axis, *padded(losses))
    add_bar(axes, mapped, size_name, count_text)
    place_legend(axes)
