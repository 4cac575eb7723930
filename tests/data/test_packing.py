"""Rows of 4 positions (T = 4, so 5 tokens), worked out by hand."""

import numpy as np
import pytest

from moe.data.packing import pack, unpack


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
    # 5 was only a target; as an input it predicts 6, which is another document's and so is masked.
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


def test_field_types():
    fields = unpack(np.array([1, 2], np.uint16), np.array([2], np.uint32), 4)
    assert {name: field.dtype.name for name, field in fields.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "bool",
        "segment_ids": "int32",
        "positions": "int32",
    }


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 64])
def test_every_token_but_a_documents_first_is_predicted_once_from_the_one_before(
    sequence_length: int,
):
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 12, size=40))
    documents = [
        np.arange(start, end, dtype=np.uint16)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    predicted = []
    for tokens, lengths in pack(documents, sequence_length):
        fields = unpack(tokens, lengths, sequence_length)
        mask = fields["loss_mask"]
        assert (fields["targets"][mask] == fields["tokens"][mask] + 1).all()
        predicted += fields["targets"][mask].tolist()
    assert predicted == [token for document in documents for token in document[1:]]
