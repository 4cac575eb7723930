"""Defines what a fit returns, and predicts losses from it."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from moe.scaling.experiments.runs import Runs
from moe.scaling.laws.formulas import Law, read_inputs

INTERVAL = (0.025, 0.975)  # the quantiles of bootstraps between which 95 % lie


def named_intervals(names: Iterable[str], samples: np.ndarray) -> dict[str, tuple[float, float]]:
    """Returns the central 95 % of bootstraps' coefficients, [bootstraps, coefficients], by name."""
    low_K, high_K = np.quantile(samples, INTERVAL, axis=0)
    return {
        name: (float(low), float(high))
        for name, low, high in zip(names, low_K, high_K, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Holds a test of a law: it is fitted without the largest budget, whose losses it predicts.

    `repeated` is what somebody without a law would guess: for each run the loss of the run in the
    next smaller budget that is nearest to it in size and experts. Errors are relative:
    prediction over measurement minus 1.
    """

    run: np.ndarray
    flops: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    repeated: np.ndarray
    coefficients: dict[str, float]

    @property
    def errors(self) -> np.ndarray:
        return self.predicted / self.measured - 1

    @property
    def repeated_errors(self) -> np.ndarray:
        return self.repeated / self.measured - 1

    @property
    def mean_error(self) -> float:
        return float(np.mean(np.abs(self.errors)))

    @property
    def mean_repeated_error(self) -> float:
        return float(np.mean(np.abs(self.repeated_errors)))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Holds what a fit of a law of the loss found.

    `samples` are the coefficients of the bootstraps, [bootstraps, coefficients], and `intervals`
    their central 95 %. `residuals` are logarithms of prediction over measurement, in the order of
    `runs`, the runs that were fitted. `drift` has the coefficients under other deltas of Huber's
    function. `projection_gap` says by what share of the objective variable projection, which
    searches in another way, ends above (+) or below (-) L-BFGS. `objective` is the minimum, in
    units of delta² (with an infinite delta, of 1). A fit with reasons in `not_identifiable` says
    little beyond its data.
    """

    law: Law
    runs: Runs
    coefficients: dict[str, float]
    samples: np.ndarray
    residuals: np.ndarray
    objective: float
    held_out: HeldOut | None
    starts_at_optimum: float
    projection_gap: float | None
    condition_number: float
    drift: dict[float, dict[str, float]]
    left_out: list[tuple[str, str]]
    not_identifiable: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return named_intervals(self.law.coefficients, self.samples)

    @property
    def predicted(self) -> np.ndarray:
        return self.runs.loss * np.exp(self.residuals)

    @property
    def is_identifiable(self) -> bool:
        return not self.not_identifiable


def named(law: Law, coefficients_K: np.ndarray) -> dict[str, float]:
    """Returns coefficients by name."""
    return dict(zip(law.coefficients, map(float, coefficients_K), strict=True))


def predict(law: Law, coefficients: Mapping[str, float], runs: Runs) -> np.ndarray:
    """Returns the losses that a law predicts for runs, in nats per token, [N]."""
    return predict_samples(
        law, np.array([[coefficients[name] for name in law.coefficients]]), runs
    )[0]


def predict_samples(law: Law, samples: np.ndarray, runs: Runs) -> np.ndarray:
    """Returns the losses that each bootstrap predicts for runs, [bootstraps, N]."""
    # A resampled table may have driven coefficients beyond what float64 can multiply.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(law.log_loss(law.fitted_samples(samples), read_inputs(law, runs))[0])
