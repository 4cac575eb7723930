"""Concat packing: documents end to end, cut into rows; no token is dropped, and each is predicted
once.

A row holds T + 1 tokens for T = sequence_length: T inputs, and their targets one further. The next
row starts with the last token of this one, which so far was only a target. A document cut by the
edge starts there as a new piece, at position 0.
"""

from collections.abc import Iterable, Iterator

import numpy as np


def pack(
    documents: Iterable[np.ndarray], sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of a stream of documents, as (tokens, lengths of the pieces, uint32).

    Every row but the last has sequence_length + 1 tokens. S tokens make ceil((S - 1) /
    sequence_length) rows.
    """
    pieces: list[np.ndarray] = []
    room = sequence_length + 1
    for document in documents:
        start = 0
        while start < len(document):
            pieces.append(document[start : start + room])
            start += len(pieces[-1])
            room -= len(pieces[-1])
            if room == 0:
                yield _row(pieces)
                pieces, room = [], sequence_length + 1
                # the last target is the next row's first input, even where the document ends with
                # it
                start -= 1
    if room < sequence_length:  # a single token has nothing to predict
        yield _row(pieces)


def _row(pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces], np.uint32)


def unpack(tokens: np.ndarray, lengths: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
    """One row's fields of a batch, each [sequence_length].

    tokens, targets: int32, 0 on padding. loss_mask: bool, False on padding and where the target
    belongs to another document. segment_ids: int32, 1, 2, ... per piece, 0 on padding. positions:
    int32, from 0 in each piece, 0 on padding.
    """
    lengths = lengths.astype(np.int64)
    row, segment_ids, positions = np.zeros((3, sequence_length + 1), np.int32)
    row[: len(tokens)] = tokens
    segment_ids[: len(tokens)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions[: len(tokens)] = np.arange(len(tokens)) - np.repeat(
        np.cumsum(lengths) - lengths, lengths
    )
    return {
        "tokens": row[:-1],
        "targets": row[1:],
        "loss_mask": (segment_ids[:-1] == segment_ids[1:]) & (segment_ids[1:] > 0),
        "segment_ids": segment_ids[:-1],
        "positions": positions[:-1],
    }
