"""Marks the tokens of a document that a model learns to predict, where these are not all.

A document is then an array of pairs. It is cut and laid end to end as a plain array of tokens is,
so a packing need not know about the marks.
"""

import numpy as np

MARKED_TOKEN = np.dtype([("token", "<u4"), ("target", "?")])


def mark_targets(tokens: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Returns the tokens [T] of a document together with what `is_target` [T] says of each."""
    marked = np.empty(len(tokens), MARKED_TOKEN)
    marked["token"], marked["target"] = tokens, is_target
    return marked


def split_targets(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns plain tokens, and which of them are targets, or None if the tokens have no marks."""
    if tokens.dtype.names:
        return tokens["token"], tokens["target"]
    return tokens, None


def count_targets(tokens: np.ndarray) -> int:
    """Counts the targets of a document, whose first token has nothing that it could follow from."""
    _, is_target = split_targets(tokens)
    return len(tokens) - 1 if is_target is None else int(is_target[1:].sum())
