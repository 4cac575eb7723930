"""Draws a fit: what is shown of its runs, its best models and its test on the largest budget."""

from collections.abc import Sequence

import numpy as np

from launch.fit.figures import (
    Best,
    Curve,
    Points,
    Surface,
    Words,
    best_drawings,
    contour_drawing,
    experts_drawing,
    held_out_drawing,
    isoflop_drawing,
    residual_drawing,
)
from launch.fit.prediction import best_model, is_sparse, law_loss, size_name, sizes
from launch.plotting import Drawing
from moe.scaling.candidates import Candidate
from moe.scaling.laws import Fit, predict
from moe.scaling.optimum import FLOPS_PER_PARAMETER, Optimum
from moe.scaling.runs import make_runs

LINE_POINTS = 25  # budgets at which the best model is sought for a line
EVERY = 5  # one of so many samples of the bootstrap makes the band around a line
BEYOND = 3.0  # times the largest budget: how far a line goes


def draw_fit(
    fit: Fit,
    curves: Sequence[Curve],
    optima: Sequence[Optimum],
    candidates: Sequence[Candidate],
    unit: str,
) -> list[Drawing]:
    """Returns the figures of a law, those that tell a reader most first."""
    law, words = fit.law, Words(size_name(fit.law), f"loss, {unit}")
    points = _points(fit)
    drawings = [isoflop_drawing(curves, words)] if curves else []
    has_budgets = bool({"tokens", "tokens_per_parameter"} & set(law.inputs))
    can_choose = has_budgets and (bool(candidates) or not is_sparse(law))
    if can_choose:
        asked = _best(optima)
        line = _line(fit, candidates, optima)
        drawings += best_drawings(line, points, asked, curves, words)
        if not is_sparse(law):
            drawings.append(contour_drawing(_surface(fit), points, line, asked, words))
    if is_sparse(law):
        drawings.append(experts_drawing(points, words))
    drawings.append(residual_drawing(points, words))
    if fit.held_out is not None:
        held = fit.held_out
        place = {name: number for number, name in enumerate(fit.runs.run)}
        chosen = points.parameters[[place[name] for name in held.run]]
        budget = float(np.median(held.flops))
        drawings.append(held_out_drawing(budget, chosen, held.errors, held.repeated_errors, words))
    return drawings


def _points(fit: Fit) -> Points:
    runs = fit.runs
    return Points(
        parameters=sizes(fit.law, vars(runs)),
        tokens=runs.tokens,
        flops=runs.flops,
        loss=runs.loss,
        predicted=fit.predicted,
        experts=runs.experts,
        granularity=runs.granularity,
    )


def _surface(fit: Fit) -> Surface:
    """Returns the loss of dense models over parameters and tokens, at 6 N D FLOPs."""

    def loss(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        n, d = parameters.ravel(), tokens.ravel()
        columns = {"parameters": n, "active_parameters": n, "embedding_parameters": 0 * n}
        columns |= {"tokens": d, "flops": FLOPS_PER_PARAMETER * n * d}
        return predict(fit.law, fit.coefficients, make_runs(**columns)).reshape(parameters.shape)

    return loss


def _line(fit: Fit, candidates: Sequence[Candidate], optima: Sequence[Optimum]) -> Best:
    """Returns the best models over budgets from the smallest run's to beyond the largest one's."""
    last = max([BEYOND * fit.runs.flops.max(), *(optimum.budget for optimum in optima)])
    budgets = np.geomspace(fit.runs.flops.min(), last, LINE_POINTS)
    loss = law_loss(fit, EVERY)
    return _best([best_model(fit.law, loss, candidates, budget)[0] for budget in budgets])


def _best(optima: Sequence[Optimum]) -> Best:
    """Returns optima as the arrays of a figure."""
    arrays = {}
    for name in ("size", "tokens", "loss"):
        values = [(best.best[name], *best.intervals[name]) for best in optima]
        arrays[name] = np.array(values).reshape(-1, 3)
    budgets = np.array([optimum.budget for optimum in optima])
    return Best(budgets, arrays["size"], arrays["tokens"], arrays["loss"])
