"""Tests fits on tables whose coefficients are known."""

import numpy as np

from moe.scaling.laws import LAWS, fit
from moe.scaling.runs import make_runs

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def isoflop_runs(noise: float, seed: int = 0, budgets: int = 5, sizes: int = 7):
    """Returns runs of an iso-FLOP sweep whose losses follow TRUTH, with relative noise."""
    flops = np.repeat(np.geomspace(1e18, 1e20, budgets), sizes)
    parameters = np.tile(np.geomspace(0.2, 5, sizes), budgets) * np.sqrt(flops / 120)
    tokens = flops / (6 * parameters)
    loss = TRUTH["E"] + TRUTH["A"] / parameters ** TRUTH["alpha"]
    loss = loss + TRUTH["B"] / tokens ** TRUTH["beta"]
    error = noise * np.random.default_rng(seed).standard_normal(len(flops))
    return make_runs(parameters=parameters, tokens=tokens, loss=loss * np.exp(error))


def test_a_fit_without_noise_finds_the_coefficients():
    result = fit(LAWS["chinchilla"], isoflop_runs(0), num_starts=50, num_bootstraps=10)
    for name, value in TRUTH.items():
        np.testing.assert_allclose(result.coefficients[name], value, rtol=1e-4)
    assert result.held_out is not None
    assert result.held_out.mean_error < 1e-4 < 0.02 < result.held_out.mean_repeated_error
    assert len(result.held_out.run) == 7


def test_a_fit_follows_from_its_seed():
    runs = isoflop_runs(0.01)
    first, again, other = (
        fit(LAWS["chinchilla"], runs, seed=seed, num_starts=10, num_bootstraps=20)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.samples, again.samples)
    assert np.any(first.samples != other.samples)
