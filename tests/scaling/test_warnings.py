"""Tests each reason and each warning: a good fit is changed in one way, and says just that."""

import dataclasses
import re

import numpy as np
import pytest

from moe.scaling.experiments.runs import make_runs
from moe.scaling.laws import LAWS, Fit, fit
from moe.scaling.laws.warnings import find_warnings, why_not_identifiable, wide_exponent
from tests.scaling.tables import isoflop_runs


@pytest.fixture(scope="module")
def good() -> Fit:
    result = fit(LAWS["chinchilla"], isoflop_runs(0.002), num_starts=20, num_bootstraps=100)
    assert why_not_identifiable(result) == find_warnings(result) == []
    return result


def with_alpha(good: Fit, low: float, high: float) -> dict[str, np.ndarray]:
    samples = good.samples.copy()
    samples[:, 2] = np.linspace(low, high, len(samples))
    return {"samples": samples}


def held_out(good: Fit, error: float):
    return dataclasses.replace(good.held_out, predicted=good.held_out.measured * (1 + error))


# The held-out losses are guessed to about 7 % by repeating those of the next smaller budget.
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda good: {"condition_number": 1e9}, r"some combination of coefficients .*1e\+09"),
        (lambda good: {"condition_number": np.inf}, "some combination of coefficients"),
        (lambda good: with_alpha(good, -0.1, 0.6), r"alpha may be 0: its interval is \[-0.0825"),
        (lambda good: with_alpha(good, 0.2, 0.5), "alpha is known only within a factor of 2.4:"),
        (
            lambda good: {"drift": good.drift | {np.inf: good.coefficients | {"beta": 0.9}}},
            "beta depends on how residuals are weighted: .* but it is 0.9 with delta=inf",
        ),
        (
            lambda good: {"coefficients": good.coefficients | {"E": 1e-9}},
            "E is at its bound, 0: the data show no floor",
        ),
        (lambda good: {"held_out": held_out(good, 0.2)}, "largest budget.* to 20.00%, and rep"),
        (lambda good: {"runs": good.runs.take(np.arange(8))}, "8 runs are too few to show"),
    ],
)
def test_each_reason_is_found_alone(good, change, reason):
    reasons = why_not_identifiable(dataclasses.replace(good, **change(good)))
    assert len(reasons) == 1
    assert re.search(reason, reasons[0])


def test_an_exponent_of_two_coefficients_is_named_by_both():
    """The interval is not that of b in the table of coefficients, so the message says so."""
    size, experts = np.repeat(np.geomspace(1e7, 1e9, 8), 3), np.tile([1.0, 4.0, 16.0], 8)
    columns = {"active_parameters": size, "parameters": size * experts, "experts": experts}
    columns |= {"experts_per_token": np.ones(24), "tokens": np.full(24, 1e11)}
    noise = np.random.default_rng(0).standard_normal(24)
    loss = 40 * size**-0.15 * np.exp(0.02 * noise)  # which experts do not change
    found = fit(LAWS["clark"], make_runs(**columns, loss=loss), num_starts=20, num_bootstraps=100)
    reason = next(one for one in found.not_identifiable if one.startswith("b"))
    assert reason.startswith("b, with c in the middle of the data, may be 0: its interval is ")


def test_an_exponent_within_a_factor_of_two_is_no_reason(good):
    assert why_not_identifiable(dataclasses.replace(good, **with_alpha(good, 0.28, 0.5))) == []


def test_a_huge_factor_is_rounded():
    (reason,) = wide_exponent("alpha", 0.2, 1e14, "", "add runs")
    assert reason == (
        "alpha is known only within a factor of 5e+14: its interval is [0.2, 1e+14]: add runs"
    )


def with_runs(good: Fit, **columns) -> dict[str, object]:
    return {"runs": dataclasses.replace(good.runs, **columns)}


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda good: {"starts_at_optimum": 0.3}, "Only 30% of the starts end at the optimum"),
        (lambda good: {"projection_gap": -0.02}, "Variable projection ends 2.00% better"),
        (lambda good: {"condition_number": 2e4}, r"The condition number is 2e\+04"),
        (lambda good: with_runs(good, run=np.array(["a", "b", "c", "d", "e"] * 7)), "There are 5"),
        (lambda good: with_runs(good, repeats=np.full(35, 5.0)), "35 of 35 runs saw their text"),
        (
            lambda good: with_runs(good, tokens=np.geomspace(1e9, 9.98e9, 35)),
            "Tokens span a factor of 9.98, less than one decade",
        ),
        (lambda good: {"residuals": good.residuals + 0.03}, "The law misses the typical run by 3"),
        (lambda good: {"held_out": None}, "The largest budget cannot be held out"),
        (lambda good: {"held_out": held_out(good, 0.05)}, "The largest budget is predicted to 5.0"),
        (lambda good: {"left_out": [("x", "it is failed")]}, r"1 run was left out \(x: it is f"),
        (
            lambda good: {"coefficients": good.coefficients | {"E": good.runs.loss.min()}},
            "E is at its bound, the lowest loss of the table",
        ),
        (
            lambda good: {"samples": good.samples * [0, 1, 1, 1, 1]},
            "E may be 0: its interval reaches the bound",
        ),
    ],
)
def test_each_warning_is_given_alone(good, change, warning):
    warnings = find_warnings(dataclasses.replace(good, **change(good)))
    assert len(warnings) == 1
    assert re.search(warning, warnings[0])
