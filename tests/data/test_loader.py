import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.loader import evaluation_batches, make_loader
from moe.data.mixtures import TrainingRows, make_mixture, row_of_example
from moe.data.prepare import PreparedRows
from moe.data.rows import JoinedRows

EVERYTHING = slice(None)


@pytest.fixture(scope="module")
def few(rows: PreparedRows) -> PreparedRows:
    """The first 11 rows: an epoch is no multiple of any batch below."""
    return dataclasses.replace(rows, num_rows=11)


def alone(rows: PreparedRows, seed: int = 0) -> TrainingRows:
    """The rows as the only source of a run."""
    return TrainingRows(JoinedRows({"": rows}), make_mixture(DataConfig(), seed))


def take(batches: Iterator[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The first batches, one after the other."""
    taken = list(itertools.islice(batches, count))
    batches.close()
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def train(
    rows: PreparedRows,
    count: int,
    batch_size: int = 4,
    seed: int = 0,
    examples: int = 0,
    host_rows=EVERYTHING,
) -> dict:
    return take(
        make_loader(
            alone(rows, seed), batch_size=batch_size, examples=examples, host_rows=host_rows
        ),
        count,
    )


def row_numbers(rows: PreparedRows, tokens_BT: np.ndarray) -> list[int]:
    number = {rows[i]["tokens"].tobytes(): i for i in range(len(rows))}
    assert len(number) == len(rows)
    return [number[tokens_T.tobytes()] for tokens_T in tokens_BT]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_fields_and_shapes(rows: PreparedRows):
    batch = train(rows, 1)
    assert {name: (field.shape, field.dtype.name) for name, field in batch.items()} == {
        "tokens": ((4, 8), "int32"),
        "targets": ((4, 8), "int32"),
        "loss_mask": ((4, 8), "bool"),
        "segment_ids": ((4, 8), "int32"),
        "positions": ((4, 8), "int32"),
    }
    for name, field in rows[row_of_example(2, len(rows), seed=0)].items():
        np.testing.assert_array_equal(batch[name][2], field)


def test_the_stream_never_changes():
    order_0 = [5, 8, 9, 7, 4, 2, 1, 0, 3, 6, 10]
    order_1 = [1, 2, 4, 5, 9, 7, 10, 6, 0, 3, 8]
    # Runs that were started with an older version must go on with the same rows.
    assert [row_of_example(example, 11, seed=0) for example in range(22)] == [*order_0, *order_1]


def test_every_row_once_an_epoch_in_another_order_in_each(few: PreparedRows):
    order = row_numbers(few, train(few, 11)["tokens"])
    epochs = [order[:11], order[11:22], order[22:33], order[33:44]]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_seed_gives_its_own_orders():
    orders = {
        tuple(row_of_example(epoch * 50 + i, 50, seed) for i in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("num_rows", [1, 2, 3, 1000])
def test_a_corpus_of_any_size_is_permuted(num_rows: int):
    assert sorted(row_of_example(i, num_rows, seed=3) for i in range(num_rows)) == list(
        range(num_rows)
    )


@pytest.mark.parametrize(
    "hosts",
    [
        [slice(0, 2), slice(2, 4)],
        [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)],
        [np.array([0, 3]), np.array([1, 2])],
        [np.array([2]), np.array([3, 0, 1])],
    ],
)
def test_hosts_together_read_the_batches_of_one(few: PreparedRows, hosts: list[slice | np.ndarray]):
    whole = train(few, 5, seed=7)
    assembled = {name: np.full_like(field, -1) for name, field in whole.items()}
    for host in hosts:
        part = train(few, 5, seed=7, host_rows=host)
        for name, field in part.items():
            assembled[name].reshape(5, 4, -1)[:, host] = field.reshape(5, -1, 8)
    assert_same(assembled, whole)


@pytest.mark.parametrize("examples", [4, 8, 12, 44])
def test_starting_later_is_skipping(few: PreparedRows, examples: int):
    whole = train(few, 14)
    assert_same(
        train(few, 3, examples=examples),
        {name: field[examples : examples + 12] for name, field in whole.items()},
    )


def test_a_stream_goes_beyond_32_bits(few: PreparedRows):
    examples = 2**32 - 2
    order = row_numbers(few, train(few, 1, examples=examples)["tokens"])
    assert order == [row_of_example(examples + i, 11, seed=0) for i in range(4)]


def test_a_changed_batch_size_repeats_nothing(few: PreparedRows):
    pieces = [
        train(few, 2, batch_size=2),
        train(few, 1, batch_size=5, examples=4),
        train(few, 2, batch_size=1, examples=9),
    ]
    order = row_numbers(few, np.concatenate([piece["tokens"] for piece in pieces]))
    assert sorted(order) == list(range(11))
    assert order == [row_of_example(example, 11, seed=0) for example in range(11)]


def test_a_batch_may_be_larger_than_an_epoch(few: PreparedRows):
    order = row_numbers(few, train(few, 1, batch_size=25)["tokens"])
    assert order == [row_of_example(example, 11, seed=0) for example in range(25)]


def test_evaluation_is_in_order_and_fills_up_the_last_batch(few: PreparedRows):
    batches = take(evaluation_batches(few, batch_size=4, num_batches=0, host_rows=EVERYTHING), 99)
    assert batches["tokens"].shape == (12, 8)
    assert row_numbers(few, batches["tokens"][:11]) == list(range(11))
    assert not any(
        batches[name][11].any()
        for name in ("loss_mask", "segment_ids", "tokens", "targets", "positions")
    )


@pytest.mark.parametrize(("num_batches", "expected"), [(0, 12), (1, 4), (2, 8), (3, 12), (4, 12)])
def test_evaluation_on_some_batches(few: PreparedRows, num_batches: int, expected: int):
    batches = take(
        evaluation_batches(few, batch_size=4, num_batches=num_batches, host_rows=EVERYTHING), 99
    )
    assert len(batches["tokens"]) == expected


def test_every_host_evaluates_equally_many_batches(few: PreparedRows):
    host = take(evaluation_batches(few, batch_size=4, num_batches=0, host_rows=slice(3, 4)), 99)
    assert row_numbers(few, host["tokens"][:2]) == [3, 7]
    assert host["loss_mask"].sum(axis=1).tolist()[2] == 0
    assert len(host["tokens"]) == 3


def reading_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain")}


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_no_thread_outlives_its_iterator(few: PreparedRows, end: str):
    before = reading_threads()
    batches = make_loader(alone(few), batch_size=4, examples=0, host_rows=EVERYTHING)
    next(batches)
    started = reading_threads() - before
    assert started
    if end == "close":
        batches.close()
    del batches
    gc.collect()
    deadline = time.monotonic() + 100
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


def test_batches_are_read_ahead(few: PreparedRows, monkeypatch: pytest.MonkeyPatch):
    read = threading.Event()
    monkeypatch.setattr(PreparedRows, "__getitem__", lambda rows, index: read.set() or {})
    batches = make_loader(alone(few), batch_size=4, examples=0, host_rows=EVERYTHING)
    assert read.wait(100)
    batches.close()


def test_an_error_in_a_reading_thread_reaches_the_consumer(
    rows: PreparedRows, monkeypatch: pytest.MonkeyPatch
):
    def fail(rows: PreparedRows, index: int) -> dict:
        raise OSError("rows-00000.array_record is damaged")

    monkeypatch.setattr(PreparedRows, "__getitem__", fail)
    batches = make_loader(alone(rows), batch_size=4, examples=0, host_rows=EVERYTHING)
    with pytest.raises(OSError, match=r"rows-00000\.array_record is damaged"):
        next(batches)
    batches.close()


def with_key(row: dict[str, np.ndarray], key: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A transform that shows which row it was given, and with which key."""
    return {"tokens": row["tokens"], "key": np.array(key) + 1}


def test_a_transform_gets_the_rows_and_the_numbers_of_their_examples(few: PreparedRows):
    """Each epoch draws anew, and a host's part of a batch has the keys of the whole batch."""
    plain = train(few, 6, examples=3, seed=7)
    options = {"batch_size": 4, "examples": 3, "transform": with_key}
    batch = take(make_loader(alone(few, seed=7), host_rows=EVERYTHING, **options), 6)
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    assert batch["key"].tolist() == [[8, number + 1] for number in range(3, 27)]
    part = take(make_loader(alone(few, seed=7), host_rows=np.array([1, 3]), **options), 6)
    np.testing.assert_array_equal(
        part["key"], batch["key"].reshape(6, 4, 2)[:, [1, 3]].reshape(12, 2)
    )


def test_an_evaluation_draws_by_the_number_of_the_row(few: PreparedRows):
    options = {"batch_size": 4, "num_batches": 0, "host_rows": EVERYTHING, "transform": with_key}
    keys = take(evaluation_batches(few, **options), 99)["key"]
    assert keys.tolist() == [[1, number + 1] for number in range(11)] + [[0, 0]]
