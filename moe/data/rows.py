"""Declares what the loader reads rows from."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

# Makes a row's fields of a batch from the fields that `Rows` holds, and from a key. In training the
# key is (seed, number of the example), so that each epoch draws anew, and in an evaluation it is
# (0, number of the row), so that each evaluation draws the same.
Transform = Callable[[dict[str, np.ndarray], tuple[int, ...]], dict[str, np.ndarray]]


def unchanged(row: dict[str, np.ndarray], key: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns a row as it is, which is the transform of tasks that draw nothing."""
    return row


class Rows(Protocol):
    """Gives access to the rows of one split of a data set by their index.

    Several threads read the same rows at the same time. Evaluation fills its last batch up with
    rows whose fields are all zero, so a row of zeros must add nothing to a task's sums and counts.
    """

    @property
    def sha256(self) -> str:
        """Returns a checksum of all rows. A run refuses to resume on rows with another checksum."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns the fields of one row. Stacked, the rows make a batch: [T] becomes [B, T]."""
        ...
