"""Hides spans of a row, which a decoder then writes (Raffel et al. 2020, section 3.1.4).

The encoder reads the row with a sentinel in the place of each span, and the decoder writes each
sentinel and the span that it stands for. A span lies within one document. The documents of a row
keep their segments: a segment of the decoder reads the same segment of the encoder.
"""

from typing import NamedTuple

import numpy as np

from moe.config.objectives import SpanCounts, span_counts
from moe.data.objectives.draws import random_parts, random_words


class _Piece(NamedTuple):
    """Holds what the encoder and the decoder have of one piece of a document."""

    segment: int
    inputs: np.ndarray
    targets: np.ndarray  # empty where nothing of the piece is hidden


def corrupt_spans(
    row: dict[str, np.ndarray],
    key: tuple[int, ...],
    *,
    counts: SpanCounts,
    sentinel_ids: np.ndarray,
    end_id: int,
) -> dict[str, np.ndarray]:
    """Returns the fields of encoder and decoder of a row of at most `counts.tokens` tokens.

    The encoder's have `counts.inputs` tokens, and the decoder's `counts.targets`. The decoder reads
    `end_id` and then its own targets, of which the last is `end_id`.
    """
    num_tokens = int(np.count_nonzero(row["segment_ids"]))
    tokens = row["tokens"][:num_tokens]
    segments, lengths = np.unique(row["segment_ids"][:num_tokens], return_counts=True)
    words = random_words(key, num_tokens)
    noise, spans = share_spans(lengths)
    pieces = []
    for index, start in enumerate(np.cumsum(lengths) - lengths):
        part = slice(start, start + lengths[index])
        is_noise = choose_spans(words[part], int(noise[index]), int(spans[index]))
        pieces.append(
            _Piece(int(segments[index]), *_hide(tokens[part], is_noise, sentinel_ids, end_id))
        )
    encoder = _fields([(piece.segment, piece.inputs) for piece in pieces], counts.inputs)
    decoder = _fields([(piece.segment, piece.targets) for piece in pieces], counts.targets)
    # The decoder reads the target before, and at the start of a segment the end of a text.
    before = np.concatenate([[end_id], decoder["tokens"][:-1]]).astype(np.int32)
    is_text = decoder["segment_ids"] > 0
    return {f"encoder_{name}": field for name, field in encoder.items()} | {
        "tokens": np.where(is_text, np.where(decoder["positions"] == 0, end_id, before), 0),
        "targets": decoder["tokens"],
        "loss_mask": is_text,
        "segment_ids": decoder["segment_ids"],
        "positions": decoder["positions"],
    }


def share_spans(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares the hidden tokens and spans of a row among its pieces of such lengths.

    Returns each piece's hidden tokens and spans. Every piece with a span has an end of its own in
    encoder and decoder, so a row has a span less for each such piece after the first: in this way
    the rows of encoder and decoder are never longer than those of one document. Pieces that are too
    short for half a span have none. Where a row has very many short pieces, its noise does not find
    room, and the encoder's row would be too long: its last tokens are left out.
    """
    noise, spans = np.zeros((2, len(lengths)), np.int64)
    row = span_counts(int(lengths.sum()))
    if not row.noise:
        return noise, spans
    longest = np.argsort(-lengths, kind="stable")
    longest = longest[lengths[longest] > 1]
    large = np.count_nonzero(2 * row.spans * lengths[longest] >= row.tokens)
    chosen = longest[: min(max(large, 1), (row.spans + 1) // 2)]
    own, ones = lengths[chosen], np.ones(len(chosen), np.int64)
    num_spans = row.spans + 1 - len(chosen)
    spans[chosen] = np.minimum(ones + _shares(num_spans - len(chosen), own), own // 2)
    hidden = spans[chosen] + _shares(max(row.noise - num_spans, 0), own)
    noise[chosen] = np.minimum(hidden, own - spans[chosen])
    return noise, spans


def _shares(total: int, weights: np.ndarray) -> np.ndarray:
    """Divides a whole number in proportion to weights, by the largest remainders."""
    if not len(weights):
        return np.zeros(0, np.int64)
    shares, remainders = np.divmod(total * weights, weights.sum())
    shares[np.argsort(-remainders, kind="stable")[: total - shares.sum()]] += 1
    return shares


def choose_spans(words: np.ndarray, noise: int, spans: int) -> np.ndarray:
    """Returns whether each token of a piece is hidden; at least one lies between two spans.

    Every division of the hidden tokens into spans, and of the others into the gaps before, between
    and after them, is equally likely. `words` holds a random number for each token.
    """
    if not spans:
        return np.zeros(len(words), bool)
    span_lengths = random_parts(words[: noise - 1], spans)
    # The gaps at the two ends may be empty: with a token more each, no gap is.
    gaps = random_parts(words[noise - 1 :], spans + 1)
    gaps[[0, -1]] -= 1
    runs = np.empty(2 * spans + 1, np.int64)
    runs[::2], runs[1::2] = gaps, span_lengths
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _hide(
    tokens: np.ndarray, is_noise: np.ndarray, sentinel_ids: np.ndarray, end_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a piece as the encoder reads it, and as the decoder writes what is hidden of it."""
    is_first = is_noise & ~np.concatenate([[False], is_noise[:-1]])
    num_spans = int(np.count_nonzero(is_first))
    if not num_spans:
        return tokens, tokens[:0]
    sentinels = sentinel_ids[:num_spans]
    inputs = tokens.copy()
    inputs[is_first] = sentinels
    starts = np.flatnonzero(is_first[is_noise])
    targets = np.insert(tokens[is_noise], starts, sentinels)
    return np.append(inputs[~is_noise | is_first], end_id), np.append(targets, end_id)


def _fields(pieces: list[tuple[int, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Lays pieces, each with its segment, end to end in a row of so many tokens."""
    tokens, segment_ids, positions = np.zeros((3, length), np.int32)
    start = 0
    for segment, piece in pieces:
        piece = piece[: length - start]
        part = slice(start, start + len(piece))
        tokens[part], segment_ids[part], positions[part] = piece, segment, np.arange(len(piece))
        start += len(piece)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
