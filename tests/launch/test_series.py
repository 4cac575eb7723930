"""Series of a metric: how they are read, and thinned without losing what a reader looks for."""

import math

import numpy as np

from launch.series import (
    Series,
    block_medians,
    keep_extremes,
    mean_series,
    read_all_series,
    read_series,
)

LINES = [{"step": 1, "a": 2, "b": 3.5}, {"step": 2, "a": math.inf}, {"step": 2, "b": 0.0}]


def test_a_series_has_the_steps_that_logged_its_metric() -> None:
    steps, values = read_series(LINES, "b")
    assert (steps.tolist(), values.tolist(), values.dtype) == ([1, 2], [3.5, 0.0], float)
    assert [len(array) for array in read_series(LINES, "c")] == [0, 0]


def test_all_series_are_the_single_ones() -> None:
    found = read_all_series(LINES)
    assert set(found) == {"a", "b"}
    for name, series in found.items():
        for array, expected in zip(series, read_series(LINES, name), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_block_medians_leave_a_gap_where_no_value_is_finite() -> None:
    values = np.array([1, 3, math.nan, math.inf, 5, math.nan, 8, 9])
    steps, medians = block_medians(Series(np.arange(0, 80, 10), values), 4)
    np.testing.assert_array_equal(steps, [5, 25, 45, 65])
    np.testing.assert_array_equal(medians, [2, math.nan, 5, 8.5])


def test_a_line_of_many_values_keeps_its_extremes() -> None:
    steps, values = np.arange(100_000), np.random.default_rng(0).normal(size=100_000)
    values[[7, 70_000]], values[90_000:95_000] = [9.0, -9.0], math.nan
    chosen, thinned = keep_extremes(Series(steps, values))
    assert len(chosen) <= 2000 and np.all(np.diff(chosen) > 0)
    np.testing.assert_array_equal(thinned, values[chosen])
    assert {7, 70_000} <= set(chosen) and np.isnan(thinned).any()
    short = Series(steps[:9], values[:9])
    assert keep_extremes(short) is short


def test_a_mean_has_the_steps_that_all_runs_have():
    """One run is longer, another one was written twice at a step, and a third has other steps."""
    long = Series(np.array([1, 2, 4]), np.array([1.0, 2.0, 5.0]))
    twice = Series(np.array([1, 1, 2]), np.array([3.0, 5.0, 4.0]))
    steps, values = mean_series([long, twice])
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(values, [3.0, 3.0])
    other = Series(np.array([3]), np.array([7.0]))
    assert not len(mean_series([long, other]).steps)
