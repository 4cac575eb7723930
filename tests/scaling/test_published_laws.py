"""Tests fits on published data: they have to give the values that were published."""

from pathlib import Path

import numpy as np
import pytest

from moe.config import ConfigError
from moe.scaling.experiments.runs import Runs, read_runs
from moe.scaling.laws import LAWS, fit, fit_isoflop, power_law, predict

DATA = Path(__file__).parents[1] / "data" / "laws"
FEW = {"num_starts": 30, "num_bootstraps": 40}


def clark_runs(router: str) -> Runs:
    """Returns the runs of a router, and the dense ones."""
    columns = {
        "parameters": "total_parameter_count",
        "active_parameters": "dense_parameter_count",
        "experts": "num_experts",
        "experts_per_token": "k",
        "loss": "loss_validation",
    }
    return read_runs(DATA / "clark.csv", columns, where={"router_type": f"Dense,{router}"})


def gadre_runs(dataset: str) -> Runs:
    columns = {"parameters": "N", "tokens": "D", "loss": "loss_c4", "run": "name"}
    return read_runs(DATA / "gadre.csv", columns, where={"dataset": dataset})


def porian_runs(corrections: int) -> Runs:
    where = {"corrections": str(corrections)}
    return read_runs(DATA / "porian_points.csv", {"parameters": "params"}, where=where)


@pytest.mark.parametrize(
    ("router", "a", "b", "c"),
    [
        ("S-Base", -0.083, -0.118, 0.0099),
        ("RL-R", -0.083, -0.123, 0.0112),
        ("Hash", -0.087, -0.138, 0.0126),
    ],
)
def test_clarks_law_has_the_published_coefficients(router, a, b, c):
    result = fit(LAWS["clark"], clark_runs(router), num_starts=100)
    np.testing.assert_allclose(
        [result.coefficients[name] for name in "abc"], [a, b, c], rtol=0.01, atol=5e-5
    )
    assert result.is_identifiable
    assert result.starts_at_optimum > 0.7


def test_five_small_runs_predict_over_trained_and_large_models():
    runs = gadre_runs("rpj")
    named = lambda *endings: np.array([name.endswith(endings) for name in runs.run])
    small = named(*(f"{model}-1.0" for model in ("l=8_h=4", "l=24_h=8"))) | named(
        "d=96_l=8_h=4-16.0"
    )
    large = runs.take(named("open_lm_1b-32.0", "open_lm_7b-1.0"))
    result = fit(LAWS["overtraining"], runs.take(small), **FEW)
    assert len(result.runs) == 5
    errors = predict(result.law, result.coefficients, large) / large.loss - 1
    np.testing.assert_allclose(errors, [0.0071, 0.0073], atol=5e-5)
    # Four coefficients of five runs: the prediction is good, and nothing says how good it is.
    assert "too few to show" in result.not_identifiable[0]


EXPONENTS = (0.8338, 0.7009, 0.6035, 0.5714, 0.4970)


@pytest.mark.parametrize(("corrections", "exponent"), list(enumerate(EXPONENTS)))
def test_the_best_sizes_grow_with_the_published_exponents(corrections, exponent):
    where = {"corrections": str(corrections)}
    columns = {"parameters": "n", "tokens": "t"}
    pairs = read_runs(DATA / "porian_pairs.csv", columns, where=where)
    assert power_law(pairs.flops, pairs.parameters)[1] == pytest.approx(exponent, abs=5e-5)
    # Parabolas, where the paper interpolates, differ by a few hundredths.
    result = fit_isoflop(porian_runs(corrections))
    assert result.coefficients["N_exponent"] == pytest.approx(exponent, abs=0.03)
    assert result.is_identifiable


@pytest.mark.parametrize(
    "corrections", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 4))]
)
def test_a_parametric_fit_to_porians_points_is_not_identifiable(corrections):
    """The cosine schedule of each run (3) mends the data, so that those points do fit a law."""
    result = fit(LAWS["chinchilla"], porian_runs(corrections), **FEW)
    assert not result.is_identifiable
    assert result.held_out is not None


def test_mixed_experiments_are_refused():
    with pytest.raises(ConfigError, match=r"^loss: rows .* rise with the tokens"):
        fit(LAWS["chinchilla"], read_runs(DATA / "porian_points.csv", {"parameters": "params"}))
    columns = {"parameters": "N", "tokens": "D", "loss": "loss_c4", "run": "name"}
    with pytest.raises(ConfigError, match=r"^dataset: the table mixes"):
        fit(LAWS["chinchilla"], read_runs(DATA / "gadre.csv", columns))


@pytest.mark.parametrize("dataset", ["rpj", pytest.param("rw_original", marks=pytest.mark.slow)])
def test_gadres_runs_determine_chinchillas_law(dataset):
    """These runs determine the law: no reason and no warning is raised."""
    result = fit(LAWS["chinchilla"], gadre_runs(dataset), num_starts=30, num_bootstraps=300)
    assert result.is_identifiable, result.not_identifiable
    assert result.held_out is not None
    assert result.held_out.mean_error < 0.03 < result.held_out.mean_repeated_error
