"""The best model for a budget, against the closed form of the Chinchilla law."""

import numpy as np
import pytest

from moe.scaling.experiments.optimum import Family, best_point, best_size, dense_family

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
    optimum = best_size(chinchilla(), budget, [dense_family(budget)])
    best = closed_form(budget)
    assert optimum.best["parameters"] == pytest.approx(best, rel=1e-3)
    assert optimum.best["tokens"] == pytest.approx(budget / 6 / best, rel=1e-3)
    lowest = chinchilla()({"parameters": np.array([best]), "tokens": np.array([budget / 6 / best])})
    assert optimum.best["loss"] == pytest.approx(lowest.item(), rel=1e-7)
    assert optimum.at_edge == 0


def test_the_interval_is_that_of_the_samples() -> None:
    shifts = np.linspace(-0.01, 0.01, 201)
    optimum = best_size(chinchilla((0.0, *shifts)), 1e21, [dense_family(1e21)])
    ends = [closed_form(1e21, ALPHA + shift) for shift in np.percentile(shifts, (2.5, 97.5))]
    assert optimum.intervals["parameters"] == pytest.approx(sorted(ends), rel=2e-3)
    assert optimum.best["parameters"] == pytest.approx(closed_form(1e21), rel=1e-3)


def test_a_law_without_a_best_size_is_at_the_edge() -> None:
    loss = lambda columns: (1 + 1 / np.log(columns["parameters"]))[None]
    assert best_size(loss, 1e20, [dense_family(1e20)]).at_edge == 1


def mixtures(experts: float) -> Family:
    """Returns models of 1M to 1G active parameters whose experts cost a tenth more FLOPs."""

    def columns(log_size):
        size = 10.0**log_size
        known = {"parameters": size, "experts": np.full_like(size, experts)}
        return known | {"flops_per_token": 6.6 * size}

    return Family((6.0, 9.0), columns)


def test_the_best_of_several_families_is_chosen_for_each_sample() -> None:
    """The fit gains from experts, and the second sample loses by them."""
    gain_S1 = np.array([[0.99], [1.01]])
    loss = lambda columns: chinchilla((0.0, 0.0))(columns) * gain_S1 ** columns["experts"]
    optimum = best_size(loss, 6.6e19, [mixtures(1), mixtures(4)])
    assert optimum.best["experts"] == 4 and optimum.intervals["experts"] == (1, 1)
    best = closed_form(6e19)  # what is left for tokens, if a tenth more FLOPs are paid
    assert optimum.best["parameters"] == pytest.approx(best, rel=1e-3)
    assert optimum.best["tokens"] == pytest.approx(1e19 / best, rel=1e-3)
    assert optimum.best["flops"] == 6.6e19 and optimum.at_edge == 0
    # Models of 1G parameters are too small for this budget.
    large = best_size(loss, 1e25, [mixtures(1), mixtures(4)])
    assert large.best["parameters"] == pytest.approx(1e9) and large.at_edge == 1


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
