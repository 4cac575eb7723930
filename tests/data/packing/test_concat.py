"""Rows of 4 positions (T = 4, so 5 tokens), worked out by hand, and what holds of all rows."""

import math
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data.packing.concat import pack, unpack
from moe.data.packing.targets import mark_targets


def packed(
    documents: list[list[int]], sequence_length: int = 4
) -> list[tuple[list[int], list[int]]]:
    rows = pack([np.array(document, np.uint16) for document in documents], sequence_length)
    return [(tokens.tolist(), lengths.tolist()) for tokens, lengths in rows]


def unpacked(tokens: list[int], lengths: list[int], sequence_length: int = 4) -> dict[str, list]:
    fields = unpack(np.array(tokens, np.uint16), np.array(lengths, np.uint32), sequence_length)
    return {name: field.tolist() for name, field in fields.items()}


def test_rows_advance_by_t_and_repeat_one_token():
    assert packed([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]) == [
        ([1, 2, 3, 4, 5], [3, 2]),
        ([5, 6, 7, 8, 9], [5]),
        ([9, 10], [2]),
    ]


def test_a_document_that_ends_with_the_row_leaves_its_last_token_in_the_next():
    # 5 was only a target. As an input it would predict 6, which begins another document: masked.
    assert packed([[1, 2, 3, 4, 5], [6, 7]]) == [([1, 2, 3, 4, 5], [5]), ([5, 6, 7], [1, 2])]


def test_a_document_that_starts_as_the_rows_last_target_is_whole_in_the_next():
    assert packed([[1, 2, 3, 4], [5, 6, 7]]) == [([1, 2, 3, 4, 5], [4, 1]), ([5, 6, 7], [3])]


def test_no_row_is_made_for_a_token_that_has_nothing_to_predict():
    assert packed([[1, 2, 3, 4, 5]]) == [([1, 2, 3, 4, 5], [5])]
    assert packed([[1]]) == []
    assert packed([]) == []
    assert packed([[1], [2]]) == [([1, 2], [1, 1])]


def test_documents_without_tokens_leave_no_trace():
    assert packed([[], [1, 2], [], [3, 4], []]) == [([1, 2, 3, 4], [2, 2])]


def test_rows_of_one_position():
    assert packed([[1, 2], [3]], sequence_length=1) == [([1, 2], [2]), ([2, 3], [1, 1])]


def test_fields_of_a_full_row():
    assert unpacked([1, 2, 3, 4, 5], [3, 2]) == {
        "tokens": [1, 2, 3, 4],
        "targets": [2, 3, 4, 5],
        "loss_mask": [True, True, False, True],
        "segment_ids": [1, 1, 1, 2],
        "positions": [0, 1, 2, 0],
    }


def test_fields_where_the_last_target_starts_a_document():
    fields = unpacked([1, 2, 3, 4, 5], [4, 1])
    assert fields["targets"] == [2, 3, 4, 5]
    assert fields["loss_mask"] == [True, True, True, False]
    assert fields["segment_ids"] == [1, 1, 1, 1]
    assert fields["positions"] == [0, 1, 2, 3]


def test_fields_where_the_first_token_ends_a_document():
    fields = unpacked([5, 6, 7, 8, 9], [1, 4])
    assert fields["loss_mask"] == [False, True, True, True]
    assert fields["segment_ids"] == [1, 2, 2, 2]
    assert fields["positions"] == [0, 0, 1, 2]


def test_fields_of_a_padded_row():
    assert unpacked([9, 10, 11], [1, 2]) == {
        "tokens": [9, 10, 11, 0],
        "targets": [10, 11, 0, 0],
        "loss_mask": [False, True, False, False],
        "segment_ids": [1, 2, 2, 0],
        "positions": [0, 0, 1, 0],
    }


def test_fields_of_a_row_of_padding():
    zeros = [0, 0, 0, 0]
    expected = {
        "tokens": zeros,
        "targets": zeros,
        "loss_mask": [False] * 4,
        "segment_ids": zeros,
        "positions": zeros,
    }
    assert unpacked([], []) == expected


def test_marked_tokens_alone_are_targets():
    """The mark is the target's own: a marked token after an unmarked one is predicted."""
    document = mark_targets(np.arange(1, 7), np.array([0, 0, 1, 1, 0, 1], bool))
    rows = list(pack([document, document[:2]], 4))
    assert [tokens["token"].tolist() for tokens, _ in rows] == [[1, 2, 3, 4, 5], [5, 6, 1, 2]]
    masks = [unpack(*row, 4)["loss_mask"].tolist() for row in rows]
    assert masks == [[False, True, True, False], [True, False, False, False]]


def test_field_types():
    fields = unpack(np.array([1, 2], np.uint16), np.array([2], np.uint32), 4)
    assert {name: field.dtype.name for name, field in fields.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "bool",
        "segment_ids": "int32",
        "positions": "int32",
    }


@st.composite
def streams(draw: st.DrawFn) -> list[np.ndarray]:
    """Draws documents, some of them empty, in which every token is a number of its own."""
    lengths = draw(st.lists(st.integers(0, 12), max_size=12))
    ends = np.cumsum([0, *lengths])
    return [np.arange(*start_and_end, dtype=np.uint16) for start_and_end in pairwise(ends)]


# The same examples in every run, and no limit to the time of one: a busy machine is slow.
in_every_run_the_same = settings(derandomize=True, deadline=None, max_examples=200)


@in_every_run_the_same
@given(documents=streams(), sequence_length=st.integers(1, 9))
def test_rows_are_full_and_as_many_as_the_tokens_need(
    documents: list[np.ndarray], sequence_length: int
):
    rows = list(pack(documents, sequence_length))
    num_tokens = sum(map(len, documents))
    assert len(rows) == max(0, math.ceil((num_tokens - 1) / sequence_length))
    assert all(len(tokens) == sequence_length + 1 for tokens, _ in rows[:-1])
    assert all(2 <= len(tokens) == lengths.sum() for tokens, lengths in rows)


@in_every_run_the_same
@given(documents=streams(), sequence_length=st.integers(1, 9))
def test_every_token_but_a_documents_first_is_a_target_once_after_the_one_before_it(
    documents: list[np.ndarray], sequence_length: int
):
    targets = []
    for row in pack(documents, sequence_length):
        fields = unpack(*row, sequence_length)
        mask = fields["loss_mask"]
        # Tokens are numbered, so the token before a target is one less.
        assert (fields["targets"][mask] == fields["tokens"][mask] + 1).all()
        targets += fields["targets"][mask].tolist()
    assert targets == [token for document in documents for token in document[1:]]


@in_every_run_the_same
@given(documents=streams(), sequence_length=st.integers(1, 9))
def test_a_segment_is_a_piece_of_one_document_and_its_positions_count_from_0(
    documents: list[np.ndarray], sequence_length: int
):
    document_of_token = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for row in pack(documents, sequence_length):
        fields = unpack(*row, sequence_length)
        num_real = np.count_nonzero(fields["segment_ids"])
        assert not fields["segment_ids"][num_real:].any()
        assert not fields["positions"][num_real:].any()
        tokens, segment_ids, positions = (
            fields[name][:num_real] for name in ("tokens", "segment_ids", "positions")
        )

        # Segments are numbered from 1, and a new one starts where the document changes.
        starts = np.diff(document_of_token[tokens], prepend=-1) != 0
        np.testing.assert_array_equal(segment_ids, np.cumsum(starts))

        # Tokens are numbered, so a token's distance to the first of its segment is its position.
        first_token_of_segment = tokens[starts][segment_ids - 1]
        np.testing.assert_array_equal(positions, tokens - first_token_of_segment)
