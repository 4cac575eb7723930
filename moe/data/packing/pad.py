"""Pad packing gives each document a row of its own, filled up with padding.

It is for examples that are all about as long as a row. A longer document is cut into several rows.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from moe.data.packing.cut import cut_document


def pack(
    documents: Iterable[np.ndarray], sequence_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of a stream of documents, as (tokens, lengths of the pieces as uint32)."""
    for document in documents:
        for piece in cut_document(document, sequence_length):
            yield piece, np.array([len(piece)], np.uint32)
