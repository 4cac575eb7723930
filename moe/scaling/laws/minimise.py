"""Minimises the sum of Huber's function over runs, for many sets of coefficients at once.

`lbfgs` finds an optimum from any start. `gauss_newton` converges in fewer steps where it converges,
and serves the thousands of bootstraps, which begin near an optimum. Both treat each of the P
problems alone: a problem is a start and a weight for each run.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moe.scaling.laws.formulas import Inputs, Law, Objective

# Called with the number of parts that are done, the number of all parts, and what they are.
Progress = Callable[[int, int, str], None]
# Maps starts, [P, K], and weights, [P, N], to coefficients, [P, K], and values, [P].
Minimiser = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_LBFGS_STEPS = 2000
_GAUSS_NEWTON_STEPS = 500
_HISTORY = 12  # the pairs of steps and gradients that L-BFGS keeps
_NUMBERS_AT_ONCE = 300_000  # of a Jacobian: 2.4 MB, which a core's cache holds


@dataclasses.dataclass(frozen=True)
class Problem:
    """Holds what a law is fitted to. Values are in units of delta², so that they are near 1.

    (The unit has no effect on the minimum. For least squares it is the variance of the residuals'
    space, taken as 1.)
    """

    law: Law
    inputs: Inputs
    loss_N: np.ndarray
    objective: Objective

    def residuals(self, theta_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns predictions minus measurements, [P, N], and their derivatives, [P, N, K]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            log_loss_PN, gradient_PNK = self.law.log_loss(theta_PK, self.inputs)
            if self.objective.space == "log":
                return log_loss_PN - np.log(self.loss_N), gradient_PNK
            prediction_PN = np.exp(log_loss_PN)
            return prediction_PN - self.loss_N, gradient_PNK * prediction_PN[..., None]

    def values(self, residual_PN: np.ndarray, weight_PN: np.ndarray) -> np.ndarray:
        """Returns the summed objective of each problem, [P], infinite where it is no number."""
        delta = self.objective.delta
        size_PN = np.abs(residual_PN)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isinf(delta):
                huber_PN = size_PN**2 / 2
            else:
                inner_PN = np.minimum(size_PN, delta)
                huber_PN = (inner_PN**2 / 2 + delta * (size_PN - inner_PN)) / delta**2
            value_P = np.sum(weight_PN * huber_PN, -1)
        return np.where(np.isfinite(value_P), value_P, np.inf)

    def slopes(self, residual_PN: np.ndarray) -> np.ndarray:
        """Returns the derivative of Huber's function at each residual, [P, N]."""
        delta = self.objective.delta
        if np.isinf(delta):
            return residual_PN
        return np.clip(residual_PN, -delta, delta) / delta**2

    def curvatures(self, residual_PN: np.ndarray) -> np.ndarray:
        """Returns slope / residual, the curvature of a parabola above Huber's function there."""
        delta = self.objective.delta
        if np.isinf(delta):
            return np.ones_like(residual_PN)
        return 1 / (delta * np.maximum(np.abs(residual_PN), delta))

    def evaluate(
        self, theta_PK: np.ndarray, weight_PN: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns each problem's value, [P], and gradient, [P, K]."""
        residual_PN, jacobian_PNK = self.residuals(theta_PK)
        slope_PN = weight_PN * self.slopes(residual_PN)
        with np.errstate(over="ignore", invalid="ignore"):
            gradient_PK = np.matmul(slope_PN[:, None], jacobian_PNK)[:, 0]
        return self.values(residual_PN, weight_PN), np.nan_to_num(gradient_PK)


def whitening(problem: Problem, theta_PK: np.ndarray) -> np.ndarray:
    """Returns a matrix [K, K] whose columns are directions of like effect on the predictions.

    log A and alpha of A/N^alpha are nearly collinear, because log N is far from 0. In these
    directions they are not, so L-BFGS needs a tenth of the steps.
    """
    jacobian_PNK = problem.residuals(theta_PK)[1]
    flat = np.nan_to_num(jacobian_PNK).reshape(-1, theta_PK.shape[-1])
    moments_KK = flat.T @ flat / len(flat)
    floor = 1e-10 * np.trace(moments_KK) / len(moments_KK)
    return np.linalg.inv(np.linalg.cholesky(moments_KK + floor * np.eye(len(moments_KK)))).T


def in_parts(
    minimise: Minimiser,
    problem: Problem,
    start_PK: np.ndarray,
    weight_PN: np.ndarray,
    progress: Progress | None,
    what: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises the problems in parts that a core's cache holds, on up to 8 cores.

    `weight_PN` may have one row for all problems. The parts do not depend on the number of threads,
    so neither does the result.
    """
    num_runs, width = len(problem.loss_N), start_PK.shape[-1]
    weight_PN = np.broadcast_to(weight_PN, (len(start_PK), num_runs))
    chunk = max(1, _NUMBERS_AT_ONCE // (num_runs * width))
    firsts, parts = range(0, len(start_PK), chunk), []

    def minimise_part(first: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(first, first + chunk)
        return minimise(start_PK[part], weight_PN[part])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first, part in zip(firsts, pool.map(minimise_part, firsts), strict=True):
            parts.append(part)
            if progress is not None:
                progress(min(first + chunk, len(start_PK)), len(start_PK), what)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def lbfgs(
    problem: Problem,
    start_PK: np.ndarray,
    weight_PN: np.ndarray,
    *,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coefficients that L-BFGS reaches from each start, [P, K], and their values.

    All problems of a part step together. One whose step does not lower its value enough (Armijo's
    rule) tries half of the step in the next round; the others go on. A problem ends when its value
    falls by less than 1e-12 of itself over several steps, or no step lowers it.
    """
    transform = whitening(problem, start_PK)
    minimise = functools.partial(_lbfgs, problem, transform)
    return in_parts(minimise, problem, start_PK, weight_PN, progress, "starts")


@np.errstate(over="ignore", invalid="ignore")
def _lbfgs(
    problem: Problem, transform: np.ndarray, start_PK: np.ndarray, weight_PN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `lbfgs` returns, for one part."""
    evaluate = lambda phi, weight: _through(transform, problem, phi, weight)
    phi = np.linalg.solve(transform, start_PK.T).T
    value, gradient = evaluate(phi, weight_PN)
    done_phi, done_value = phi.copy(), value.copy()
    memory = _Memory(phi)
    length, stalled = np.minimum(1, 1 / _norm(gradient)), np.zeros(len(phi), int)
    direction, live = -gradient, np.arange(len(phi))
    for _ in range(_LBFGS_STEPS):
        slope = np.sum(direction * gradient, -1)
        new_phi = phi + length[:, None] * direction
        new_value, new_gradient = evaluate(new_phi, weight_PN[live])
        accepted = new_value <= value + 1e-4 * length * slope
        fell = accepted & (value - new_value > 1e-12 * np.abs(value))
        memory.add(accepted, new_phi - phi, new_gradient - gradient)
        phi = np.where(accepted[:, None], new_phi, phi)
        gradient = np.where(accepted[:, None], new_gradient, gradient)
        value = np.where(accepted, new_value, value)
        direction = np.where(accepted[:, None], memory.direction(gradient), direction)
        length = np.where(accepted, 1.0, length / 2)
        stalled = np.where(fell, 0, stalled + (accepted | (length < 1e-12)))
        ended = (stalled >= 3) | (_norm(gradient) < 1e-9) | (length < 1e-12)
        done_phi[live], done_value[live] = phi, value
        if ended.all():
            break
        if ended.any():
            keep = ~ended
            live, phi, value, gradient = live[keep], phi[keep], value[keep], gradient[keep]
            direction, length, stalled = direction[keep], length[keep], stalled[keep]
            memory.select(keep)
    return done_phi @ transform.T, done_value


def _through(
    transform: np.ndarray, problem: Problem, phi: np.ndarray, weight_PN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and gradients by phi, where theta = transform · phi."""
    value, gradient = problem.evaluate(phi @ transform.T, weight_PN)
    return value, gradient @ transform


def _norm(x_PK: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.norm(x_PK, axis=-1), 1e-300)


class _Memory:
    """Holds the last steps and differences of gradients of each problem, [P, history, K]."""

    def __init__(self, phi: np.ndarray):
        self._steps = np.zeros((len(phi), _HISTORY, phi.shape[-1]))
        self._changes = np.zeros_like(self._steps)

    def select(self, live: np.ndarray) -> None:
        self._steps, self._changes = self._steps[live], self._changes[live]

    def add(self, accepted: np.ndarray, step: np.ndarray, change: np.ndarray) -> None:
        """Adds the pairs of accepted steps, unless the objective is not convex along a step."""
        curvature = np.sum(step * change, -1)
        convex = accepted & (curvature > 1e-10 * _norm(step) * _norm(change))
        for array, new in ((self._steps, step), (self._changes, change)):
            array[convex] = np.concatenate([array[convex][:, 1:], new[convex][:, None]], 1)

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        """Returns minus the approximate inverse Hessian times the gradient (two loops)."""
        products = np.sum(self._steps * self._changes, -1)
        inverse = np.where(products > 0, 1 / np.where(products > 0, products, 1), 0)
        q, factors = gradient, {}
        for i in reversed(range(_HISTORY)):
            factors[i] = inverse[:, i] * np.sum(self._steps[:, i] * q, -1)
            q = q - factors[i][:, None] * self._changes[:, i]
        squares = np.sum(self._changes[:, -1] ** 2, -1)
        scale = np.where(squares > 0, products[:, -1] / np.where(squares > 0, squares, 1), 1)
        scale = np.where(products[:, -1] > 0, scale, np.minimum(1, 1 / _norm(gradient)))
        q = scale[:, None] * q
        for i in range(_HISTORY):
            change = inverse[:, i] * np.sum(self._changes[:, i] * q, -1)
            q = q + (factors[i] - change)[:, None] * self._steps[:, i]
        return -q


def gauss_newton(
    problem: Problem,
    start_PK: np.ndarray,
    weight_PN: np.ndarray,
    *,
    tolerance: float = 1e-11,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coefficients that damped Gauss-Newton reaches, [P, K], and their values.

    Huber's function is replaced by the parabola above it that touches it at the present residual
    (iteratively reweighted least squares), so every accepted step lowers the objective. The damping
    is Levenberg and Marquardt's. A problem ends when a step lowers its value by less than
    `tolerance` times itself.
    """
    minimise = functools.partial(_gauss_newton, problem, tolerance)
    return in_parts(minimise, problem, start_PK, weight_PN, progress, "fits of resampled runs")


@np.errstate(over="ignore", invalid="ignore")
def _gauss_newton(
    problem: Problem, tolerance: float, theta: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `gauss_newton` returns, for one part."""
    done_theta = theta.copy()
    residual, jacobian = problem.residuals(theta)
    value = problem.values(residual, weight)
    done_value, live = value.copy(), np.arange(len(theta))
    damping = np.full(len(theta), 1e-3)
    for _ in range(_GAUSS_NEWTON_STEPS):
        new_theta = theta - _step(problem, residual, jacobian, weight, damping)
        new_residual, new_jacobian = problem.residuals(new_theta)
        new_value = problem.values(new_residual, weight)
        better = new_value < value
        ended = (better & (value - new_value <= tolerance * value)) | (damping > 1e12)
        damping = np.where(better, np.maximum(damping / 10, 1e-12), damping * 5)
        theta = np.where(better[:, None], new_theta, theta)
        value = np.where(better, new_value, value)
        residual = np.where(better[:, None], new_residual, residual)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        done_theta[live], done_value[live] = theta, value
        if ended.all():
            break
        if ended.any():
            keep = ~ended
            live, theta, value, damping = live[keep], theta[keep], value[keep], damping[keep]
            residual, jacobian, weight = residual[keep], jacobian[keep], weight[keep]
    return done_theta, done_value


def _step(
    problem: Problem,
    residual: np.ndarray,
    jacobian: np.ndarray,
    weight: np.ndarray,
    damping: np.ndarray,
) -> np.ndarray:
    """Returns the damped Gauss-Newton step of each problem, [P, K]."""
    slope = weight * problem.slopes(residual)
    curvature = weight * problem.curvatures(residual)
    gradient = np.matmul(slope[:, None], jacobian)[:, 0]
    hessian = np.matmul((curvature[..., None] * jacobian).swapaxes(1, 2), jacobian)
    diagonal = np.maximum(np.einsum("pkk->pk", hessian), 1e-300)
    # In units of the diagonal the matrix is well scaled, whatever the coefficients' units are.
    unit = 1 / np.sqrt(diagonal)
    scaled = hessian * unit[:, :, None] * unit[:, None]
    scaled = scaled + (damping + 1e-12)[:, None, None] * np.eye(scaled.shape[-1])
    # Coefficients beyond float64 take no step, so that their problem ends.
    lost = ~(np.isfinite(scaled).all((1, 2)) & np.isfinite(gradient).all(1))
    scaled[lost], gradient[lost] = np.eye(scaled.shape[-1]), 0
    return unit * np.linalg.solve(scaled, (unit * gradient)[..., None])[..., 0]
