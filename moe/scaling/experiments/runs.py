"""Reads a table of runs, CSV or Parquet, and checks it before anything is fitted to it.

JAX is not imported here, so that a bad table is answered within a second.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import csv, parquet

from moe.config.checks import ConfigError, show


@dataclasses.dataclass(frozen=True)
class Runs:
    """Holds the columns of a table of runs, each an array [N]. What is missing is NaN or "".

    Rows with the same `run` are measurements of one run, such as losses after several token counts.
    """

    run: np.ndarray
    status: np.ndarray
    reason: np.ndarray
    dataset: np.ndarray
    tokenizer: np.ndarray
    parameters: np.ndarray
    active_parameters: np.ndarray
    embedding_parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    repeats: np.ndarray
    experts: np.ndarray
    experts_per_token: np.ndarray
    granularity: np.ndarray
    sparsity: np.ndarray
    learning_rate: np.ndarray
    batch_tokens: np.ndarray
    vocab_size: np.ndarray
    config: np.ndarray  # a run's whole config as JSON, which tables of launch.sweep have
    row: np.ndarray  # the number of each row in the table, for messages; the first one is 1

    def __len__(self) -> int:
        return len(self.run)

    def take(self, chosen: np.ndarray) -> "Runs":
        """Returns the chosen rows, named by a mask or by indices."""
        return Runs(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


TEXTS = ("run", "status", "reason", "dataset", "tokenizer", "config")
NUMBERS = tuple(
    field.name for field in dataclasses.fields(Runs) if field.name not in (*TEXTS, "row")
)
REQUIRED = ("parameters", "tokens", "loss")


def read_runs(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    where: Mapping[str, str] | None = None,
    scale: Mapping[str, float] | None = None,
    content: bytes | None = None,
) -> Runs:
    """Returns the runs of a CSV or Parquet file.

    `columns` gives the file's names of columns that have another name there, such as
    {"parameters": "N"}. `where` gives the values of the file's columns that rows must have to be
    read, with commas between alternatives, and `scale` the factors of columns whose unit is another
    one. Columns that laws need and the table lacks follow from the others, as `make_runs` says.
    `content` holds the file's bytes, if they have been read.
    """
    path, columns = Path(path), columns or {}
    table = _read_table(path, read_bytes(path) if content is None else content)
    rows = _matching_rows(path, table, where or {})
    table = table.take(rows)
    names = _names_in(path, table, columns)
    present = {name: column for name, column in names.items() if column in table.column_names}
    read = {
        name: (_texts if name in TEXTS else _numbers)(path, column, table[column], rows + 1)
        for name, column in present.items()
    }
    for name, factor in (scale or {}).items():
        if name in read:
            read[name] = read[name] * factor
    return make_runs(**read, row=rows + 1)


def _names_in(path: Path, table: pyarrow.Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Returns the name that the file gives to each column of a table of runs."""
    for name, column in columns.items():
        if name not in (*TEXTS, *NUMBERS):
            raise ConfigError(
                f"column {name!r} is no column of a table of runs: "
                f"name one of {', '.join((*TEXTS, *NUMBERS))}"
            )
        if column not in table.column_names:
            raise ConfigError(
                f"{path}: there is no column {column!r} for {name}: "
                f"the table has {', '.join(table.column_names)}"
            )
    names = {name: columns.get(name, name) for name in (*TEXTS, *NUMBERS)}
    missing = [names[name] for name in REQUIRED if names[name] not in table.column_names]
    if missing:
        raise ConfigError(
            f"{path}: there is no column {', '.join(missing)}: name the columns of the table that "
            f"hold {', '.join(REQUIRED)} (it has {', '.join(table.column_names)})"
        )
    return names


def _matching_rows(path: Path, table: pyarrow.Table, where: Mapping[str, str]) -> np.ndarray:
    """Returns the indices of the rows whose columns have the values of `where`."""
    chosen = np.ones(table.num_rows, bool)
    for column, wanted in where.items():
        if column not in table.column_names:
            raise ConfigError(
                f"{path}: there is no column {column!r} to choose rows by: "
                f"the table has {', '.join(table.column_names)}"
            )
        values = table[column].to_pylist()
        alternatives = {wanted, *wanted.split(",")}
        before = chosen
        chosen = before & [any(_is_same(value, text) for text in alternatives) for value in values]
        if not chosen.any():
            found = list(dict.fromkeys(str(values[i]) for i in np.flatnonzero(before)))
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            raise ConfigError(
                f"{path}: no row with {column}={wanted} is left: "
                f"column {column!r} has {', '.join(found[:8])}{more}"
                + " in the rows that the conditions before it choose"
                * (not before.all())
            )
    return np.flatnonzero(chosen)


def _is_same(value: object, wanted: str) -> bool:
    """Returns whether a value of a table is the one in a text, which may write 1.0 as 1."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return value == float(wanted)
        except ValueError:
            return False
    return ("" if value is None else str(value)) == wanted


def read_bytes(path: Path) -> bytes:
    """Returns what a file holds. Raises ConfigError if it is none, or cannot be read."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a table of runs, CSV or Parquet")
    # Reading a FIFO or a device would wait for ever.
    if not path.is_file():
        raise ConfigError(f"{path} is no regular file: name a table of runs, CSV or Parquet")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): name a table of runs, CSV or Parquet"
        ) from None


def _read_table(path: Path, content: bytes) -> pyarrow.Table:
    """Returns the table in a file. Its ending says whether it is Parquet; all else is CSV."""
    is_parquet = path.suffix == ".parquet"
    read = parquet.read_table if is_parquet else csv.read_csv
    try:
        table = read(pyarrow.BufferReader(content))
        names = table.column_names
    # Arrow raises UnicodeDecodeError for a name only when the name is read.
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"{path} is no table of runs, CSV or Parquet: {message}") from None
    if len(names) == 1 and not is_parquet:
        raise ConfigError(
            f"{path}: there is one column, {show(names[0])}: separate columns by commas"
        )
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{path}: there are two columns {twice[0]!r}: rename one of them")
    if not table.num_rows:
        raise ConfigError(f"{path} has no rows: write a row for each run")
    return table


def _texts(path: Path, column: str, values: pyarrow.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Returns a column as texts, with "" for what is missing."""
    return np.array(["" if value is None else str(value) for value in values.to_pylist()])


def _numbers(path: Path, column: str, values: pyarrow.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Returns a column as float64, with NaN for what is missing."""
    numbers, wrong = [], []
    for row, value in zip(rows, values.to_pylist(), strict=True):
        try:
            numbers.append(math.nan if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            wrong.append(f"{row} ({show(value)})")
    if wrong:
        raise ConfigError(
            f"{path}: column {column!r} holds no number in {list_rows(wrong)}: write numbers"
        )
    return np.array(numbers, np.float64)


def make_runs(**columns: Iterable) -> Runs:
    """Returns runs from columns, and derives those that are missing.

    Without a status a run is finished, and without a name each row is a run. Models are dense
    unless the number of experts is given. FLOPs are 6 · active parameters · tokens.
    """
    given = {name: np.asarray(values) for name, values in columns.items()}
    count = len(next(iter(given.values())))
    texts = {name: np.char.strip(given.get(name, np.full(count, "")).astype(str)) for name in TEXTS}
    rows = given.get("row", np.arange(1, count + 1))
    unnamed = texts["run"] == ""
    texts["run"] = np.where(unnamed, np.char.add("row ", rows.astype(str)), texts["run"])
    texts["status"] = np.where(texts["status"] == "", "finished", texts["status"])
    numbers = {
        name: np.asarray(given.get(name, np.full(count, np.nan)), np.float64) for name in NUMBERS
    }

    def derive(name: str, values: np.ndarray | float) -> None:
        numbers[name] = np.where(np.isnan(numbers[name]), values, numbers[name])

    # Some tables write 0 experts, or 0 for each token, for a dense model.
    is_dense = np.isin(numbers["experts"], (0, 1))
    for name in ("experts", "experts_per_token"):
        numbers[name] = np.where(is_dense & (numbers[name] == 0), 1.0, numbers[name])
    derive("experts", 1.0)
    derive("experts_per_token", 1.0)
    derive("embedding_parameters", 0.0)
    dense = numbers["experts"] == numbers["experts_per_token"]
    derive("active_parameters", np.where(dense, numbers["parameters"], np.nan))
    derive("sparsity", 1 - numbers["experts_per_token"] / numbers["experts"])
    derive("granularity", np.where(numbers["experts"] == 1, 1.0, np.nan))
    with np.errstate(over="ignore"):  # absurd counts have infinite FLOPs, which checks refuse
        derive("flops", 6 * numbers["active_parameters"] * numbers["tokens"])
    return Runs(**texts, **numbers, row=rows)


def list_rows(rows: Iterable[object]) -> str:
    """Returns "row 3" or "rows 3, 4 and 12 more", as messages name rows."""
    names = [str(row) for row in rows]
    text = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"row {text}" if len(names) == 1 else f"rows {text}"
