"""Tests that an evaluation tells the sources of a mixture apart, and that they add up."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import RunConfig
from moe.data.rows import JoinedRows, source_line
from moe.training import evaluation
from moe.training.evaluation import add_on_host, evaluate_sources


class FakeRows:
    """Has a size in bytes and tokens, as bits per byte need it."""

    sha256 = "0"

    def __init__(self, num_bytes: int, num_targets: int):
        self.num_bytes, self.num_targets = num_bytes, num_targets

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {}


SUMS = {
    10: {"loss": np.array(6.0), "targets": np.array(2.0)},
    30: {"loss": np.array(2.0), "targets": np.array(6.0)},
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    read = lambda config, program, variables, rows, stops: {} if stops(0) else SUMS[rows.num_bytes]
    monkeypatch.setattr(evaluation, "_sum_over_batches", read)
    task = types.SimpleNamespace(
        metrics=lambda sums: {"loss": sums["loss"] / sums["targets"]},
        score=lambda sums, rows: {"targets_per_byte": rows.num_targets / rows.num_bytes},
    )
    return types.SimpleNamespace(task=task)


def test_each_source_has_its_metrics_and_the_total_is_over_all(program: Any):
    rows = JoinedRows({"a": FakeRows(10, 5), "b": FakeRows(30, 3)})
    assert evaluate_sources(RunConfig(), program, None, rows) == {
        "loss": 1.0,
        # 2 of the 5 targets of 10 bytes were read, and 6 of 3, those of 30 bytes, twice.
        "targets_per_byte": (2 + 6) / (4 + 60),
        "a/loss": 3.0,
        "a/targets_per_byte": 0.5,
        "b/loss": pytest.approx(1 / 3),
        "b/targets_per_byte": 0.1,
    }


def test_a_source_without_a_name_has_the_metrics_alone(program: Any):
    expected = {"loss": 3.0, "targets_per_byte": 0.5}
    rows = JoinedRows({"": FakeRows(10, 5)})
    assert evaluate_sources(RunConfig(), program, None, rows) == expected


def test_an_evaluation_that_must_end_has_no_result(program: Any):
    rows = JoinedRows({"a": FakeRows(10, 5), "b": FakeRows(30, 3)})
    asked = iter([False, True])
    assert evaluate_sources(RunConfig(), program, None, rows, lambda sums: next(asked)) == {}


def test_targets_are_counted_exactly_beyond_float32():
    """In float32, 2**24 + 1 is 2**24."""
    ones = {"targets": jnp.ones(()), "router": {"load": jnp.ones(2)}}
    totals = {"targets": np.float64(2**24), "router": {"load": np.full(2, 2.0**24)}}
    for _ in range(3):
        totals = add_on_host(totals, ones)
    assert totals["targets"] == 2**24 + 3
    np.testing.assert_array_equal(totals["router"]["load"], 2**24 + 3)
    assert add_on_host({}, ones)["targets"] == 1


def test_what_is_read_of_a_source_is_one_line():
    source = {
        "name": "code",
        "source": "stdlib/3.11.7",
        "split": "train",
        "share": 0.75,
        "epochs": 1.25,
        "max_epochs": 4.0,
        "num_rows": 45_704,
        "fullness": 0.991,
        "num_cut": 12,
    }
    assert source_line(source) == (
        "code: stdlib/3.11.7, train: 75.0% of the examples, 1.25 epochs of at most 4 "
        "of 45,704 rows (99.1% full, 12 documents cut)"
    )
    unknown = {"name": "", "max_epochs": 0.0, "fullness": None}
    assert source_line(source | unknown) == (
        "stdlib/3.11.7, train: 75.0% of the examples, 1.25 epochs of 45,704 rows"
    )
