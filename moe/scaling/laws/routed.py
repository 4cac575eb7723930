"""Defines the scaling laws of sparse models, in experts, granularity and sparsity."""

import numpy as np

from moe.scaling.laws.formulas import Inputs, Law, Objective, law_of_terms, log_sum

LN10 = np.log(10)

FINE_GRAINED = law_of_terms(
    name="fine_grained",
    title="Fine-grained experts",
    source="Krajewski et al. 2024, arXiv 2402.07871",
    formula="L = c + (g/G^gamma + a)/N^alpha + b/D^beta",
    inputs=("body", "tokens", "granularity"),
    coefficients=("c", "a", "alpha", "g", "gamma", "b", "beta"),
    exponents=frozenset({"alpha", "beta", "gamma"}),
    ranges={"alpha": (0.02, 0.6), "gamma": (0.1, 2.0), "beta": (0.02, 0.6)},
    terms=lambda x: (
        {"c": 1.0},
        {"a": 1.0, "alpha": -x["body"]},
        {"g": 1.0, "alpha": -x["body"], "gamma": -x["granularity"]},
        {"b": 1.0, "beta": -x["tokens"]},
    ),
    objective=Objective("log", 0.1),
    irreducible="c",
)

SPARSITY = law_of_terms(
    name="sparsity",
    title="Sparsity",
    source="Abnar et al. 2025, arXiv 2501.12370",
    formula="L = e + a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma)",
    inputs=("parameters", "tokens", "density"),
    coefficients=("e", "a", "alpha", "b", "beta", "c", "lambda", "d", "delta", "gamma"),
    exponents=frozenset({"alpha", "beta"}),
    ranges={
        "alpha": (0.05, 1.0),
        "beta": (0.05, 1.0),
        "lambda": (-0.6, 0.6),
        "delta": (-0.6, 0.6),
        "gamma": (0.05, 1.0),
    },
    terms=lambda x: (
        {"e": 1.0},
        {"a": 1.0, "alpha": -x["parameters"]},
        {"b": 1.0, "beta": -x["tokens"]},
        {"c": 1.0, "lambda": -x["density"]},
        {"d": 1.0, "delta": -x["density"], "gamma": -x["parameters"]},
    ),
    irreducible="e",
)


def log_effective_experts(
    log_start: np.ndarray, log_max: np.ndarray, experts_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the logarithm of Ê, which saturates, and its derivatives by log E_start, log E_max.

    1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max, so Ê is E_start for one expert and
    approaches E_max for many. Where E_max is not above E_start, all three are NaN: no such law.
    """
    inverse_start, inverse_max = np.exp(-log_start), np.exp(-log_max)
    gap = np.where(inverse_start > inverse_max, inverse_start - inverse_max, np.nan)
    count_PN = experts_N - 1 + 1 / gap
    effective_PN = 1 / (1 / count_PN + inverse_max)
    # The derivatives of log Ê are Ê times those of -1/Ê.
    through_gap_PN = effective_PN / (count_PN * gap) ** 2
    by_start_PN = through_gap_PN * inverse_start
    by_max_PN = effective_PN * inverse_max - through_gap_PN * inverse_max
    return np.log(effective_PN), by_start_PN, by_max_PN


def _clark_log_loss(theta_PK: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns ln 10 · (a n + b ê + c n ê + d), in decimal logarithms n of N and ê of Ê."""
    a, b, c, d, log_start, log_max = theta_PK.T[..., None]
    effective_PN, by_start_PN, by_max_PN = log_effective_experts(log_start, log_max, x["experts"])
    n, e_PN = x["decimal_active"], effective_PN / LN10
    log_loss_PN = LN10 * (a * n + b * e_PN + c * n * e_PN + d)
    by_effective_PN = b + c * n
    gradient = (
        LN10 * n * np.ones_like(e_PN),
        LN10 * e_PN,
        LN10 * n * e_PN,
        LN10 * np.ones_like(e_PN),
        by_effective_PN * by_start_PN,
        by_effective_PN * by_max_PN,
    )
    return log_loss_PN, np.stack(gradient, -1)


def _draw_clark(
    generator: np.random.Generator, count: int, x: Inputs, log_losses: np.ndarray
) -> np.ndarray:
    """Draws starts whose prediction in the middle of the data is the mean loss."""
    a = generator.uniform(-0.2, 0, count)
    b = generator.uniform(-0.3, 0, count)
    c = generator.uniform(0, 0.03, count)
    start, largest = _draw_saturation(generator, count)
    zero = np.zeros(count)
    theta_PK = np.stack([a, b, c, zero, start, largest], -1)
    middle = np.mean(_clark_log_loss(theta_PK, x)[0], -1)
    theta_PK[:, 3] = (np.mean(log_losses) - middle) / LN10
    return theta_PK


def _draw_saturation(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws log E_start between 1 and 5 and log E_max between 30 and 3,000."""
    return (
        generator.uniform(0, np.log(5), count),
        generator.uniform(np.log(30), np.log(3000), count),
    )


CLARK = Law(
    name="clark",
    title="Routed models (Clark)",
    source="Clark et al. 2022, arXiv 2202.01169, equation 1",
    formula="log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d, "
    "1/Ê = 1/(E-1+1/(1/E_start-1/E_max)) + 1/E_max",
    inputs=("decimal_active", "experts"),
    coefficients=("a", "b", "c", "d", "E_start", "E_max"),
    positive=frozenset({"E_start", "E_max"}),
    exponents=frozenset({"a", "b"}),
    interactions={"b": ("c", "decimal_active")},
    log_loss=_clark_log_loss,
    draw=_draw_clark,
    objective=Objective("log", np.inf),
)


def _joint_log_loss(theta_PK: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns log(a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c)."""
    (a, delta, alpha, gamma, b, omega, beta, zeta, c, log_start, log_max) = theta_PK.T[..., None]
    e_PN, by_start_PN, by_max_PN = log_effective_experts(log_start, log_max, x["experts"])
    n, d = x["active"], x["tokens"]
    size_PN = a + delta * e_PN + (alpha + gamma * e_PN) * n
    data_PN = b + omega * e_PN + (beta + zeta * e_PN) * d
    log_loss_PN, (size_share, data_share, c_share) = log_sum(
        (size_PN, data_PN, np.broadcast_to(c, e_PN.shape))
    )
    by_effective_PN = size_share * (delta + gamma * n) + data_share * (omega + zeta * d)
    gradient = (
        size_share,
        size_share * e_PN,
        size_share * n,
        size_share * e_PN * n,
        data_share,
        data_share * e_PN,
        data_share * d,
        data_share * e_PN * d,
        c_share,
        by_effective_PN * by_start_PN,
        by_effective_PN * by_max_PN,
    )
    return log_loss_PN, np.stack(gradient, -1)


def _draw_joint(
    generator: np.random.Generator, count: int, x: Inputs, log_losses: np.ndarray
) -> np.ndarray:
    """Draws starts at which size, data and the constant each have some part in the loss."""
    alpha, beta = generator.uniform(-0.6, -0.05, (2, count))
    delta, omega = generator.uniform(-0.6, 0.6, (2, count))
    gamma, zeta = generator.uniform(-0.05, 0.05, (2, count))
    start, largest = _draw_saturation(generator, count)
    shares = generator.uniform(np.log(0.01), 0, (3, count)) + np.mean(log_losses)
    e_P = np.mean(log_effective_experts(start[:, None], largest[:, None], x["experts"])[0], axis=-1)
    n, d = np.mean(x["active"]), np.mean(x["tokens"])
    a = shares[0] - delta * e_P - (alpha + gamma * e_P) * n
    b = shares[1] - omega * e_P - (beta + zeta * e_P) * d
    return np.stack([a, delta, alpha, gamma, b, omega, beta, zeta, shares[2], start, largest], -1)


JOINT = Law(
    name="joint",
    title="Joint dense and sparse",
    source="Ludziejewski et al. 2025, arXiv 2502.05172",
    formula="L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, "
    "N active parameters, Ê as in Clark's law",
    inputs=("active", "tokens", "experts"),
    coefficients=(
        "a",
        "delta",
        "alpha",
        "gamma",
        "b",
        "omega",
        "beta",
        "zeta",
        "c",
        "E_start",
        "E_max",
    ),
    positive=frozenset({"a", "b", "c", "E_start", "E_max"}),
    exponents=frozenset({"alpha", "beta"}),
    log_loss=_joint_log_loss,
    draw=_draw_joint,
    irreducible="c",
)
