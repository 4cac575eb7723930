"""Divides documents by a field of theirs, so that each part can be evaluated by itself."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from moe.config import ConfigError, DataConfig, RunConfig
from moe.config.checks import show
from moe.config.data import is_token_files
from moe.data.rows import JoinedRows, Rows
from moe.data.sources import Document, open_documents
from moe.files import close_named, naming_file

MAX_SLICES = 50  # each is a file that is open while documents are divided


def splits_of(data: DataConfig, split: str | None) -> tuple[str, ...]:
    """Returns the splits to evaluate: the given one, or all documents of the user's own files."""
    if split is None and data.dataset.startswith("text:"):
        from moe.data.sources.text_files import splits_with_documents

        return splits_with_documents(data)
    return (split or data.validation_split,)


def check_documents(data: DataConfig, field: str) -> None:
    """Raises ConfigError for data without documents, which no field can divide."""
    for source in data.sources:
        if is_token_files(source.dataset):
            raise ConfigError(
                f"--slice={field} needs documents, and {source.dataset} holds only tokens: "
                "leave --slice out, or name other data"
            )


@contextlib.contextmanager
def open_slices(
    config: RunConfig,
    data: Sequence[tuple[DataConfig, Sequence[str]]],
    open_rows: Callable[[RunConfig, str], Rows],
    field: str,
) -> Iterator[JoinedRows]:
    """Yields the rows of the documents with each value of a field, under the name FIELD=VALUE.

    `data` holds each data set with its splits. Each slice is packed by itself, from a copy on disk
    that is deleted at the end. Raises ConfigError for a field that documents lack, and for one with
    too many values.
    """
    with tempfile.TemporaryDirectory(prefix="slices-") as directory:
        documents = (
            document
            for one, splits in data
            for split in splits
            for documents in [open_documents(one, split)]
            for document in documents.between(0, len(documents))
        )
        rows = {}
        for value, folder in sorted(divide(documents, field, Path(directory)).items()):
            place = {"dataset": f"text:{folder}", "text_field": "text", "directory": directory}
            one = dataclasses.replace(data[0][0], **place)
            rows[f"{field}={value}"] = open_rows(
                dataclasses.replace(config, data=one), "validation"
            )
        yield JoinedRows(rows)


def divide(documents: Iterable[Document], field: str, directory: Path) -> dict[str, Path]:
    """Copies documents into one folder for each value of a field. Returns them by the values.

    Empty documents are left out, as they are from rows.
    """
    folders: dict[str, Path] = {}
    files: dict[str, IO[str]] = {}
    with contextlib.ExitStack() as stack:
        for document in documents:
            value = _value(document, field)
            if not document.text:
                continue
            if value not in files:
                if len(files) == MAX_SLICES:
                    raise ConfigError(
                        f"--slice={field} has more than {MAX_SLICES} values, such as "
                        f"{show(value)}: set it to a field with fewer"
                    )
                folders[value] = directory / f"slice{len(files)}"
                files[value] = _new_file(folders[value]).open("w", encoding="utf-8")
                stack.callback(close_named, files[value])
            with naming_file(Path(files[value].name)):
                files[value].write(json.dumps({"text": document.text}) + "\n")
    return folders


def _new_file(folder: Path) -> Path:
    """Makes a folder whose documents are all of the validation split, and returns their file."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    (folder / "train" / "none.jsonl").touch()
    return folder / "validation" / "documents.jsonl"


def _value(document: Document, field: str) -> str:
    """Returns the text of a document's value of a field. Raises ConfigError if it has none."""
    if field not in document.fields:
        known = ", ".join(sorted(document.fields)) or "none besides its text"
        raise ConfigError(
            f"--slice={field} is no field of {document.origin}, which has {known}: set it to one"
        )
    return str(document.fields[field])
