"""Reads batches of rows in Grain's background threads. One integer is the stream's whole state."""

import sys

import grain
import numpy as np

from moe.data.mixtures import TrainingRows
from moe.data.rows import Rows, Transform, unchanged

# Reading a row is mostly Python, so more threads would only wait for each other.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches


def make_loader(
    rows: TrainingRows,
    *,
    batch_size: int,
    examples: int,
    host_rows: np.ndarray | slice,
    transform: Transform = unchanged,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Starts reading the endless training batches, from the example number `examples` on.

    A global batch is a function of (rows, mixture, seed, examples, batch_size) and of `transform`
    alone. This host reads the rows `host_rows` of it, given as indices within the batch. A field
    that is [...] in a row is [number of host_rows, ...] in the batch. `close()` ends the threads.
    """
    offsets = np.arange(batch_size)[host_rows]

    def read(first: int) -> dict[str, np.ndarray]:
        numbers = [int(number) for number in first + offsets]
        seed = rows.mixture.seed
        return _stack([transform(rows.example(number), (seed, number)) for number in numbers])

    # Grain needs an end of the stream, so it ends at the last number that Grain can count to.
    return _start(grain.MapDataset.range(examples, sys.maxsize - batch_size, batch_size).map(read))


def evaluation_batches(
    rows: Rows,
    *,
    batch_size: int,
    num_batches: int,
    host_rows: np.ndarray | slice,
    transform: Transform = unchanged,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Starts reading the first `num_batches` batches, or all of them if that is 0, in order, once.

    Every host reads the same number of batches. Rows of zeros fill the last one up.
    """
    offsets = np.arange(batch_size)[host_rows]
    padding = {name: np.zeros_like(field) for name, field in transform(rows[0], (0, 0)).items()}
    stop = min(num_batches * batch_size or len(rows), len(rows))

    def read(first: int) -> dict[str, np.ndarray]:
        numbers = [int(number) for number in first + offsets]
        return _stack([transform(rows[n], (0, n)) if n < len(rows) else padding for n in numbers])

    return _start(grain.MapDataset.range(0, stop, batch_size).map(read))


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _start(batches: grain.MapDataset) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    iterator = iter(batches.to_iter_dataset(_READ_OPTIONS))
    iterator.start_prefetch()
    return iterator
