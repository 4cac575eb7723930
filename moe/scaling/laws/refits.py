"""Fits a law again: to resampled runs, without the largest budget, and under another delta."""

import dataclasses

import numpy as np

from moe.scaling.laws.formulas import Law, read_inputs
from moe.scaling.laws.minimise import Problem, Progress, gauss_newton
from moe.scaling.laws.optimum import polish
from moe.scaling.laws.result import HeldOut, named, predict
from moe.scaling.runs import Runs

DELTAS = (1e-4, 1e-3, 1e-2, np.inf)
_OTHER_STARTS = 4


def bootstrap(
    problem: Problem,
    theta_K: np.ndarray,
    run_names: np.ndarray,
    generator: np.random.Generator,
    count: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Returns the fitted coefficients of resampled tables, [count, K].

    Runs are drawn with replacement, and all rows of a run together. Each resample is fitted from
    the optimum of all runs and from 4 starts elsewhere, and the best of the five counts.
    """
    _, run_N = np.unique(run_names, return_inverse=True)
    num_runs = run_N.max() + 1
    drawn = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), count)
    weight_PN = drawn[:, run_N].astype(np.float64)
    others = problem.law.draw(
        generator, count * _OTHER_STARTS, problem.inputs, np.log(problem.loss_N)
    ).reshape(count, _OTHER_STARTS, -1)
    start_PSK = np.concatenate([np.broadcast_to(theta_K, (count, 1, len(theta_K))), others], 1)
    starts = start_PSK.shape[1]
    theta_PK, value_P = gauss_newton(
        problem,
        start_PSK.reshape(count * starts, -1),
        np.repeat(weight_PN, starts, 0),
        tolerance=1e-9,
        progress=progress,
    )
    best = np.argmin(value_P.reshape(count, starts), 1)
    return theta_PK.reshape(count, starts, -1)[np.arange(count), best]


def drift(problem: Problem, theta_K: np.ndarray) -> dict[float, dict[str, float]]:
    """Returns the coefficients under several deltas of Huber's function, by delta."""
    result = {}
    for delta in DELTAS:
        objective = dataclasses.replace(problem.objective, delta=delta)
        theta_PK, _ = polish(dataclasses.replace(problem, objective=objective), theta_K[None])
        result[delta] = named(problem.law, problem.law.public(theta_PK[0]))
    return result


def budgets(flops: np.ndarray) -> np.ndarray:
    """Returns the number of each run's budget, from 0, the smallest one.

    Runs belong to one budget if no gap of more than 10 % lies between their FLOPs. If that makes
    no three budgets of two runs or more on average, each tenth of the runs is one.
    """
    order = np.argsort(flops, kind="stable")
    jumps = np.diff(np.log(flops[order])) > np.log(1.1)
    number = np.concatenate([[0], np.cumsum(jumps)])
    if number[-1] < 2 or len(flops) < 2 * (number[-1] + 1):
        number = np.arange(len(flops)) * min(10, len(flops)) // len(flops)
    result = np.empty(len(flops), int)
    result[order] = number
    return result


def predict_largest_budget(
    law: Law, runs: Runs, theta_K: np.ndarray, generator: np.random.Generator, num_starts: int
) -> HeldOut | None:
    """Returns the largest budget's losses as predicted by a fit to the others.

    Returns None if the others are too few for a fit.
    """
    budget_N = budgets(runs.flops)
    largest = budget_N == budget_N.max()
    rest, held = runs.take(~largest), runs.take(largest)
    if len(rest) <= len(law.coefficients):
        return None
    problem = Problem(law, read_inputs(law, rest), rest.loss, law.objective)
    starts = law.draw(generator, num_starts, problem.inputs, np.log(rest.loss))
    theta_PK, value_P = polish(problem, np.concatenate([theta_K[None], starts]))
    coefficients = named(law, law.public(theta_PK[np.argmin(value_P)]))
    smaller = rest.take(budget_N[~largest] == budget_N[~largest].max())
    distance = np.abs(np.log(held.active_parameters[:, None] / smaller.active_parameters))
    return HeldOut(
        run=held.run,
        flops=held.flops,
        measured=held.loss,
        predicted=predict(law, coefficients, held),
        repeated=smaller.loss[np.argmin(distance, 1)],
        coefficients=coefficients,
    )
