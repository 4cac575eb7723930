"""Tests the law of the best learning rate and batch."""

import dataclasses

import numpy as np
import pytest

from moe.config import ConfigError
from moe.scaling.laws import fit_step_law
from tests.scaling.tables import learning_rate_runs

SIZES = np.geomspace(2e7, 6e8, 5)
GRID_SIZES, GRID_TOKENS = (x.ravel() for x in np.meshgrid(SIZES, np.geomspace(1e9, 3e10, 4)))


def test_grids_of_sizes_and_tokens_give_the_law():
    runs = learning_rate_runs(GRID_SIZES, GRID_TOKENS, batches=2.0 ** np.arange(14, 23))
    result = fit_step_law(runs)
    assert len(result.grids) == 20
    assert result.is_identifiable, result.not_identifiable
    assert result.coefficients["learning_rate_N_exponent"] == pytest.approx(-0.713, abs=0.08)
    assert result.coefficients["learning_rate_D_exponent"] == pytest.approx(0.307, abs=0.08)
    assert result.coefficients["batch_D_exponent"] == pytest.approx(0.571, abs=0.08)
    for name, truth in (
        ("learning_rate_N_exponent", -0.713),
        ("learning_rate_D_exponent", 0.307),
        ("batch_D_exponent", 0.571),
    ):
        low, high = result.intervals[name]
        assert low < truth < high


@pytest.mark.parametrize(
    "tokens",
    [20 * SIZES, np.full(5, 1e10), 1e18 / SIZES, np.array([2e9, 1e10, 4e9, 3e10, 8e9])],
    ids=["a multiple of size", "one token count", "one budget", "free"],
)
def test_a_learning_rate_grid_of_five_sizes_is_not_identifiable(tokens):
    result = fit_step_law(learning_rate_runs(SIZES, tokens))
    assert not result.is_identifiable
    assert result.not_identifiable[0].startswith("5 grids are too few to show")
    assert set(result.coefficients) == set(result.intervals)
    assert any("law of the batch is not fitted" in warning for warning in result.warnings)


def test_tokens_that_follow_from_size_are_said():
    sizes = np.geomspace(2e7, 6e8, 12)
    result = fit_step_law(learning_rate_runs(sizes, 20 * sizes))
    assert result.condition_number > 1e8
    assert any("tokens are the same function of size" in x for x in result.not_identifiable)


def test_optima_at_the_edge_of_a_grid_are_said():
    runs = learning_rate_runs(GRID_SIZES, GRID_TOKENS)
    runs = runs.take(runs.learning_rate < 2.0**-10)
    warnings = fit_step_law(runs).warnings
    assert any("The best learning_rate is the smallest or largest one tried" in w for w in warnings)


def test_a_batch_that_follows_from_the_tokens_has_no_law():
    runs = learning_rate_runs(GRID_SIZES, GRID_TOKENS)
    result = fit_step_law(dataclasses.replace(runs, batch_tokens=0.58 * runs.tokens**0.571))
    assert "batch_D_exponent" not in result.coefficients
    assert any("law of the batch is not fitted" in warning for warning in result.warnings)


def test_runs_of_too_few_learning_rates_are_left_out():
    runs = learning_rate_runs(GRID_SIZES, GRID_TOKENS)
    first = (runs.parameters == runs.parameters[0]) & (runs.tokens == runs.tokens[0])
    result = fit_step_law(runs.take(~first | (np.cumsum(first) <= 2)))
    assert len(result.grids) == 19
    assert [run for run, _ in result.left_out] == ["row 1", "row 2"]
    assert "fewer than 3 learning rates" in result.left_out[0][1]


def test_too_few_grids_are_refused():
    with pytest.raises(ConfigError, match=r"^learning_rate: 3 sizes and token counts have runs"):
        fit_step_law(learning_rate_runs(SIZES[:3], 20 * SIZES[:3]))
