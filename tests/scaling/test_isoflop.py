"""Tests the parabolas of iso-FLOP curves, and the power law of their minima."""

import dataclasses

import numpy as np
import pytest

from moe.config import ConfigError
from moe.scaling.experiments.runs import make_runs
from moe.scaling.laws import LAWS, fit, fit_isoflop, power_law, predict
from moe.scaling.laws.isoflop import NoMinima


def parabolic_runs(exponent: float = 0.5, curvature: float = 0.05, budgets: int = 4, noise=0.0):
    """Returns runs whose losses are parabolas in log size, with minima at 0.3 C^exponent."""
    flops = np.repeat(np.geomspace(1e15, 1e18, budgets), 5)
    best = 0.3 * flops**exponent
    parameters = np.tile([0.4, 0.7, 1.1, 1.8, 3], budgets) * best
    floor = 3 - 0.1 * np.log(flops / 1e15)
    loss = floor + curvature * np.log(parameters / best) ** 2
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(flops)))
    return make_runs(parameters=parameters, tokens=flops / 6 / parameters, loss=loss)


def test_minima_of_parabolas_are_exact():
    result = fit_isoflop(parabolic_runs(0.46))
    assert result.coefficients["N_factor"] == pytest.approx(0.3, rel=1e-6)
    assert result.coefficients["N_exponent"] == pytest.approx(0.46, rel=1e-6)
    assert result.coefficients["D_exponent"] == pytest.approx(0.54, rel=1e-6)
    curve = result.curves[0]
    assert curve.best_loss == pytest.approx(3, rel=1e-6)
    assert curve.parabola[2] == pytest.approx(0.05, rel=1e-6)
    assert 6 * curve.best_parameters * curve.best_tokens == pytest.approx(1e15, rel=1e-6)
    measured, predicted, repeated = result.held_out
    assert predicted == pytest.approx(measured, rel=1e-6)
    assert repeated == pytest.approx(measured / 10**0.46, rel=1e-6)
    assert result.is_identifiable
    assert result.warnings == []


def test_a_power_law_of_two_points_is_exact_and_leaves_out_nan():
    factor, exponent = power_law(np.array([1.0, 4, 9]), np.array([[3, np.nan, 81], [2, 4, 6]]))
    np.testing.assert_allclose(exponent, [1.5, 0.5])
    np.testing.assert_allclose(factor, [3, 2])


def test_intervals_hold_the_exponent_and_narrow_with_less_noise():
    wide, narrow = (fit_isoflop(parabolic_runs(noise=noise)).intervals for noise in (3e-3, 3e-4))
    for intervals in (wide, narrow):
        low, high = intervals["N_exponent"]
        assert low < 0.5 < high
    assert np.ptp(narrow["N_exponent"]) < np.ptp(wide["N_exponent"]) / 5


def test_the_known_bias_of_parabolas_is_not_in_a_parametric_fit():
    """If alpha and beta differ, curves are steeper on one side, which moves the minimum."""
    truth = {"E": 1.8, "A": 30_000.0, "alpha": 0.6, "B": 300.0, "beta": 0.28}
    flops = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    ratio = truth["alpha"] * truth["A"] / truth["beta"] / truth["B"]
    best = (ratio * (flops / 6) ** truth["beta"]) ** (1 / (truth["alpha"] + truth["beta"]))
    parameters = np.tile(np.geomspace(0.2, 5, 7), 5) * best
    runs = {"parameters": parameters, "tokens": flops / 6 / parameters}
    law = LAWS["chinchilla"]
    runs = make_runs(**runs, loss=predict(law, truth, make_runs(**runs)))
    curves = fit_isoflop(runs).curves
    errors = np.array([curve.best_parameters for curve in curves]) / best[::7] - 1
    assert np.all(np.abs(errors) > 0.01)
    c = fit(law, runs, num_starts=20, num_bootstraps=2).coefficients
    ratio = c["alpha"] * c["A"] / c["beta"] / c["B"]
    fitted = (ratio * (flops / 6) ** c["beta"]) ** (1 / (c["alpha"] + c["beta"]))
    np.testing.assert_allclose(fitted, best, rtol=1e-3)


def test_minima_at_the_edge_and_repeated_text_are_said():
    runs = parabolic_runs()
    assert fit_isoflop(dataclasses.replace(runs, repeats=np.full(20, 9.0))).warnings == [
        "20 of 20 runs saw their text more than 4 times, up to 9.0 times: the law counts repeated "
        "tokens as new ones."
    ]
    few = runs.take((runs.flops > 2e15) | (runs.parameters > 1.5 * 0.3 * np.sqrt(1e15)))
    warnings = fit_isoflop(few).warnings
    assert any(w.startswith("1 budget has fewer than 3 sizes") for w in warnings)
    edge = runs.take((runs.flops > 2e15) | (runs.parameters > 1.0 * 0.3 * np.sqrt(1e15)))
    result = fit_isoflop(edge)
    smallest = f"{runs.parameters[2]:,.0f} parameters"
    assert result.warnings == [
        "The budget 1e+15 FLOP is left out: the lowest loss is that of the smallest model, of "
        f"{smallest}: add smaller ones."
    ]
    assert result.coefficients["N_exponent"] == pytest.approx(0.5, rel=1e-6)


def runs_of_two_budgets(losses):
    """Returns a curve of the given losses over five sizes, and one with a minimum."""
    sizes = np.array([14_928, 26_232, 41_632, 107_856, 234_048])
    good = 1.5 + 0.1 * np.log(sizes / sizes[2]) ** 2
    flops = np.repeat([4e10, 8e10], 5)
    return make_runs(
        parameters=np.tile(sizes, 2),
        tokens=flops / 6 / np.tile(sizes, 2),
        loss=np.concatenate([losses, good]),
    )


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        # The losses far above the lowest one pull the parabola's minimum beyond the smallest size.
        (
            [2.276, 2.210, 2.305, 2.591, 2.699],
            "the lowest loss is within the sizes, at 26,232 parameters, but the parabola has no "
            "minimum there, since the losses that shape it reach 22.1% above the lowest: add "
            "sizes nearer to that one",
        ),
        # It has no minimum at all.
        ([2.5, 2.9, 2.4, 2.9, 2.45], "the lowest loss is within the sizes, at 41,632 parameters"),
        (
            [2.4, 2.1, 2.0, 1.95, 1.94],
            "the lowest loss is that of the largest model, of 234,048 parameters: add larger ones",
        ),
        ([2.2, 2.1, 2.0, 2.1, 2.2], ""),
    ],
)
def test_a_curve_without_a_minimum_says_where_its_lowest_loss_is(losses, problem):
    runs = runs_of_two_budgets(losses)
    if not problem:
        assert [curve.problem for curve in fit_isoflop(runs).curves] == ["", ""]
        return
    with pytest.raises(NoMinima, match=r"^flops: 1 of 2 budgets have a minimum") as error:
        fit_isoflop(runs)
    assert f" At 4e+10 FLOP {problem}" in str(error.value)
    assert [bool(curve.problem) for curve in error.value.curves] == [True, False]


def test_two_budgets_are_not_identifiable_and_one_is_refused():
    runs = parabolic_runs()
    result = fit_isoflop(runs.take(runs.flops < 2e16))
    assert result.not_identifiable[0].startswith("only 2 budgets have a minimum")
    assert result.held_out is None
    with pytest.raises(ConfigError, match=r"^flops: all 5 runs have one value"):
        fit_isoflop(runs.take(runs.flops < 2e15))


def test_noise_beyond_the_curvature_is_not_identifiable():
    result = fit_isoflop(parabolic_runs(curvature=0.02, noise=0.02, budgets=5))
    assert not result.is_identifiable


def test_three_sizes_in_each_budget_show_no_noise():
    runs = parabolic_runs(noise=0.001)
    three = runs.take(np.tile([False, True, True, True, False], 4))
    assert "leave no residual" in fit_isoflop(three).not_identifiable[0]


def test_seeds_of_one_size_are_used_together():
    """The lowest five losses are those of one size, whose curve still needs its neighbours."""
    flops = np.repeat(np.geomspace(1e15, 1e18, 4), 15)
    best = 0.3 * np.sqrt(flops)
    parameters = np.tile(np.repeat([0.4, 0.7, 1.0, 1.8, 3], 3), 4) * best
    loss = 3 + 0.3 * np.log(parameters / best) ** 2
    loss = loss * (1 + 0.001 * np.random.default_rng(0).standard_normal(60))
    runs = make_runs(parameters=parameters, tokens=flops / 6 / parameters, loss=loss)
    result = fit_isoflop(runs)
    assert np.all(result.curves[0].used)
    assert result.coefficients["N_exponent"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_intervals_cover_the_exponent_at_the_stated_rate():
    """With a true rate of 95 %, fewer than 183 of 200 have a probability of 1.5 %."""
    exact = parabolic_runs(budgets=5)
    covered = 0
    for seed in range(200):
        error = 0.003 * np.random.default_rng(seed).standard_normal(len(exact))
        runs = dataclasses.replace(exact, loss=exact.loss * np.exp(error))
        low, high = fit_isoflop(runs, seed=seed, num_bootstraps=300).intervals["N_exponent"]
        covered += low <= 0.5 <= high
    assert covered >= 183
