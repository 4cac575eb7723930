"""Fits a law again: to resampled runs, without the largest budget, and under another delta."""

import dataclasses

import numpy as np

from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.formulas import Law, read_inputs
from moe.scaling.laws.minimise import Problem, Progress, gauss_newton
from moe.scaling.laws.optimum import polish
from moe.scaling.laws.result import HeldOut, named, predict

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


def exactly_determined_share(num_drawn: int, num_coefficients: int) -> float:
    """Returns the share of resamples with no more distinct runs than coefficients.

    Such a resample is fitted without a residual, so its coefficients show nothing of the noise.
    """
    share = np.zeros(num_drawn + 1)  # of resamples with so many distinct runs
    share[0] = 1
    counts = np.arange(num_drawn + 1)
    for _ in range(num_drawn):
        again = share * counts / num_drawn
        share = again + np.concatenate([[0], (share * (1 - counts / num_drawn))[:-1]])
    return float(share[: num_coefficients + 1].sum())


def drift(problem: Problem, theta_K: np.ndarray) -> dict[float, dict[str, float]]:
    """Returns the coefficients under several deltas of Huber's function, by delta."""
    result = {}
    for delta in DELTAS:
        objective = dataclasses.replace(problem.objective, delta=delta)
        theta_PK, _ = polish(dataclasses.replace(problem, objective=objective), theta_K[None])
        result[delta] = named(problem.law, problem.law.public(theta_PK[0]))
    return result


def group_values(values: np.ndarray) -> np.ndarray:
    """Returns the number of each value's group, such as each run's budget, from 0, the smallest.

    Values belong to one group if no gap of more than 10 % lies between them.
    """
    order = np.argsort(values, kind="stable")
    result = np.empty(len(values), int)
    result[order] = np.cumsum(np.diff(np.log(values[order]), prepend=-np.inf) > np.log(1.1)) - 1
    return result


def _budgets_to_hold_out(flops: np.ndarray) -> np.ndarray:
    """Returns the number of each run's budget, from 0, the smallest.

    If there are fewer than 3 budgets, or fewer than 3 runs in the largest one, tenths of the runs
    stand for budgets; with fewer than 30 runs they are larger parts, of 3 runs or more.
    """
    budget_N = group_values(flops)
    if budget_N.max() >= 2 and np.sum(budget_N == budget_N.max()) >= 3:
        return budget_N
    order = np.argsort(flops, kind="stable")
    budget_N[order] = np.arange(len(flops)) * min(10, len(flops) // 3) // len(flops)
    return budget_N


def predict_largest_budget(
    law: Law, runs: Runs, theta_K: np.ndarray, generator: np.random.Generator, num_starts: int
) -> HeldOut | None:
    """Returns the largest budget's losses as predicted by a fit to the others.

    Returns None if the others are too few for a fit.
    """
    budget_N = _budgets_to_hold_out(runs.flops)
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
    distance = distance + np.abs(np.log(held.experts[:, None] / smaller.experts))
    return HeldOut(
        run=held.run,
        flops=held.flops,
        measured=held.loss,
        predicted=predict(law, coefficients, held),
        repeated=smaller.loss[np.argmin(distance, 1)],
        coefficients=coefficients,
    )
