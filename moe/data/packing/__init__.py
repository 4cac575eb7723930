"""Puts documents of tokens into rows of one length, and rows into the fields of a batch."""

from collections.abc import Iterable, Iterator

import numpy as np

from moe.config import DataConfig
from moe.data.packing import best_fit, concat, pad

__all__ = ["is_cut", "pack"]


def pack(
    config: DataConfig, documents: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of documents, as (tokens, lengths of the pieces), packed as the config says.

    The rows depend on the documents and their order alone.
    """
    match config.packing:
        case "concat":
            return concat.pack(documents, config.sequence_length)
        case "best_fit":
            return best_fit.pack(documents, config.sequence_length)
        case "pad":
            return pad.pack(documents, config.sequence_length)


def is_cut(config: DataConfig, num_before: int, num_tokens: int) -> bool:
    """Returns whether a document of `num_tokens` is cut, with `num_before` tokens before it.

    It is cut if its targets are not all in one row.
    """
    length = config.sequence_length
    if config.packing == "concat":
        # The token at place p of the stream is a target in row (p - 1) // sequence_length.
        return num_before // length < (num_before + num_tokens - 2) // length
    return num_tokens > length + 1
