"""Moves the middle of a document to its end, where a decoder fills it in (Bavarian et al. 2022).

The pieces of a packed row are transformed, each as a text of its own. If whole documents were
transformed before packing, the cut at a row's end would tear middles from what surrounds them (the
paper, arXiv 2207.14255, calls the two "context level" and "document level").
"""

from typing import NamedTuple

import numpy as np

from moe.data.objectives.draws import random_words
from moe.data.packing.concat import unpack


class MiddleIds(NamedTuple):
    """Holds the ids of the tokens that stand before each part of a document, and of its end."""

    prefix: int
    suffix: int
    middle: int
    end: int


def prompt(prefix: np.ndarray, suffix: np.ndarray, ids: MiddleIds) -> np.ndarray:
    """Returns the tokens after which a model writes the middle of a document (section 3, "PSM")."""
    return np.concatenate([[ids.prefix], prefix, [ids.suffix], suffix, [ids.middle]])


def move_middles(
    row: dict[str, np.ndarray], key: tuple[int, ...], *, rate: float, ids: MiddleIds
) -> dict[str, np.ndarray]:
    """Returns a row in which each piece's middle is moved to its end with probability `rate`.

    The row stays as long as it is: a moved middle adds 3 tokens, and an end where the piece had
    none, so that as many tokens of the row's last pieces fall off. All tokens are targets, as in
    section 3 of the paper. The field `in_middle` says which targets are of a middle or its end.
    """
    length = len(row["tokens"])
    pieces = _pieces(row)
    words = random_words(key, 4 * len(pieces)).reshape(-1, 4)
    moved = [
        _move(piece, draw[1:], ids) if draw[0] < rate * 2.0**32 else (piece, len(piece))
        for piece, draw in zip(pieces, words, strict=True)
    ]
    if not moved:
        return row | {"in_middle": np.zeros(length, bool)}
    lengths = np.array([len(piece) for piece, _ in moved])
    starts = np.cumsum(lengths) - lengths
    in_middle = np.zeros(max(int(lengths.sum()), length + 1), bool)
    for start, (piece, first) in zip(starts, moved, strict=True):
        in_middle[start + first : start + len(piece)] = True
    lengths_in_row = np.clip(length + 1 - starts, 0, lengths)
    tokens = np.concatenate([piece for piece, _ in moved])[: length + 1]
    lengths_in_row = lengths_in_row[lengths_in_row > 0].astype(np.uint32)
    fields = unpack(tokens, lengths_in_row, length)
    return fields | {"in_middle": in_middle[1 : length + 1] & fields["loss_mask"]}


def _pieces(row: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the pieces of a row, the last one with the target after the row's last token."""
    num_tokens = int(np.count_nonzero(row["segment_ids"]))
    tokens, segment_ids = row["tokens"][:num_tokens], row["segment_ids"][:num_tokens]
    pieces = np.split(tokens, np.flatnonzero(np.diff(segment_ids)) + 1) if num_tokens else []
    if num_tokens and row["loss_mask"][num_tokens - 1]:
        pieces[-1] = np.append(pieces[-1], row["targets"][num_tokens - 1])
    return pieces


def _move(piece: np.ndarray, draws: np.ndarray, ids: MiddleIds) -> tuple[np.ndarray, int]:
    """Returns a piece with its middle at the end, and the index at which the middle begins.

    Two positions, of which any is as likely as any other, cut the text into prefix, middle and
    suffix. Half of the pieces have the order of section 3 ("PSM"), and half that of section 3.1
    ("SPM"), in the variant whose prefix follows the token before the middle.
    """
    # A document begins and ends with a boundary, which a piece lacks where the row cuts it.
    begin = int(piece[0] == ids.end)
    end = len(piece) - int(len(piece) > 1 and piece[-1] == ids.end)
    start, text = piece[:begin], piece[begin:end]
    first, second = sorted(int(draw) % (len(text) + 1) for draw in draws[1:])
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if draws[0] < 2**31:
        before = [start, prompt(prefix, suffix, ids)]
    else:
        before = [start, [ids.prefix, ids.suffix], suffix, [ids.middle], prefix]
    parts = [*before, middle, [ids.end]]
    return np.concatenate(parts).astype(piece.dtype), sum(len(part) for part in before)
