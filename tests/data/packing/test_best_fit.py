"""Holds best-fit and pad packing against plain references, over documents of any lengths."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import DataConfig
from moe.data.packing import is_cut, pack
from moe.data.packing.best_fit import best_fit
from moe.data.packing.best_fit import pack as pack_best_fit
from moe.data.packing.concat import unpack
from moe.data.packing.cut import cut_document
from moe.data.packing.targets import mark_targets

lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)
# The token 1000 n + i is the i-th one of document n.
documents_of = lambda lengths: [
    np.arange(1000 * n, 1000 * n + length, dtype=np.uint32) for n, length in enumerate(lengths)
]
documents_strategy = st.lists(st.integers(2, 40), max_size=40).map(documents_of)


def quadratic_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Looks at every row for every piece."""
    rows: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        fitting = []
        for number, row in enumerate(rows):
            room = capacity - sum(lengths[other] for other in row)
            if room >= lengths[piece]:
                fitting.append((room, number))
        if fitting:
            rows[min(fitting)[1]].append(piece)
        else:
            rows.append([piece])
    return rows


@given(lengths_and_capacity)
def test_best_fit_is_that_of_a_plain_search(case: tuple[list[int], int]):
    lengths, capacity = case
    assert best_fit(np.array(lengths, np.int64), capacity) == quadratic_best_fit(lengths, capacity)


@pytest.mark.parametrize("capacity", [63, 64, 65, 4095, 4096, 4097, 300_000])
def test_rooms_of_every_size_are_found(capacity: int):
    lengths = np.random.default_rng(0).integers(1, capacity + 1, 80)
    assert best_fit(lengths, capacity) == quadratic_best_fit(lengths.tolist(), capacity)


def test_a_row_worked_out_by_hand():
    """The 7 leaves room for the 3 in a row of 10, the 6 for the first 4, and the other 4 for 2."""
    assert best_fit(np.array([4, 7, 3, 6, 4, 2]), 10) == [[1, 2], [3, 0], [4, 5]]


@pytest.mark.parametrize(
    ("length", "expected"), [(2, [2]), (9, [9]), (10, [9, 2]), (17, [9, 9]), (18, [9, 9, 2])]
)
def test_a_long_document_is_cut_into_full_rows_and_a_rest(length: int, expected: list[int]):
    pieces = list(cut_document(np.arange(length), 8))
    assert [len(piece) for piece in pieces] == expected
    assert [piece[0] for piece in pieces] == [8 * n for n in range(len(pieces))]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
@given(documents=documents_strategy, length=st.integers(1, 50))
def test_each_token_but_the_first_is_a_target_once(
    packing: str, documents: list[np.ndarray], length: int
):
    config = DataConfig(packing=packing, sequence_length=length)
    rows = [unpack(tokens, lengths, length) for tokens, lengths in pack(config, documents)]
    found = Counter(np.concatenate([row["targets"][row["loss_mask"]] for row in rows] or [[]]))
    assert found == Counter(token for document in documents for token in document[1:])
    # The number of documents whose targets are in more than one row is what `is_cut` counts.
    rows_of = Counter(
        document
        for row in rows
        for document in {token // 1000 for token in row["targets"][row["loss_mask"]].tolist()}
    )
    before = np.cumsum([0, *map(len, documents)]).tolist()
    cut = [
        is_cut(config, start, len(document))
        for start, document in zip(before, documents, strict=False)
    ]
    assert [rows_of[n] > 1 for n in range(len(documents))] == cut


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
@given(documents=documents_strategy, length=st.integers(1, 50))
def test_no_document_that_fits_is_cut(packing: str, documents: list[np.ndarray], length: int):
    config = DataConfig(packing=packing, sequence_length=length)
    rows = list(pack(config, documents))
    pieces = [
        piece.tolist()
        for tokens, lengths in rows
        for piece in np.split(tokens, np.cumsum(lengths)[:-1])
    ]
    for document in documents:
        if len(document) <= length + 1:
            assert pieces.count(document.tolist()) == 1
    assert all(len(tokens) == sum(lengths) <= length + 1 for tokens, lengths in rows)
    if packing == "pad":
        assert all(len(lengths) == 1 for _, lengths in rows)


@given(documents_strategy)
def test_rows_are_in_the_order_of_their_first_pieces(documents: list[np.ndarray]):
    rows = [tokens.tolist() for tokens, _ in pack_best_fit(documents, 20)]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_windows_are_packed_one_by_one():
    documents = documents_of([5, 6, 5, 6, 7])
    rows = [tokens.tolist() for tokens, _ in pack_best_fit(documents, 20, window_tokens=11)]
    expected = [
        tokens.tolist()
        for window in (documents[:2], documents[2:4], documents[4:])
        for tokens, _ in pack_best_fit(window, 20)
    ]
    assert rows == expected and len(rows) == 3


def test_marks_of_targets_go_with_their_tokens():
    marked = [mark_targets(document, document % 2 == 0) for document in documents_of([5, 30, 9])]
    for packing in ("best_fit", "pad"):
        config = DataConfig(packing=packing, sequence_length=16)
        for tokens, lengths in pack(config, marked):
            row = unpack(tokens, lengths, 16)
            assert all(row["targets"][row["loss_mask"]] % 2 == 0) and row["loss_mask"].any()
