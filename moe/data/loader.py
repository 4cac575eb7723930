"""Batches of prepared rows, read in background threads by Grain. The whole state of the stream is
one integer.
"""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np
from grain.experimental import index_shuffle

from moe.data.packing import unpack
from moe.data.prepare import PreparedRows

# Reading a row is mostly Python, so more threads would only wait for each other.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches


def make_loader(
    rows: PreparedRows, *, batch_size: int, seed: int, examples: int, host_rows: np.ndarray | slice
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches, from the example number `examples` on.

    A global batch is a function of (rows, seed, examples, batch_size) alone; this host gets its
    rows `host_rows`, as indices within it. Each field is [rows of this host, sequence_length]
    (`packing.unpack`). `close()` ends the threads.
    """
    offsets = np.arange(batch_size)[host_rows]

    def read(first: int) -> dict[str, np.ndarray]:
        return _stack(
            [rows[row_of_example(int(example), len(rows), seed)] for example in first + offsets]
        )

    # Grain wants to know where it ends: at the last number that it can count to.
    return _start(grain.MapDataset.range(examples, sys.maxsize - batch_size, batch_size).map(read))


def evaluation_batches(
    rows: PreparedRows, *, batch_size: int, num_batches: int, host_rows: np.ndarray | slice
) -> Iterator[dict[str, np.ndarray]]:
    """The first `num_batches` batches (0: all) in order, once. The last is filled up with rows of
    padding, masked.
    """
    offsets = np.arange(batch_size)[host_rows]
    padding = unpack(np.zeros(0, np.int32), np.zeros(0, np.uint32), rows.sequence_length)
    stop = min(num_batches * batch_size or len(rows), len(rows))

    def read(first: int) -> dict[str, np.ndarray]:
        return _stack([rows[int(row)] if row < len(rows) else padding for row in first + offsets])

    return _start(grain.MapDataset.range(0, stop, batch_size).map(read))


def row_of_example(example: int, num_rows: int, seed: int) -> int:
    """The row that is the example-th of the stream: every row once an epoch, in another random
    order in each.
    """
    epoch, index = divmod(example, num_rows)
    return index_shuffle(index, max_index=num_rows - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    # seed + epoch would give seed 1 the order that seed 0 has in its second epoch.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _start(batches: grain.MapDataset) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches.to_iter_dataset(_READ_OPTIONS))
    iterator.start_prefetch()
    return iterator
