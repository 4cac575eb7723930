"""Span corruption against published counts, and by putting the hidden spans back."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ConfigError
from moe.config.objectives import MAX_SENTINELS, corrupted_row, span_counts
from moe.data.objectives.draws import random_words
from moe.data.objectives.span_corruption import choose_spans, corrupt_spans, share_spans
from tests.data.objectives.rows import BOUNDARY, numbered, row_of

SENTINEL_IDS = np.arange(256, 256 + MAX_SENTINELS, dtype=np.int32)


def corrupt(row, inputs, key=(0, 0)):
    counts = corrupted_row(inputs)
    return corrupt_spans(row, key, counts=counts, sentinel_ids=SENTINEL_IDS, end_id=BOUNDARY)


# T5's own row (Raffel et al. 2020), the longer one of its 1.1 models, and one of 2,048 would need
# 114 sentinels. LongT5's 4,096 come with 910 targets (Guo et al. 2022).
@pytest.mark.parametrize(("inputs", "tokens", "targets"), [(512, 568, 114), (1024, 1137, 229)])
def test_lengths_equal_the_published_ones(inputs, tokens, targets):
    counts = corrupted_row(inputs)
    assert (counts.inputs, counts.tokens, counts.targets) == (inputs, tokens, targets)
    fields = corrupt(numbered([tokens + 1], tokens), inputs)
    assert fields["encoder_tokens"].shape == (inputs,) and fields["targets"].shape == (targets,)
    assert np.count_nonzero(fields["encoder_segment_ids"]) == inputs
    assert np.count_nonzero(fields["loss_mask"]) == targets


def test_lengths_equal_those_of_long_rows():
    assert span_counts(4550)[:2] == (4550, 682) and span_counts(4550).inputs == 4096
    assert span_counts(4550).targets == 910


def test_every_length_is_reached_and_more_tokens_would_be_too_many():
    for inputs in range(3, 1700):
        counts = corrupted_row(inputs)
        assert counts.inputs == inputs
        assert span_counts(counts.tokens + 1).inputs == inputs + 1


def test_a_row_that_needs_more_sentinels_is_refused():
    with pytest.raises(ConfigError, match="needs 105 sentinels") as error:
        corrupted_row(1900)
    longest = int(str(error.value).split()[-1])
    assert corrupted_row(longest).spans == MAX_SENTINELS
    with pytest.raises(ConfigError, match=f"set data.sequence_length to at most {longest}$"):
        corrupted_row(longest + 1)
    with pytest.raises(ConfigError, match="sentinels"):
        corrupted_row(2**24)  # at once
    with pytest.raises(ConfigError, match="has no room"):
        corrupted_row(2)


def test_a_hand_worked_row():
    """Of 10 tokens a span of 2 is hidden, and the encoder reads 8, a sentinel and an end."""
    fields = corrupt(row_of([[*range(10, 21)]], 10), 10, key=(1, 2))
    (place,) = np.flatnonzero(fields["encoder_tokens"] == 256)
    hidden = [10 + place, 11 + place]
    shown = [*range(10, 10 + place), 256, *range(12 + place, 20)]
    assert fields["encoder_tokens"].tolist() == [*shown, BOUNDARY]
    assert fields["targets"].tolist() == [256, *hidden, BOUNDARY]
    assert fields["tokens"].tolist() == [BOUNDARY, 256, *hidden]
    assert fields["loss_mask"].all() and fields["positions"].tolist() == [0, 1, 2, 3]
    assert fields["encoder_positions"].tolist() == list(range(10))


def restored(fields, segment):
    """Returns a segment's text, with the decoder's spans in the places of their sentinels."""
    inputs = fields["encoder_tokens"][fields["encoder_segment_ids"] == segment].tolist()
    targets = fields["targets"][fields["segment_ids"] == segment].tolist()
    if not targets:
        return inputs
    assert inputs.pop() == targets.pop() == BOUNDARY
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in SENTINEL_IDS:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    # The sentinels of a piece are the first ones, in order, and every one stands for some token.
    assert list(spans) == SENTINEL_IDS[: len(spans)].tolist() and all(spans.values())
    assert [token for token in inputs if token in SENTINEL_IDS] == list(spans)
    # No two spans touch, or they would be one.
    assert not any(a in spans and b in spans for a, b in itertools.pairwise(inputs))
    return [part for token in inputs for part in spans.get(token, [token])]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.integers(20, 600),
    st.integers(0, 2**40),
)
def test_the_spans_put_back_give_the_text_of_each_document(lengths, inputs, example):
    """Nothing crosses documents, and all of a row is there, but where very many pieces are short.

    A row of at most 8 tokens a piece may lose its end, as `share_spans` says.
    """
    counts = corrupted_row(inputs)
    row = numbered(lengths, counts.tokens)
    fields = corrupt(row, inputs, key=(5, example))
    num_tokens = np.count_nonzero(row["segment_ids"])
    num_pieces = row["segment_ids"].max()
    is_whole = num_tokens >= 8 * num_pieces
    for segment in range(1, num_pieces + 1):
        text = row["tokens"][row["segment_ids"] == segment].tolist()
        if is_whole:
            assert restored(fields, segment) == text
    for prefix in ("", "encoder_"):
        segment_ids, positions = fields[f"{prefix}segment_ids"], fields[f"{prefix}positions"]
        for segment in set(segment_ids.tolist()) - {0}:
            assert positions[segment_ids == segment].tolist() == list(
                range(np.count_nonzero(segment_ids == segment))
            )
    assert (fields["loss_mask"] == (fields["segment_ids"] > 0)).all()
    before = np.where(fields["positions"] == 0, BOUNDARY, np.roll(fields["targets"], 1))
    assert (fields["tokens"] == np.where(fields["loss_mask"], before, 0)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=60))
def test_what_pieces_share_fits_the_rows_of_one_document(lengths):
    lengths = np.array(lengths)
    noise, spans = share_spans(lengths)
    row = span_counts(int(lengths.sum()))
    assert ((noise >= spans) & (lengths - noise >= spans)).all() and (noise[spans == 0] == 0).all()
    assert noise.sum() + spans.sum() + np.count_nonzero(spans) <= row.targets
    if lengths.sum() >= 8 * len(lengths):
        num_pieces = np.count_nonzero(spans)
        assert spans.sum() + num_pieces == row.spans + 1 or row.spans == 0
        assert noise.sum() == row.noise


def test_a_few_documents_hide_as_much_as_one():
    noise, spans = share_spans(np.array([400, 160, 8]))
    assert noise.sum() == 85 and spans.sum() == 27 and spans[2] == 0
    np.testing.assert_allclose(noise / [400, 160, 8], [0.15, 0.15, 0], atol=0.01)


def test_every_choice_of_spans_is_equally_likely():
    """Two spans of three hidden tokens among six: 2 divisions times 4 of the three others."""
    counts: dict[bytes, int] = {}
    for number in range(8000):
        is_noise = choose_spans(random_words((1, number), 6), 3, 2)
        assert is_noise.sum() == 3
        counts[is_noise.tobytes()] = counts.get(is_noise.tobytes(), 0) + 1
    # The gaps (a, b, c) of 3 tokens with b at least 1: 6 of them.
    assert len(counts) == 12
    np.testing.assert_allclose(list(counts.values()), 8000 / 12, rtol=0.15)


def test_a_row_of_padding_has_no_targets():
    empty = {name: np.zeros_like(field) for name, field in numbered([9], 9).items()}
    fields = corrupt(empty, 10)
    assert not any(field.any() for field in fields.values())
