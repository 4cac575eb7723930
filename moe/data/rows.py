"""Declares what the loader reads rows from, and joins the rows of several sources."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

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


@dataclasses.dataclass(frozen=True)
class JoinedRows:
    """Lays the rows of several sources one after the other.

    A run without a mixture has one source, whose name is "".
    """

    sources: Mapping[str, Rows]  # by name

    @property
    def sha256(self) -> str:
        """Returns a checksum of the rows of all sources."""
        if list(self.sources) == [""]:
            return self.sources[""].sha256
        checksums = [(name, rows.sha256) for name, rows in self.sources.items()]
        return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()

    @property
    def num_targets(self) -> int:
        """Returns how many tokens an epoch of all sources predicts."""
        return self._sum("num_targets")

    @property
    def num_bytes(self) -> int:
        """Returns how many bytes of text all sources have."""
        return self._sum("num_bytes")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source = bisect.bisect_right(self._ends, index)
        rows = self._rows[source]
        return rows[index - self._ends[source] + len(rows)]

    @functools.cached_property
    def _rows(self) -> list[Rows]:
        return list(self.sources.values())

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self._rows)))

    def _sum(self, name: str) -> int:
        """Returns the sum of an attribute that the rows of each source have."""
        rows: list[Any] = self._rows
        return sum(getattr(one, name) for one in rows)
