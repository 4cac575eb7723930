"""Cuts documents that are longer than a row, for packings that cut no others."""

from collections.abc import Iterator

import numpy as np


def cut_document(document: np.ndarray, sequence_length: int) -> Iterator[np.ndarray]:
    """Yields a document in pieces of at most sequence_length + 1 tokens.

    A document that fits is its only piece. A longer one is cut into several: all but the last have
    that many tokens, and all but the first start with the last token of the piece before. So each
    token but the document's first is a target exactly once.
    """
    yield document[: sequence_length + 1]
    for start in range(sequence_length, len(document) - 1, sequence_length):
        yield document[start : start + sequence_length + 1]
