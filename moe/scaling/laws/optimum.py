"""Finds a law's optimum from many starts, and again by variable projection as a cross-check."""

import dataclasses
import itertools

import numpy as np

from moe.scaling.laws.minimise import Problem, Progress, gauss_newton, lbfgs

# Starts whose objectives differ by less than this share have found the same optimum.
_SAME = 1e-4
_GRID_POINTS = 2000
_REWEIGHTINGS = 20


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Holds the best coefficients as they are fitted, [K], and how surely they are the best."""

    theta: np.ndarray
    value: float
    starts_at_optimum: float
    projection_gap: float | None


def find_optimum(
    problem: Problem,
    generator: np.random.Generator,
    num_starts: int,
    progress: Progress | None = None,
) -> Optimum:
    """Returns the best of `num_starts` L-BFGS runs, and what variable projection says of it."""
    log_losses = np.log(problem.loss_N)
    starts = problem.law.draw(generator, num_starts, problem.inputs, log_losses)
    theta_PK, value_P = lbfgs(problem, starts, np.ones((1, len(log_losses))), progress=progress)
    # A few steps of the other minimiser remove what L-BFGS's tolerance has left.
    best = np.argmin(value_P)
    theta_PK[best], value_P[best] = (x[0] for x in polish(problem, theta_PK[best : best + 1]))
    share = float(np.mean(value_P <= value_P[best] * (1 + _SAME)))
    theta, value = theta_PK[best], float(value_P[best])
    if not problem.law.ranges:
        return Optimum(theta, value, share, None)
    projected, projected_value = variable_projection(problem, generator)
    gap = (projected_value - value) / max(value, 1e-300)
    if projected_value < value:
        theta, value = projected, projected_value
        share = float(np.mean(value_P <= value * (1 + _SAME)))
    return Optimum(theta, value, share, gap)


def polish(problem: Problem, theta_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where Gauss-Newton ends from coefficients near an optimum, and the values there."""
    return gauss_newton(problem, theta_PK, np.ones((1, len(problem.loss_N))))


def variable_projection(
    problem: Problem, generator: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Returns the optimum and its value, found by a grid over the exponents alone.

    For given exponents a sum of powers is linear in its factors, and these are the solution of a
    weighted least-squares problem (Czech et al. 2026, arXiv 2603.22339). So the search has as few
    dimensions as there are exponents. The 20 best grid points are then minimised over everything.
    """
    law = problem.law
    exponents_PJ = _grid(list(law.ranges.values()), generator)
    theta_PK = np.zeros((len(exponents_PJ), len(law.coefficients)))
    for j, name in enumerate(law.ranges):
        theta_PK[:, law.coefficients.index(name)] = exponents_PJ[:, j]
    factors = [next(iter(term)) for term in law.terms(problem.inputs)]
    columns = [law.coefficients.index(name) for name in factors]
    theta_PK[:, columns] = _log_factors(problem, theta_PK)
    value_P = problem.values(problem.residuals(theta_PK)[0], np.ones((1, len(problem.loss_N))))
    best = np.argsort(value_P, kind="stable")[:20]
    theta_PK, value_P = polish(problem, theta_PK[best])
    return theta_PK[np.argmin(value_P)], float(np.min(value_P))


def _grid(ranges: list[tuple[float, float]], generator: np.random.Generator) -> np.ndarray:
    """Returns about 2,000 points in a box, a full grid in up to 3 dimensions, else random ones."""
    if len(ranges) > 3:
        low, high = np.array(ranges).T
        return generator.uniform(low, high, (_GRID_POINTS, len(ranges)))
    count = round(_GRID_POINTS ** (1 / len(ranges)))
    return np.array(list(itertools.product(*(np.linspace(*range_, count) for range_ in ranges))))


def _log_factors(problem: Problem, theta_PK: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the best factors for given exponents, [P, terms].

    The relative error of the loss stands for the difference of logarithms, and Huber's function
    is minimised by reweighting.
    """
    law, loss_N = problem.law, problem.loss_N
    power_PNT = np.stack(
        [
            np.exp(
                sum(
                    theta_PK[:, law.coefficients.index(name), None] * np.asarray(x)
                    for name, x in list(term.items())[1:]
                )
                + np.zeros((len(theta_PK), len(loss_N)))
            )
            for term in law.terms(problem.inputs)
        ],
        -1,
    )
    scale_PT = np.mean(power_PNT, 1)
    x_PNT = power_PNT / scale_PT[:, None]
    if problem.objective.space == "log":
        x_PNT, y_N = x_PNT / loss_N[:, None], np.ones_like(loss_N)
    else:
        y_N = loss_N
    weight_PN = np.ones(x_PNT.shape[:2])
    for _ in range(_REWEIGHTINGS):
        weighted = x_PNT * weight_PN[..., None]
        moments = np.matmul(weighted.swapaxes(1, 2), x_PNT)
        ridge = 1e-10 * np.einsum("ptt->p", moments)[:, None, None] * np.eye(moments.shape[-1])
        factor_PT = np.linalg.solve(moments + ridge, np.sum(weighted * y_N[:, None], 1)[..., None])
        # A factor below 0 has no logarithm. A small one lets the last minimisation go on.
        factor_PT = np.maximum(factor_PT[..., 0], 1e-4)
        residual_PN = np.matmul(x_PNT, factor_PT[..., None])[..., 0] - y_N
        weight_PN = problem.curvatures(residual_PN)
    return np.log(factor_PT / scale_PT)


def condition_number(problem: Problem, theta_K: np.ndarray) -> float:
    """Returns the condition number of the derivatives by the coefficients, at an optimum.

    Each column has length 1, so units play no part (Belsley, Kuh and Welsch 1980). It is infinite
    if the data cannot tell two directions apart at all. A term that is 0 at the optimum has no
    effect nearby. It is not counted: another test reports a coefficient at its bound.
    """
    jacobian_NK = problem.residuals(theta_K[None])[1][0]
    length_K = np.linalg.norm(jacobian_NK, axis=0)
    has_effect_K = length_K > 1e-9 * length_K.max()
    jacobian_NK, length_K = jacobian_NK[:, has_effect_K], length_K[has_effect_K]
    singular_K = np.linalg.svd(jacobian_NK / length_K, compute_uv=False)
    if len(singular_K) < len(length_K) or singular_K[-1] <= 1e-13 * singular_K[0]:
        return float("inf")
    return float(singular_K[0] / singular_K[-1])
