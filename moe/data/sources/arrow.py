"""Reads a data set that Hugging Face's `datasets` has saved on disk, in place, by Arrow alone.

Such a directory holds Arrow files, which `save_to_disk` writes, or Parquet files, as the hub has
them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path, is_file_name, show
from moe.data.sources.document import Document, parts_between
from moe.data.sources.readers import columns_to_read, read_batch

_ROWS_AT_ONCE = 256
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's columnar format, "IPC Streaming Format"


def find_splits(config: DataConfig) -> dict[str, list[Path]]:
    """Returns the files of each split. Raises ConfigError for a directory that holds no data set.

    Only what the directory says of itself is read.
    """
    path = Path(expand_path("data.dataset", config.dataset.removeprefix("arrow:")))
    if not path.is_dir():
        raise ConfigError(
            f"data.dataset={config.dataset!r} is no directory: set it to arrow:DIRECTORY, "
            "where `save_to_disk` has written or Parquet files lie"
        )
    if (path / "dataset_dict.json").exists():
        names = _read_names(path / "dataset_dict.json", "splits")
        return {name: _saved_files(path / name) for name in names}
    if (path / "state.json").exists():
        raise ConfigError(
            f"data.dataset={config.dataset!r} has no splits: save "
            "`dataset.train_test_split(0.05)` instead, and set data.validation_split to 'test'"
        )
    return _parquet_splits(config, path)


def _saved_files(directory: Path) -> list[Path]:
    """Returns the Arrow files of a split that `save_to_disk` has written."""
    state = _read_json(directory / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ConfigError(
            f"{directory} holds a selection of rows, by an old version of `datasets`: save "
            "`dataset.flatten_indices()` again"
        )
    return [directory / name for name in _read_names(directory / "state.json", "_data_files")]


def _read_names(path: Path, field: str) -> list[str]:
    """Returns the names of splits or files that a file lists. They must lie beside it."""
    listed = _read_json(path).get(field)
    values = listed if isinstance(listed, list) else []
    values = [value.get("filename") if isinstance(value, dict) else value for value in values]
    names = [value for value in values if is_file_name(value)]
    if not names or len(names) < len(values):
        raise ConfigError(
            f"{path} holds {show(listed)} as {field!r}, and not the names of what lies beside it: "
            "save the data set again"
        )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): save the data set again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {show(content)}, no object: save the data set again")
    return content


def _parquet_splits(config: DataConfig, path: Path) -> dict[str, list[Path]]:
    """Returns the Parquet files of each split, which a file's name or its folder names.

    They are called SPLIT-00000-of-00002.parquet, SPLIT.parquet, or SPLIT/anything.parquet.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("*.parquet")):
        folder = file.parent.name if file.parent != path else ""
        match = re.fullmatch(r"(\w+?)-\d+-of-\d+.*", file.stem)
        is_named_by_folder = folder not in ("", "data")
        split = match[1] if match else folder if is_named_by_folder else file.stem
        splits[split].append(file)
    for split, files in splits.items():
        if len(folders := sorted({str(file.parent) for file in files})) > 1:
            raise ConfigError(
                f"data.dataset={config.dataset!r} holds several data sets, whose split {split!r} "
                f"is in {' and in '.join(folders)}: set data.dataset to one of these directories"
            )
    if not splits:
        raise ConfigError(
            f"data.dataset={config.dataset!r} holds neither dataset_dict.json nor Parquet files: "
            "set it to a directory where `save_to_disk` has written"
        )
    return splits


def open_arrow(config: DataConfig, split: str) -> "ArrowDocuments":
    """Returns the documents of a split. Raises ConfigError if it is unknown, cut or has no text."""
    splits = find_splits(config)
    if split not in splits:
        raise ConfigError(
            f"split {split!r} is not one of data.dataset={config.dataset!r}: "
            f"set the split to {' or '.join(map(repr, splits))}"
        )
    documents = ArrowDocuments(tuple(splits[split]), config.text_field)
    documents.check()
    return documents


def source_name(config: DataConfig) -> str:
    """Returns a name that changes if any of the files does."""
    found = [
        (split, file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for split, files in find_splits(config).items()
        for file in files
    ]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    readable = re.sub(r"\W+", "_", config.dataset.removeprefix("arrow:"), flags=re.ASCII)[-32:]
    return f"arrow/{readable.strip('_')}-{config.text_field}-{digest}"


@dataclasses.dataclass(frozen=True)
class ArrowDocuments:
    """Reads the documents of a split by their numbers, from Arrow or Parquet files."""

    files: tuple[Path, ...]
    text_field: str

    @property
    def directory(self) -> str:
        """Returns where the files lie."""
        return str(self.files[0].parent)

    def __len__(self) -> int:
        return sum(self._lengths)

    def between(self, start: int, stop: int) -> Iterator[Document]:
        """Yields the documents from `start` to `stop`, or to the last one."""
        for file, inside in parts_between(self._lengths, start, stop):
            yield from self._read(self.files[file], inside)

    def check(self) -> None:
        """Raises ConfigError for a file without the field of the text, or that was cut."""
        for file in self.files:
            with _explained(file):
                names = _schema(file).names
            if self.text_field not in names:
                raise ConfigError(
                    f"{file} has no field {self.text_field!r}: "
                    f"set data.text_field to one of ({', '.join(names)})"
                )
        _ = self._lengths

    @functools.cached_property
    def _lengths(self) -> list[int]:
        """Returns how many rows each file has."""
        lengths = []
        for file in self.files:
            with _explained(file):
                is_parquet = file.suffix == ".parquet"
                lengths.append(
                    pq.read_metadata(file).num_rows if is_parquet else _table(file).num_rows
                )
        return lengths

    def _read(self, file: Path, numbers: range) -> Iterator[Document]:
        """Yields the documents of one file."""
        with _explained(file):
            columns = columns_to_read(_schema(file), self.text_field)
            read = _parquet_batches if file.suffix == ".parquet" else _arrow_batches
            number = numbers.start

            def refuse(place: str, reason: str) -> NoReturn:
                raise ConfigError(f"{file.parent / place} {reason}")

            for batch in read(file, numbers, columns):
                yield from read_batch(batch, file.name, number, refuse, self.text_field)
                number += len(batch)


def _arrow_batches(file: Path, numbers: range, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of these numbers of an Arrow file, some at a time."""
    table = _table(file).select(columns).slice(numbers.start, len(numbers))
    yield from table.to_batches(_ROWS_AT_ONCE)


def _parquet_batches(file: Path, numbers: range, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of these numbers of a Parquet file, some at a time.

    A group of rows can only be read from its beginning.
    """
    with pq.ParquetFile(file, memory_map=True) as parquet:
        groups = range(parquet.num_row_groups)
        lengths = [parquet.metadata.row_group(group).num_rows for group in groups]
        for group, wanted in parts_between(lengths, numbers.start, numbers.stop):
            begin = 0  # the number of a batch's first row in its group
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, [group], columns):
                rows = range(max(wanted.start - begin, 0), min(wanted.stop - begin, len(batch)))
                if rows:
                    yield batch.slice(rows.start, len(rows))
                begin += len(batch)


def _schema(file: Path) -> pa.Schema:
    """Returns the names and types of a file's columns."""
    return pq.read_schema(file) if file.suffix == ".parquet" else _table(file).schema


def _table(file: Path) -> pa.Table:
    """Returns the table of an Arrow file, whose rows stay on disk until they are read."""
    return _map_table(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)  # each is an open file
def _map_table(file: Path, changed: int) -> pa.Table:
    with file.open("rb") as opened:
        opened.seek(-min(len(_END_OF_STREAM), file.stat().st_size), 2)
        if opened.read() != _END_OF_STREAM:
            raise pa.ArrowInvalid("the end of the stream is missing")
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turns an error of Arrow or of the file system into a ConfigError of one line."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{file} is damaged or cannot be read ({reason}): copy or save it again"
        ) from None
