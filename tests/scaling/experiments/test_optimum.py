"""The best model for a budget, against the closed form of the Chinchilla law."""

import numpy as np
import pytest

from moe.scaling.experiments.optimum import best_point, best_size

# Hoffmann et al.'s law as Besiroglu et al. 2024 (arXiv 2404.10102) refitted it.
A, B, E, ALPHA, BETA = 482.0, 2085.0, 1.817, 0.348, 0.366


def chinchilla(shifts=(0.0,)):
    """Returns the law as a function of columns, with a sample for each shift of alpha."""
    shift_S1 = np.array(shifts)[:, None]

    def loss(columns):
        size = A / columns["parameters"] ** (ALPHA + shift_S1)
        return E + size + B / columns["tokens"] ** BETA

    return loss


def closed_form(budget, alpha=ALPHA):
    """Returns the best number of parameters, eq. 4 of Hoffmann et al. 2022 (arXiv 2203.15556)."""
    power = 1 / (alpha + BETA)
    return (alpha * A / (BETA * B)) ** power * (budget / 6) ** (BETA * power)


@pytest.mark.parametrize("budget", [1e15, 5.76e23, 1e30])
def test_the_best_size_is_that_of_the_closed_form(budget: float) -> None:
    optimum = best_size(chinchilla(), budget, {})
    best = closed_form(budget)
    assert optimum.best["parameters"] == pytest.approx(best, rel=1e-3)
    assert optimum.best["tokens"] == pytest.approx(budget / 6 / best, rel=1e-3)
    lowest = chinchilla()({"parameters": np.array([best]), "tokens": np.array([budget / 6 / best])})
    assert optimum.best["loss"] == pytest.approx(lowest.item(), rel=1e-7)
    assert optimum.at_edge == 0


def test_the_interval_is_that_of_the_samples() -> None:
    shifts = np.linspace(-0.01, 0.01, 201)
    optimum = best_size(chinchilla((0.0, *shifts)), 1e21, {})
    ends = [closed_form(1e21, ALPHA + shift) for shift in np.percentile(shifts, (2.5, 97.5))]
    assert optimum.intervals["parameters"] == pytest.approx(sorted(ends), rel=2e-3)
    assert optimum.best["parameters"] == pytest.approx(closed_form(1e21), rel=1e-3)


def test_a_law_without_a_best_size_is_at_the_edge() -> None:
    loss = lambda columns: (1 + 1 / np.log(columns["parameters"]))[None]
    assert best_size(loss, 1e20, {}).at_edge == 1


def test_fixed_columns_reach_the_law() -> None:
    loss = lambda columns: chinchilla()(columns) / columns["experts"]
    optimum = best_size(loss, 1e20, {"experts": 4.0})
    assert optimum.best["experts"] == 4
    assert optimum.best["loss"] == pytest.approx(best_size(chinchilla(), 1e20, {}).best["loss"] / 4)


def test_the_best_of_given_points() -> None:
    points = {
        "parameters": np.array([1.0, 2.0, 3.0]),
        "tokens": np.array([6.0, 3.0, 2.0]),
        "experts": np.array([0, 8, 16]),
    }
    # The fit itself is lowest at the second point, and of the two samples each at another one.
    loss_SP = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.5, 2.25, 2.0]])
    index, optimum = best_point(
        lambda columns: loss_SP, 100.0, points, np.array([True, False, True])
    )
    assert index == 1
    assert optimum.best == {"parameters": 2, "tokens": 3, "experts": 8, "loss": 1}
    assert optimum.intervals["experts"] == pytest.approx((0.4, 15.6))
    assert optimum.intervals["loss"] == pytest.approx((1.025, 1.975))
    assert optimum.at_edge == pytest.approx(2 / 3)
