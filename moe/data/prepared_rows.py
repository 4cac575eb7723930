"""Reads the rows that `prepare` has left on disk."""

import bisect
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from moe.data.packing.concat import unpack
from moe.data.shards import decode_record, shard_name

# With the threads that read at the same time, at most 64 files of rows are open in a process,
# however many sources, splits and shards there are.
_MAX_OPEN_FILES = 60


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Reads packed rows from disk by their index. Threads can share it, and it can be pickled."""

    directory: Path
    source: str  # the full name of the data set, with its version
    split: str
    tokenizer: str
    vocab_size: int
    boundary_id: int
    sequence_length: int
    packing: str
    format_version: int
    sha256: str  # of all rows, so that two machines can tell whether they have the same ones
    num_rows: int
    num_tokens: int  # of all documents, boundaries included
    num_bytes: int  # of all documents, as UTF-8; of conversations, their answers alone
    num_documents: int
    num_targets: int  # tokens that an epoch predicts
    rows_per_shard: tuple[int, ...]
    # Rows that an older version has prepared do not know these.
    num_cut: int | None = None  # documents whose targets are not all in one row
    num_placed: int | None = None  # tokens in all rows; a token at a cut is in two
    special_tokens: str = ""  # those of the config, as JSON
    chat_template: str = ""  # the checksum of the template of conversations

    @property
    def fullness(self) -> float | None:
        """Returns the share of the rows' places that hold tokens, or None if it is not known."""
        if self.num_placed is None:
            return None
        return self.num_placed / (self.num_rows * (self.sequence_length + 1))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one row's fields of a batch, each [sequence_length], as `packing.unpack` does.

        Raises IndexError for a row that does not exist, and OSError for a damaged file.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.directory}")
        shard = bisect.bisect_right(self._ends, index)
        row = index - self._ends[shard] + self.rows_per_shard[shard]
        path = self.directory / shard_name(shard)
        try:
            # The row is read by its bounds. A list of indices or ArrayRecordDataSource would take
            # longer the longer the file is.
            (record,) = _open_reader(self._key, path).read(row, row + 1)
        except (RuntimeError, IndexError, OSError) as error:
            # Without this, a file that could not be opened once could never be read again.
            self.__dict__.pop("_key", None)
            raise _read_error(path, str(error)) from error
        try:
            return unpack(*decode_record(record, self.vocab_size), self.sequence_length)
        except (ValueError, IndexError, RuntimeError, AssertionError, ArithmeticError) as error:
            raise _read_error(path, f"row {index}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return open_rows, (self.directory,)  # open files cannot be pickled

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Returns, for each shard, the number of rows up to its end."""
        return list(itertools.accumulate(self.rows_per_shard))

    @functools.cached_property
    def _key(self) -> object:
        """Returns the key under which the open files of this object alone are cached."""
        return object()


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _open_reader(key: object, path: Path) -> ArrayRecordReader:
    """Returns an open reader of a file of rows. The file that was not read for longest is closed.

    A thread that still reads from that file holds it open until it is done. Raises OSError for a
    file that cannot be opened, of which the reader itself would say that it is empty.
    """
    path.open("rb").close()
    return ArrayRecordReader(
        str(path), options="readahead_buffer_size:0", file_reader_buffer_size=2**15
    )


def open_rows(directory: Path) -> PreparedRows:
    """Returns the rows that `prepare` left in `directory`. Raises OSError if they are damaged."""
    path = directory / "metadata.json"
    text = path.read_bytes()
    try:
        metadata = json.loads(text)
        rows_per_shard = tuple(metadata["rows_per_shard"])
        # Rows that an older version has prepared predict all tokens but each document's first.
        metadata.setdefault("num_targets", metadata["num_tokens"] - metadata["num_documents"])
        rows = PreparedRows(directory, **metadata | {"rows_per_shard": rows_per_shard})
        is_consistent = _is_consistent(rows)
    except (ValueError, TypeError, LookupError, RecursionError):
        is_consistent = False
    if not is_consistent:
        raise OSError(f"{path} is damaged: delete {directory}")
    return rows


def _is_consistent(rows: PreparedRows) -> bool:
    """Returns whether the numbers in metadata are valid and agree with each other."""
    counts = (
        rows.num_rows,
        rows.num_tokens,
        rows.num_bytes,
        rows.num_documents,
        rows.num_targets,
        rows.sequence_length,
        *rows.rows_per_shard,
        *(count for count in (rows.num_cut, rows.num_placed) if count is not None),
    )
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and sum(rows.rows_per_shard) == rows.num_rows
        and type(rows.sha256) is str
    )


def _read_error(path: Path, reason: str) -> OSError:
    """Returns the error for a file from which a row could not be read.

    The reader does not tell damage from other failures, so this opens the file again. Only a file
    that can be opened is called damaged, because only then does deleting it help.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return OSError(
            f"{path} was deleted while it was in use: run the same command again, "
            "which prepares it anew"
        )
    except OSError as error:
        return OSError(f"{path} cannot be read: {error.strerror}")
    first_line = reason.split("\n")[0]
    return OSError(f"{path} is damaged ({first_line}): delete {path.parent}")
