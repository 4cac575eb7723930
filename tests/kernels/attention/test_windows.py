"""Checks windows against float64: limits of 0, beyond the sequence, and on one side alone."""

import functools
import itertools

import numpy as np
import pytest

from moe.kernels.attention import Choice
from tests.kernels.attention.cases import Case, evaluate, expected, flash

LIMITS = (None, 0, 1, 2, 7, 300)
# One length lies between the two largest limits, and both are several blocks.
LENGTHS = 40, 150


def check_window(implementation, window, causal, length):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(1, length, heads, 16)) for heads in (2, 1, 1, 2))
    case = Case(
        (q, k, v, None), (g, rng.normal(size=(1, length, 2))), {"window": window, "causal": causal}
    )
    values = evaluate(functools.partial(flash, implementation), case, "float32")
    for value, right in zip(values, expected(case)[0], strict=True):
        # Sums of up to `length` products, each of which is rounded, of the size of the largest.
        np.testing.assert_allclose(
            value, right, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(right).max()
        )


@pytest.mark.parametrize("implementation", [None, "reference", Choice("tpu", (128, 128))])
@pytest.mark.parametrize(
    ("window", "causal"),
    [
        ((0, 0), True),
        ((0, None), False),
        ((None, 0), False),
        ((0, 7), False),
        ((2, 0), False),
        ((300, 1), False),
    ],
)
def test_a_window(implementation, window, causal):
    check_window(implementation, window, causal, LENGTHS[0] if window != (300, 1) else LENGTHS[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "implementation", [None, "blockwise", Choice("blockwise", (16, 8)), "reference", "tpu"]
)
@pytest.mark.parametrize(
    ("left", "right", "causal"), list(itertools.product(LIMITS, LIMITS, (False, True)))
)
def test_every_window(implementation, left, right, causal):
    for length in LENGTHS:
        check_window(implementation, (left, right), causal, length)


def test_a_window_of_one_token_gives_its_value():
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(rng.normal(size=(2, 5, 2, 8))) for _ in range(3))
    for keywords in (
        {"causal": True, "window": (0, 0)},
        {"window": (0, 0)},
        {"causal": True, "window": (0, 3)},
    ):
        np.testing.assert_allclose(flash(None, q, k, v, None, **keywords)[0], v, rtol=0, atol=1e-5)


def test_limits_beyond_int32_are_none():
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(rng.normal(size=(1, 5, 2, 8))) for _ in range(3))
    whole = flash(None, q, k, v, None, causal=True)[0]
    for left in (2**30, 2**40):
        np.testing.assert_allclose(
            flash(None, q, k, v, None, causal=True, window=(left, 0))[0], whole, rtol=0, atol=1e-5
        )
