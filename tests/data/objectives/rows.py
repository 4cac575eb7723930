"""Makes prepared rows by hand, in which a token says which piece it is of and where it stands."""

import numpy as np

from moe.data.packing.concat import unpack

BOUNDARY = 255


def row_of(pieces: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """Returns the fields of a row of `length` that begins with these pieces."""
    tokens = np.concatenate([np.array(piece, np.int32) for piece in pieces])
    return unpack(tokens, np.array([len(piece) for piece in pieces], np.uint32), length)


def numbered(lengths: list[int], length: int) -> dict[str, np.ndarray]:
    """Returns a row of pieces whose tokens are 1000, 1001, ..., then 2000, 2001, and so on.

    Of the pieces it holds as many as there is room for, of which the last one may be cut.
    """
    pieces = [[1000 * (i + 1) + n for n in range(size)] for i, size in enumerate(lengths)]
    room = length + 1
    kept = []
    for piece in pieces:
        kept.append(piece[:room])
        room -= len(kept[-1])
    return row_of([piece for piece in kept if piece], length)
