"""Tests each law's prediction against the paper's formula, and its gradient against differences."""

import numpy as np
import pytest

from moe.scaling.experiments.runs import make_runs
from moe.scaling.laws import LAWS, predict
from moe.scaling.laws.formulas import read_inputs

# Coefficients as the papers print them.
PAPERS = {
    "chinchilla": {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28},
    "kaplan": {"N_c": 6.4e13, "alpha_N": 0.076, "D_c": 1.8e13, "alpha_D": 0.103},
    "overtraining": {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136},
    "clark": {
        "a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.478,
    },
    "fine_grained": {
        "c": 0.47, "a": 18.1, "alpha": 0.115, "g": 2.1, "gamma": 0.58, "b": 30.8, "beta": 0.147,
    },
    "sparsity": {
        "e": 0.94, "a": 16612.5, "alpha": 0.5962, "b": 5455.67, "beta": 0.3954,
        "c": 0.4598, "lambda": -0.1666, "d": 17.26, "delta": 0.1603, "gamma": 0.1595,
    },
    "joint": {
        "a": 35.91, "delta": 0.2285, "alpha": -0.1889, "gamma": -0.0098, "b": 35.98,
        "omega": -0.5529, "beta": -0.1775, "zeta": 0.0259, "c": 1.3637, "E_start": 2.0732,
        "E_max": 290.4521,
    },
}  # fmt: skip

MIXTURE = make_runs(
    parameters=[4e9, 1e9, 2e10],
    active_parameters=[5e8, 1e9, 1.5e9],
    embedding_parameters=[5e7, 6e7, 7e7],
    tokens=[2e10, 5e10, 1e11],
    experts=[8, 1, 64],
    experts_per_token=[1, 1, 2],
    granularity=[1, 1, 4],
    loss=[2.5, 2.4, 2.3],
)


def saturating_experts(experts, start, largest):
    """Returns Ê as Clark et al. define it."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / largest)) + 1 / largest)


def by_paper(name: str, c: dict[str, float]) -> np.ndarray:
    """Returns the losses of MIXTURE, by formulas written as in the papers."""
    total, active = MIXTURE.parameters, MIXTURE.active_parameters
    embedding, tokens = MIXTURE.embedding_parameters, MIXTURE.tokens
    density, granularity = 1 - MIXTURE.sparsity, MIXTURE.granularity
    match name:
        case "chinchilla":
            return c["E"] + c["A"] / active ** c["alpha"] + c["B"] / tokens ** c["beta"]
        case "kaplan":
            size = (c["N_c"] / (active - embedding)) ** (c["alpha_N"] / c["alpha_D"])
            return (size + c["D_c"] / tokens) ** c["alpha_D"]
        case "overtraining":
            ratio, flops = tokens / active, 6 * active * tokens
            power = c["a"] * ratio ** c["eta"] + c["b"] * ratio ** -c["eta"]
            return c["E"] + power * flops ** -c["eta"]
        case "fine_grained":
            factor = c["g"] / granularity ** c["gamma"] + c["a"]
            body = total - embedding
            return c["c"] + factor / body ** c["alpha"] + c["b"] / tokens ** c["beta"]
        case "sparsity":
            return (
                c["e"]
                + c["a"] / total ** c["alpha"]
                + c["b"] / tokens ** c["beta"]
                + c["c"] / density ** c["lambda"]
                + c["d"] / (density ** c["delta"] * total ** c["gamma"])
            )
    experts = saturating_experts(MIXTURE.experts, c["E_start"], c["E_max"])
    if name == "clark":
        n, e = np.log10(active), np.log10(experts)
        return 10 ** (c["a"] * n + c["b"] * e + c["c"] * n * e + c["d"])
    size = c["a"] * experts ** c["delta"] * active ** (c["alpha"] + c["gamma"] * np.log(experts))
    data = c["b"] * experts ** c["omega"] * tokens ** (c["beta"] + c["zeta"] * np.log(experts))
    return size + data + c["c"]


@pytest.mark.parametrize("name", LAWS)
def test_predictions_are_those_of_the_papers_formula(name):
    expected = by_paper(name, PAPERS[name])
    np.testing.assert_allclose(predict(LAWS[name], PAPERS[name], MIXTURE), expected, rtol=1e-12)
    # Losses of language models, so that a misread coefficient would be seen.
    assert np.all((expected > 1.3) & (expected < 4))


@pytest.mark.parametrize("name", LAWS)
def test_gradients_equal_finite_differences(name):
    law = LAWS[name]
    inputs = read_inputs(law, MIXTURE)
    starts = law.draw(np.random.default_rng(0), 5, inputs, np.log(MIXTURE.loss))
    theta_PK = np.concatenate([law.fitted(PAPERS[name])[None], starts])
    gradient_PNK = law.log_loss(theta_PK, inputs)[1]
    for k in range(len(law.coefficients)):
        step = np.zeros(len(law.coefficients))
        step[k] = 1e-5 * max(1.0, abs(theta_PK[0, k]))
        above, below = (law.log_loss(theta_PK + sign * step, inputs)[0] for sign in (1, -1))
        difference = (above - below) / (2 * step[k])
        np.testing.assert_allclose(gradient_PNK[..., k], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_coefficients_survive_the_way_to_fitted_ones_and_back(name):
    law = LAWS[name]
    np.testing.assert_allclose(
        law.public(law.fitted(PAPERS[name])), [PAPERS[name][c] for c in law.coefficients]
    )


def test_no_saturation_below_its_start_is_a_law():
    law = LAWS["clark"]
    wrong = law.fitted(PAPERS["clark"] | {"E_max": 1.5})
    assert np.isnan(law.log_loss(wrong[None], read_inputs(law, MIXTURE))[0]).all()
