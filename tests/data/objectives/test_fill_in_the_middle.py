"""Fill in the middle: the order of the parts, what is a target, and what falls off a row's end."""

import numpy as np
import pytest

from moe.data.objectives.fill_in_the_middle import MiddleIds, move_middles, prompt
from tests.data.objectives.rows import BOUNDARY, row_of

PREFIX, SUFFIX, MIDDLE = 256, 257, 258
IDS = MiddleIds(PREFIX, SUFFIX, MIDDLE, BOUNDARY)


def parts(tokens: list[int]) -> tuple[list[int], list[int], list[int], bool]:
    """Returns prefix, suffix and middle of a moved piece, and whether it is in SPM order."""
    assert tokens[0] == PREFIX and tokens[-1] == BOUNDARY
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    if suffix == 1:  # SPM: prefix and middle follow one another
        return tokens[middle + 1 : -1], tokens[2:middle], [], True
    return tokens[1:suffix], tokens[suffix + 1 : middle], tokens[middle + 1 : -1], False


def test_a_moved_document_by_hand():
    text = list(range(1, 31))
    row = row_of([[BOUNDARY, *text, BOUNDARY]], 60)
    orders, cuts = [], []
    for number in range(400):
        fields = move_middles(row, (0, number), rate=1.0, ids=IDS)
        tokens = fields["tokens"][fields["segment_ids"] == 1].tolist()
        assert tokens[0] == BOUNDARY and len(tokens) == 35
        in_middle = fields["in_middle"]
        prefix, suffix, middle, is_spm = parts(tokens[1:])
        if is_spm:
            middle = prefix[len(text) - len(suffix) - (in_middle.sum() - 1 - len(prefix)) :]
            middle = fields["targets"][in_middle].tolist()[:-1]
            prefix = prefix[: len(prefix) - len(middle)]
        assert prefix + middle + suffix == text
        assert fields["targets"][in_middle].tolist() == [*middle, BOUNDARY]
        # All tokens but the first are targets, whatever part they are of.
        assert fields["loss_mask"].sum() == 34
        assert fields["targets"][:34].tolist() == tokens[1:]
        orders.append(is_spm)
        cuts.append((len(prefix), len(prefix) + len(middle)))
    assert 0.42 < np.mean(orders) < 0.58
    # The two cuts are uniform over the 31 places, so their mean is 15 and their distance 10.
    np.testing.assert_allclose(np.mean(cuts), 15, atol=1)
    np.testing.assert_allclose(np.mean(np.diff(cuts)), 10.3, atol=1.2)


@pytest.mark.parametrize("rate", [0.0001, 0.5, 0.9, 1.0])
def test_the_rate_is_the_share_of_moved_documents(rate):
    row = row_of([[BOUNDARY, 1, 2, BOUNDARY]] * 20, 200)
    moved = [
        np.count_nonzero(move_middles(row, (1, n), rate=rate, ids=IDS)["tokens"] == MIDDLE)
        for n in range(100)
    ]
    np.testing.assert_allclose(np.sum(moved) / 2000, rate, atol=0.03)


def test_a_row_without_a_moved_document_stays_as_it_is():
    row = row_of([[BOUNDARY, 1, 2, BOUNDARY], [BOUNDARY, *range(12)]], 16)
    fields = move_middles(row, (0, 0), rate=1e-9, ids=IDS)
    assert not fields.pop("in_middle").any()
    assert fields.keys() == row.keys()
    for name in row:
        np.testing.assert_array_equal(fields[name], row[name])


def test_what_falls_off_the_end_of_a_row():
    """A full row of two documents gets 3 tokens more for each, and an end for the second."""
    first, second = [BOUNDARY, *range(10), BOUNDARY], [BOUNDARY, *range(100, 120)]
    row = row_of([first, second], 32)  # 33 tokens, of which the last is a target alone
    fields = move_middles(row, (0, 0), rate=1.0, ids=IDS)
    tokens = np.append(fields["tokens"], fields["targets"][-1])
    assert len(tokens) == 33 and (fields["segment_ids"] > 0).all()
    assert np.count_nonzero(fields["segment_ids"] == 1) == len(first) + 3
    # The second has 33 - 15 tokens of the 21 + 4, so that 7 fall off.
    assert (tokens[15:] >= 100).all() and np.count_nonzero(fields["segment_ids"] == 2) == 17
    assert fields["positions"][15] == 0


def test_pieces_that_fall_off_whole_are_no_segments():
    row = row_of([[BOUNDARY, 1, BOUNDARY]] * 5 + [[BOUNDARY, 3]], 16)
    fields = move_middles(row, (0, 0), rate=1.0, ids=IDS)
    assert set(fields["segment_ids"].tolist()) == {1, 2, 3}
    assert fields["loss_mask"].sum() == 16 - 2


def test_padding_stays_padding():
    row = {name: np.zeros_like(field) for name, field in row_of([[1, 2]], 8).items()}
    assert not any(field.any() for field in move_middles(row, (0, 0), rate=1.0, ids=IDS).values())


def test_a_prompt_is_what_a_middle_is_trained_to_follow():
    assert prompt(np.array([1, 2]), np.array([3]), IDS).tolist() == [
        PREFIX,
        1,
        2,
        SUFFIX,
        3,
        MIDDLE,
    ]
