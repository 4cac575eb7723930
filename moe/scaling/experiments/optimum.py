"""Finds the best model for a budget of training FLOPs, by minimising a fitted law numerically.

A law says which loss a model reaches with so many tokens. For a budget, each model has one number
of tokens that spends it, so the best model is the minimum of the law over the models. Each sample
of the coefficients that a bootstrap has drawn has a minimum of its own, and the interval of these
minima says how sure the best model is.

In arrays' names, S stands for samples of the coefficients, of which the first is the fit itself,
and P for points, which are models with their tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

# Columns of points, under the names of a table of runs. `size` is what the law counts as the size.
Columns = Mapping[str, np.ndarray]
Loss = Callable[[Columns], np.ndarray]  # maps the columns of points to loss_SP

FLOPS_PER_PARAMETER = 6.0  # per token, forward and backward (Kaplan et al. 2020, section 2.1)
DECADES = 4  # how far a size may be from sqrt(budget / 6), where a parameter sees one token
POINTS_PER_DECADE = 50
INTERVAL = (2.5, 97.5)  # the percentiles of the samples between which 95 % lie


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best point for a budget, and how far the samples' best points spread."""

    budget: float
    best: dict[str, float]  # the point's columns, and `loss`
    intervals: dict[str, tuple[float, float]]  # under the same names
    at_edge: float  # the share of samples that are best at the smallest or the largest size


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that differ in their size alone, as if there were one of any size between two ends.

    `columns` maps log10 of active parameters to the columns that do not depend on the tokens, and
    `flops_per_token`. The ends are log10 of active parameters, too.
    """

    ends: tuple[float, float]
    columns: Callable[[np.ndarray], Columns]

    def points(self, log_size: np.ndarray, budget: float) -> dict[str, np.ndarray]:
        """Returns the columns of models, each with the tokens that the budget pays for."""
        columns = dict(self.columns(log_size))
        per_token = columns.pop("flops_per_token")
        return columns | {"tokens": budget / per_token, "flops": np.full_like(per_token, budget)}


def dense_family(budget: float) -> Family:
    """Returns dense models around a budget's best one, at 6 FLOPs for each parameter and token."""
    middle = 0.5 * np.log10(budget / FLOPS_PER_PARAMETER)

    def columns(log_size: np.ndarray) -> Columns:
        size = 10.0**log_size
        names = ("size", "parameters", "active_parameters")
        columns = dict.fromkeys(names, size) | {"embedding_parameters": np.zeros_like(size)}
        return columns | {"flops_per_token": FLOPS_PER_PARAMETER * size}

    return Family((middle - DECADES, middle + DECADES), columns)


def best_size(loss: Loss, budget: float, families: Sequence[Family]) -> Optimum:
    """Returns the best size for a budget, if families had a model of any size."""
    found = [_best_of_family(loss, budget, family) for family in families]
    family_S = np.argmin([columns["loss"] for columns, _ in found], axis=0)
    samples_S = np.arange(len(family_S))
    columns = {
        name: np.stack([columns[name] for columns, _ in found])[family_S, samples_S]
        for name in found[0][0]
    }
    at_edge_S = np.stack([at_edge for _, at_edge in found])[family_S, samples_S]
    return summarise(budget, columns, float(np.mean(at_edge_S)))


def _best_of_family(loss: Loss, budget: float, family: Family) -> tuple[Columns, np.ndarray]:
    """Returns the columns of each sample's best model, [S], and whether it is at an end."""
    low, high = family.ends
    size_P = np.linspace(low, high, int(np.ceil((high - low) * POINTS_PER_DECADE)) + 1)
    log_loss_SP = np.log(loss(family.points(size_P, budget)))
    lowest_S = np.argmin(log_loss_SP, axis=1)
    best_S, log_loss_S = _lowest_of_parabola(size_P, log_loss_SP, lowest_S)
    columns = family.points(best_S, budget) | {"loss": np.exp(log_loss_S)}
    return columns, np.isin(lowest_S, (0, len(size_P) - 1))


def best_point(
    loss: Loss, budget: float, points: Columns, is_edge_P: np.ndarray
) -> tuple[int, Optimum]:
    """Returns the index of the best of given points, and the spread of the samples' best ones.

    `is_edge_P` marks the smallest and the largest models, beyond which the best one could lie.
    """
    loss_SP = loss(points)
    lowest_S = np.argmin(loss_SP, axis=1)
    at_edge = float(np.mean(is_edge_P[lowest_S]))
    columns = {name: np.asarray(values)[lowest_S] for name, values in points.items()}
    columns["loss"] = np.take_along_axis(loss_SP, lowest_S[:, None], axis=1)[:, 0]
    return int(lowest_S[0]), summarise(budget, columns, at_edge)


def summarise(budget: float, columns: Columns, at_edge: float) -> Optimum:
    """Returns the first sample's best point, and the intervals over the other samples.

    `columns` holds an array [S] for each column. A sample without a best point has NaN.
    """
    best = {name: float(values[0]) for name, values in columns.items()}
    intervals = {}
    for name, values in columns.items():
        low, high = np.nanpercentile(values[1:] if len(values) > 1 else values, INTERVAL)
        intervals[name] = (float(low), float(high))
    return Optimum(budget, best, intervals, at_edge)


def _lowest_of_parabola(
    x_P: np.ndarray, y_SP: np.ndarray, lowest_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the parabola through each lowest point and its neighbours is lowest, and y.

    The points are evenly spaced. Where the lowest one is at an edge, it is the answer itself.
    """
    inner_S = np.clip(lowest_S, 1, len(x_P) - 2)
    rows = np.arange(len(y_SP))
    left, middle, right = (y_SP[rows, inner_S + shift] for shift in (-1, 0, 1))
    slope, curvature = 0.5 * (right - left), left - 2 * middle + right
    is_inside = (lowest_S == inner_S) & (curvature > 0)
    shift = np.where(is_inside, -slope / np.where(curvature > 0, curvature, 1.0), 0.0)
    x_S = x_P[lowest_S] + shift * (x_P[1] - x_P[0])
    return x_S, y_SP[rows, lowest_S] + 0.5 * shift * slope
