"""Draws a fit: its runs, its best models, and its test on the largest budget."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from launch.fit.experts import SAME_SIZE, experts_drawing
from launch.fit.figures import (
    Best,
    Points,
    Surface,
    Words,
    best_drawings,
    contour_drawing,
    held_out_drawing,
    isoflop_drawing,
    residual_drawing,
)
from launch.fit.prediction import (
    best_of_any_size,
    can_spend,
    is_sparse,
    isoflop_model,
    law_loss,
    size_name,
    sizes,
)
from launch.fit.rates import best_rate_drawing, rate_drawing
from launch.plotting import Drawing
from moe.config import ConfigError
from moe.scaling.experiments.candidates import Candidate, smooth_families
from moe.scaling.experiments.optimum import FLOPS_PER_PARAMETER, Optimum
from moe.scaling.experiments.runs import Runs, make_runs
from moe.scaling.laws import Fit, HeldOut, predict
from moe.scaling.laws.hyperparameters import StepLaw
from moe.scaling.laws.isoflop import Curve, IsoFlop, fit_isoflop

LINE_POINTS = 25  # budgets at which the best model is sought for a line
EVERY = 5  # one of so many samples of the bootstrap makes the band around a line
BEYOND = 3.0  # times the largest budget: how far a line goes


def draw_fit(
    fit: Fit, optima: Sequence[Optimum], candidates: Sequence[Candidate], loss_axis: str
) -> list[Drawing]:
    """Returns the figures of a law of the loss, those that tell a reader most first."""
    law, words = fit.law, Words(size_name(fit.law), loss_axis)
    sparse = is_sparse(law.inputs)
    points = _points(fit.runs, sizes(law, vars(fit.runs)), fit.predicted)
    curves = [] if sparse else fit_curves(fit.runs, sizes(law, vars(fit.runs)))
    drawings = [isoflop_drawing(curves, words)] if curves else []
    if can_spend(law.inputs) and (candidates or not sparse):
        asked, line = _best(optima), _line(fit, candidates, optima)
        drawings += best_drawings(line, points, asked, curves, words)
        if not sparse:
            drawings.append(contour_drawing(_surface(fit), points, line, asked, words))
    if sparse:
        drawings.append(_experts(fit, points, words))
    drawings.append(residual_drawing(points, words))
    if fit.held_out is not None:
        drawings.append(_held_out(fit.held_out, fit.runs, points, words))
    return drawings


def draw_isoflop(found: IsoFlop, optima: Sequence[Optimum], loss_axis: str) -> list[Drawing]:
    """Returns the figures of approach 2."""
    words, runs = Words("parameters", loss_axis), found.runs
    points = _points(runs, runs.active_parameters, runs.loss)
    budgets = _budgets(runs, optima)
    line = _best([isoflop_model(found, [], budget)[0] for budget in budgets])
    return [
        isoflop_drawing(found.curves, words),
        *best_drawings(line, points, _best(optima), found.curves, words),
    ]


def draw_step_law(found: StepLaw, loss_axis: str) -> list[Drawing]:
    """Returns the figures of the best learning rates."""
    return [rate_drawing(found, loss_axis), best_rate_drawing(found)]


def _points(runs: Runs, parameters: np.ndarray, predicted: np.ndarray) -> Points:
    return Points(
        parameters=parameters,
        tokens=runs.tokens,
        flops=runs.flops,
        loss=runs.loss,
        predicted=predicted,
    )


def _experts(fit: Fit, points: Points, words: Words) -> Drawing:
    """Returns the figure of what experts bring to models of equal active parameters."""
    runs, law = fit.runs, functools.partial(predict, fit.law, fit.coefficients)
    if np.isnan(runs.active_parameters).any():  # a law that does not read them needs none
        return experts_drawing(runs, points.parameters, words.size, law, words.loss)
    return experts_drawing(runs, runs.active_parameters, "active parameters", law, words.loss)


def _held_out(held: HeldOut, runs: Runs, points: Points, words: Words) -> Drawing:
    """Returns the figure of the largest budget's errors, over sizes or over experts."""
    place = {name: number for number, name in enumerate(runs.run)}
    chosen = np.array([place[name] for name in held.run])
    x, name = points.parameters[chosen], words.size
    if np.max(x) < SAME_SIZE * np.min(x) and np.ptp(runs.experts[chosen]) > 0:
        x, name = runs.experts[chosen], "experts"
    budget = float(np.median(held.flops))
    return held_out_drawing(budget, x, held.errors, held.repeated_errors, name)


def fit_curves(runs: Runs, size: np.ndarray) -> list[Curve]:
    """Returns the parabolas over sizes of a table of iso-FLOP runs. Another table has none.

    `size` holds what the law counts as the runs' sizes. The runs have FLOPs of their own, so that
    nothing else follows from their parameters.
    """
    counted = dataclasses.replace(
        runs, parameters=size, active_parameters=size, embedding_parameters=np.zeros_like(size)
    )
    try:
        return fit_isoflop(counted, num_bootstraps=1).curves
    except ConfigError:
        return []


def _surface(fit: Fit) -> Surface:
    """Returns the loss of dense models over parameters and tokens, at 6 N D FLOPs."""

    def loss(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        n, d = parameters.ravel(), tokens.ravel()
        columns = {"parameters": n, "active_parameters": n, "embedding_parameters": 0 * n}
        columns |= {"tokens": d, "flops": FLOPS_PER_PARAMETER * n * d}
        return predict(fit.law, fit.coefficients, make_runs(**columns)).reshape(parameters.shape)

    return loss


def _budgets(runs: Runs, optima: Sequence[Optimum]) -> np.ndarray:
    """Returns the budgets of a line, from the smallest run's to beyond the largest one's."""
    last = max([BEYOND * float(runs.flops.max()), *(optimum.budget for optimum in optima)])
    return np.geomspace(float(runs.flops.min()), last, LINE_POINTS)


def _line(fit: Fit, candidates: Sequence[Candidate], optima: Sequence[Optimum]) -> Best:
    """Returns the best models over budgets, as if there were models of any size."""
    loss, families = law_loss(fit, EVERY), smooth_families(candidates)
    budgets = _budgets(fit.runs, optima)
    return _best([best_of_any_size(fit.law, loss, families, budget) for budget in budgets])


def _best(optima: Sequence[Optimum]) -> Best:
    """Returns optima as the arrays of a figure."""
    arrays = {}
    for name in ("size", "tokens", "loss"):
        values = [(best.best[name], *best.intervals[name]) for best in optima if name in best.best]
        arrays[name] = np.array(values).reshape(-1, 3)
    budgets = np.array([optimum.budget for optimum in optima])
    return Best(budgets, arrays["size"], arrays["tokens"], arrays["loss"])
