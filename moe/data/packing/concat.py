"""Concat packing lays documents end to end and cuts them into rows, and drops no token.

A row holds T + 1 tokens for T = sequence_length: T inputs, and a target for each, which is the
token after it. The last token of a row is only a target there, so the next row starts with the
same token as an input. In this way each token but a document's first is a target exactly once. A
document that the end of a row cuts goes on in the next row as a new piece, at position 0.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from moe.data.packing.targets import split_targets


def pack(
    documents: Iterable[np.ndarray], sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of a stream of documents, as (tokens, lengths of the pieces as uint32).

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
                # The row's last target is the next row's first input. That holds even where the
                # document ends with it, so the loop then runs once more for this one token.
                start -= 1
    if room < sequence_length:  # a single token has nothing to predict
        yield _row(pieces)


def _row(pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces], np.uint32)


def unpack(tokens: np.ndarray, lengths: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
    """Returns the fields that one packed row has in a batch, each [sequence_length].

    - tokens, targets: int32, 0 on padding.
    - loss_mask: bool, False on padding, where the target belongs to another document, and where
      the tokens carry marks that say that it is none.
    - segment_ids: int32, 1 for the row's first piece, 2 for its second, and so on; 0 on padding.
    - positions: int32, counted from 0 in each piece; 0 on padding.
    """
    lengths = lengths.astype(np.int64)
    tokens, is_target = split_targets(tokens)
    row, segment_ids, positions = np.zeros((3, sequence_length + 1), np.int32)
    row[: len(tokens)] = tokens
    segment_ids[: len(tokens)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    first_positions = np.cumsum(lengths) - lengths  # where each piece begins in the row
    positions[: len(tokens)] = np.arange(len(tokens)) - np.repeat(first_positions, lengths)
    loss_mask = (segment_ids[:-1] == segment_ids[1:]) & (segment_ids[1:] > 0)
    if is_target is not None:
        loss_mask &= np.pad(is_target, (0, sequence_length + 1 - len(tokens)))[1:]
    return {
        "tokens": row[:-1],
        "targets": row[1:],
        "loss_mask": loss_mask,
        "segment_ids": segment_ids[:-1],
        "positions": positions[:-1],
    }
