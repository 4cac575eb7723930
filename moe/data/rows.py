"""Declares what the loader reads rows from."""

from typing import Protocol

import numpy as np


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
