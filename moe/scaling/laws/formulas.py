"""Defines what a scaling law is, and the laws of dense models.

Every law here predicts a loss. In arrays' names, P stands for sets of coefficients (starts or
bootstraps), N for runs and K for coefficients. A law computes all sets at once, because a fit needs
thousands of them.

A coefficient that must be positive is fitted as its logarithm. The array `theta_PK` holds what is
fitted; `Law.public` and `Law.fitted` convert.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from moe.scaling.experiments.runs import Runs

Inputs = dict[str, np.ndarray]
# Returns the logarithms of the predicted losses, [P, N], and their derivatives, [P, N, K].
Formula = Callable[[np.ndarray, Inputs], tuple[np.ndarray, np.ndarray]]
# Draws starts, [P, K], for a generator, a count, the inputs and the runs' log losses.
Draw = Callable[[np.random.Generator, int, Inputs, np.ndarray], np.ndarray]
# A term of a sum, exp(sum of coefficient · column): the column that each coefficient multiplies.
Term = Mapping[str, np.ndarray | float]

# The columns of a table that each input of a law is made of.
_COLUMNS = {
    "parameters": ("parameters",),
    "active": ("active_parameters",),
    "decimal_active": ("active_parameters",),
    "active_body": ("active_parameters", "embedding_parameters"),
    "body": ("parameters", "embedding_parameters"),
    "tokens": ("tokens",),
    "flops": ("flops",),
    "tokens_per_parameter": ("tokens", "active_parameters"),
    "experts": ("experts",),
    "granularity": ("granularity",),
    "density": ("sparsity",),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Says what a fit minimises: the sum of Huber's function over the runs' residuals.

    A residual is the difference of logarithms (`log`) or of losses (`loss`). With an infinite
    `delta` Huber's function is half the square.
    """

    space: Literal["log", "loss"] = "log"
    delta: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Law:
    """Holds a law of the loss: its coefficients, its formula with gradient, and its starts."""

    name: str
    title: str
    source: str
    formula: str
    inputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    positive: frozenset[str]  # fitted as logarithms
    exponents: frozenset[str]  # the powers of size and data, without which a law says nothing
    log_loss: Formula
    draw: Draw
    objective: Objective = Objective()
    # Exponents that change with an input, and are judged in the middle of the data: for
    # {"b": ("c", "decimal_active")}, b stands for b + c · the mean of decimal_active.
    interactions: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    irreducible: str | None = None  # the coefficient that the loss cannot fall below
    # A loss that is a sum of powers has terms, and ranges from which starts draw its exponents.
    terms: Callable[[Inputs], Sequence[Term]] = lambda inputs: ()
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns of a table of runs that the law reads, besides the loss."""
        return tuple(dict.fromkeys(column for name in self.inputs for column in _COLUMNS[name]))

    def public(self, theta_PK: np.ndarray) -> np.ndarray:
        """Returns the coefficients as a paper prints them, from the fitted ones.

        Resampled tables may drive a factor beyond float64, so it ends at exp(700).
        """
        positive_K = np.array([name in self.positive for name in self.coefficients])
        return np.where(
            positive_K, np.exp(np.where(positive_K, np.minimum(theta_PK, 700), 0)), theta_PK
        )

    def fitted_samples(self, samples_PK: np.ndarray) -> np.ndarray:
        """Returns the fitted coefficients, [P, K], from those that a paper prints."""
        positive_K = np.array([name in self.positive for name in self.coefficients])
        with np.errstate(divide="ignore"):
            return np.where(positive_K, np.log(np.where(positive_K, samples_PK, 1)), samples_PK)

    def fitted(self, coefficients: Mapping[str, float]) -> np.ndarray:
        """Returns the fitted coefficients, [K], from those that a paper prints."""
        return self.fitted_samples(np.array([coefficients[name] for name in self.coefficients]))


def read_inputs(law: Law, runs: Runs) -> Inputs:
    """Returns the columns that a law reads. All but the number of experts are logs."""
    read = {
        "parameters": lambda: np.log(runs.parameters),
        "active": lambda: np.log(runs.active_parameters),
        "decimal_active": lambda: np.log10(runs.active_parameters),
        "active_body": lambda: np.log(runs.active_parameters - runs.embedding_parameters),
        "body": lambda: np.log(runs.parameters - runs.embedding_parameters),
        "tokens": lambda: np.log(runs.tokens),
        "flops": lambda: np.log(runs.flops),
        "tokens_per_parameter": lambda: np.log(runs.tokens / runs.active_parameters),
        "experts": lambda: runs.experts,
        "granularity": lambda: np.log(runs.granularity),
        "density": lambda: np.log1p(-runs.sparsity),
    }
    return {name: read[name]() for name in law.inputs}


def exponent(
    law: Law, name: str, coefficients: Mapping[str, np.ndarray | float], inputs: Inputs
) -> np.ndarray:
    """Returns an exponent in the middle of the data."""
    value = np.asarray(coefficients[name])
    if name not in law.interactions:
        return value
    other, column = law.interactions[name]
    return value + np.asarray(coefficients[other]) * np.mean(inputs[column])


def exponent_name(law: Law, name: str) -> str:
    """Returns how a message names what `exponent` returns, which need not be one coefficient."""
    if name not in law.interactions:
        return name
    return f"{name}, with {law.interactions[name][0]} in the middle of the data,"


def log_sum(z_PN: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns log(sum of exp(z)), without overflow, and each term's share of the sum."""
    largest_PN = functools.reduce(np.maximum, z_PN)
    terms = [np.exp(z - largest_PN) for z in z_PN]
    total_PN = functools.reduce(np.add, terms)
    return largest_PN + np.log(total_PN), [term / total_PN for term in terms]


def sum_of_powers(
    coefficients: tuple[str, ...], terms: Callable[[Inputs], Sequence[Term]]
) -> Formula:
    """Returns the formula of a loss that is a sum of terms, each exp(a sum of coefficients)."""

    def log_loss(theta_PK: np.ndarray, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        num_runs = len(next(iter(inputs.values())))
        theta = dict(zip(coefficients, theta_PK.T[..., None], strict=True))
        rows = [
            {name: np.broadcast_to(np.asarray(x), (num_runs,)) for name, x in term.items()}
            for term in terms(inputs)
        ]
        z_PN = [
            functools.reduce(np.add, [theta[name] * x for name, x in row.items()]) for row in rows
        ]
        log_loss_PN, shares = log_sum(z_PN)
        gradient_PNK = np.zeros((*log_loss_PN.shape, len(coefficients)))
        for row, share_PN in zip(rows, shares, strict=True):
            for name, x in row.items():
                gradient_PNK[..., coefficients.index(name)] += share_PN * x
        return log_loss_PN, gradient_PNK

    return log_loss


def draw_terms(
    coefficients: tuple[str, ...],
    terms: Callable[[Inputs], Sequence[Term]],
    ranges: Mapping[str, tuple[float, float]],
) -> Draw:
    """Returns a function that draws starts at which all terms have some part in the loss.

    The exponents come from `ranges`. The first coefficient of a term is its factor, whose size
    depends on the units; it is chosen so that in the middle of the data the term is between 1/100
    and 1 times the loss.
    """

    def draw(
        generator: np.random.Generator, count: int, inputs: Inputs, log_losses: np.ndarray
    ) -> np.ndarray:
        theta = {name: generator.uniform(*ranges[name], count) for name in ranges}
        for term in terms(inputs):
            factor, *exponents = term
            share = generator.uniform(np.log(0.01), 0, count)
            powers = sum(theta[name] * np.mean(term[name]) for name in exponents)
            theta[factor] = np.mean(log_losses) + share - powers
        return np.stack([theta[name] for name in coefficients], -1)

    return draw


def law_of_terms(
    *,
    ranges: Mapping[str, tuple[float, float]],
    terms: Callable[[Inputs], Sequence[Term]],
    coefficients: tuple[str, ...],
    **fields,
) -> Law:
    """Returns the law of a loss that is a sum of powers."""
    return Law(
        coefficients=coefficients,
        positive=frozenset(coefficients) - frozenset(ranges),
        log_loss=sum_of_powers(coefficients, terms),
        draw=draw_terms(coefficients, terms, ranges),
        terms=terms,
        ranges=ranges,
        **fields,
    )


CHINCHILLA = law_of_terms(
    name="chinchilla",
    title="Chinchilla",
    source="Hoffmann et al. 2022, arXiv 2203.15556, equation 2",
    formula="L = E + A/N^alpha + B/D^beta",
    inputs=("active", "tokens"),
    coefficients=("E", "A", "alpha", "B", "beta"),
    exponents=frozenset({"alpha", "beta"}),
    ranges={"alpha": (0.05, 1.0), "beta": (0.05, 1.0)},
    terms=lambda x: (
        {"E": 1.0},
        {"A": 1.0, "alpha": -x["active"]},
        {"B": 1.0, "beta": -x["tokens"]},
    ),
    irreducible="E",
)

OVERTRAINING = law_of_terms(
    name="overtraining",
    title="Over-training",
    source="Gadre et al. 2024, arXiv 2403.08540",
    formula="L = E + (a M^eta + b M^-eta) C^-eta, with M = D/N",
    inputs=("flops", "tokens_per_parameter"),
    coefficients=("E", "a", "b", "eta"),
    exponents=frozenset({"eta"}),
    ranges={"eta": (0.02, 0.5)},
    terms=lambda x: (
        {"E": 1.0},
        {"a": 1.0, "eta": x["tokens_per_parameter"] - x["flops"]},
        {"b": 1.0, "eta": -x["tokens_per_parameter"] - x["flops"]},
    ),
    objective=Objective("loss", np.inf),
    irreducible="E",
)


def _kaplan_log_loss(theta_PK: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns alpha_D · log((N_c/N)^(alpha_N/alpha_D) + D_c/D), and its derivatives."""
    log_n_c, log_alpha_n, log_d_c, log_alpha_d = theta_PK.T[..., None]
    alpha_d, ratio = np.exp(log_alpha_d), np.exp(log_alpha_n - log_alpha_d)
    size_PN = ratio * (log_n_c - x["active_body"])
    data_PN = log_d_c - x["tokens"]
    log_sum_PN, (size_share, data_share) = log_sum((size_PN, data_PN))
    log_loss_PN = alpha_d * log_sum_PN
    through_ratio_PN = alpha_d * size_share * size_PN
    gradient = (
        alpha_d * size_share * ratio,
        through_ratio_PN,
        alpha_d * data_share,
        log_loss_PN - through_ratio_PN,
    )
    return log_loss_PN, np.stack(gradient, -1)


def _draw_kaplan(
    generator: np.random.Generator, count: int, x: Inputs, log_losses: np.ndarray
) -> np.ndarray:
    """Draws starts at which size and data each explain some part of the mean loss."""
    alpha_n, alpha_d = np.exp(generator.uniform(np.log(0.02), np.log(0.5), (2, count)))
    shares = generator.uniform(np.log(0.1), 0, (2, count)) + np.mean(log_losses)
    return np.stack(
        [
            np.mean(x["active_body"]) + shares[0] / alpha_n,
            np.log(alpha_n),
            np.mean(x["tokens"]) + shares[1] / alpha_d,
            np.log(alpha_d),
        ],
        -1,
    )


KAPLAN = Law(
    name="kaplan",
    title="Kaplan",
    source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.5",
    formula="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D, N without embeddings",
    inputs=("active_body", "tokens"),
    coefficients=("N_c", "alpha_N", "D_c", "alpha_D"),
    positive=frozenset({"N_c", "alpha_N", "D_c", "alpha_D"}),
    exponents=frozenset({"alpha_N", "alpha_D"}),
    log_loss=_kaplan_log_loss,
    draw=_draw_kaplan,
)
