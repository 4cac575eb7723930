"""Tests the objective, its gradient and both minimisers."""

import numpy as np
import pytest
from scipy.optimize import minimize

from moe.scaling.laws import LAWS
from moe.scaling.laws.formulas import Objective, read_inputs
from moe.scaling.laws.minimise import Problem, gauss_newton, lbfgs
from moe.scaling.laws.optimum import condition_number, variable_projection
from tests.scaling.tables import TRUTH, isoflop_runs

OBJECTIVES = [
    Objective(),
    Objective("log", 0.1),
    Objective("log", np.inf),
    Objective("loss", np.inf),
]


def problem(objective: Objective, noise: float = 0.01) -> Problem:
    runs = isoflop_runs(noise)
    law = LAWS["chinchilla"]
    return Problem(law, read_inputs(law, runs), runs.loss, objective)


def test_the_objective_is_a_sum_of_hubers_function():
    """Worked by hand: delta is 1, and values are in units of delta squared."""
    fitted = problem(Objective("log", 1.0))
    residual_PN = np.array([[0.5, -3.0]])
    weight_PN = np.array([[2.0, 1.0]])
    assert fitted.values(residual_PN, weight_PN) == 2 * 0.125 + (3 - 0.5)
    np.testing.assert_array_equal(fitted.slopes(residual_PN), [[0.5, -1]])
    np.testing.assert_array_equal(fitted.curvatures(residual_PN), [[1, 1 / 3]])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_of_the_objective_equal_finite_differences(objective):
    fitted = problem(objective)
    starts = fitted.law.draw(np.random.default_rng(1), 4, fitted.inputs, np.log(fitted.loss_N))
    weight_PN = np.random.default_rng(2).uniform(0, 2, (4, len(fitted.loss_N)))
    gradient_PK = fitted.evaluate(starts, weight_PN)[1]
    for k in range(starts.shape[1]):
        step = 1e-6 * np.eye(starts.shape[1])[k]
        above, below = (fitted.evaluate(starts + s * step, weight_PN)[0] for s in (1, -1))
        np.testing.assert_allclose(gradient_PK[:, k], (above - below) / 2e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_both_minimisers_find_the_optimum_that_scipy_finds(objective):
    fitted = problem(objective)
    weight = np.ones((1, len(fitted.loss_N)))
    starts = fitted.law.draw(np.random.default_rng(1), 6, fitted.inputs, np.log(fitted.loss_N))
    near = fitted.law.fitted(TRUTH)
    found = minimize(
        lambda theta: [x[0] for x in fitted.evaluate(theta[None], weight)],
        near,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-7, "maxiter": 5000},
    )
    for minimiser in (lbfgs, gauss_newton):
        theta_PK, value_P = minimiser(fitted, starts, weight)
        # A start may end where a term has vanished, so fits use many: here four of six are enough.
        np.testing.assert_allclose(np.sort(value_P)[:4], found.fun, rtol=1e-5)
        np.testing.assert_allclose(theta_PK[np.argmin(value_P)], found.x, rtol=2e-3)


def test_problems_do_not_depend_on_those_beside_them():
    fitted = problem(Objective())
    generator = np.random.default_rng(3)
    starts = fitted.law.draw(generator, 5, fitted.inputs, np.log(fitted.loss_N))
    weight_PN = generator.multinomial(35, np.full(35, 1 / 35), 5).astype(float)
    together, _ = gauss_newton(fitted, starts, weight_PN)
    for i in range(5):
        alone, _ = gauss_newton(fitted, starts[i : i + 1], weight_PN[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["chinchilla", "overtraining"])
def test_variable_projection_finds_the_optimum(name):
    runs = isoflop_runs(0.01)
    law = LAWS[name]
    fitted = Problem(law, read_inputs(law, runs), runs.loss, law.objective)
    _, value = variable_projection(fitted, np.random.default_rng(0))
    starts = law.draw(np.random.default_rng(1), 20, fitted.inputs, np.log(runs.loss))
    _, value_P = lbfgs(fitted, starts, np.ones((1, len(runs))))
    assert value == pytest.approx(value_P.min(), rel=1e-6)


def test_the_condition_number_sees_what_the_data_cannot_tell_apart():
    fitted = problem(Objective())
    near = fitted.law.fitted(TRUTH)
    assert condition_number(fitted, near) < 1e3
    # If D is a multiple of N, the two terms of equal exponents are one.
    fitted.inputs["tokens"] = fitted.inputs["active"] + np.log(20)
    equal = fitted.law.fitted(TRUTH | {"beta": TRUTH["alpha"]})
    assert condition_number(fitted, equal) > 1e12
