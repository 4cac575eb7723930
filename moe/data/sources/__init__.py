"""Finds documents: the user's files, saved Hugging Face data sets, and data sets of TFDS.

The prefix of `data.dataset` says which of them it is. Importing TFDS or Arrow takes a second, so a
source is imported only where it is used.
"""

import contextlib
from collections.abc import Iterator

from moe.config import ConfigError, DataConfig
from moe.data.sources import tfds
from moe.data.sources.document import Document, Documents
from moe.data.sources.listing import check_split, find_files

__all__ = [
    "Document",
    "Documents",
    "check_dataset",
    "naming_source",
    "open_documents",
    "reopen_documents",
    "source_name",
]


def source_name(config: DataConfig) -> str:
    """Returns the full name of the documents with their version, such as "stdlib/3.11.7".

    Raises ConfigError for a data set that does not exist.
    """
    match config.dataset.partition(":")[0]:
        case "text":
            from moe.data.sources import text_files

            return text_files.source_name(config)
        case "arrow":
            from moe.data.sources import arrow

            return arrow.source_name(config)
        case _:
            return tfds.source_name(config)


def check_dataset(config: DataConfig) -> None:
    """Raises ConfigError for a data set that does not exist or cannot be read.

    Nothing is downloaded or prepared, and JAX is not imported. It checks all sources of a mixture.
    """
    for source in config.mixture:
        with naming_source(source.name):
            check_dataset(config.for_source(source))
    if config.mixture:
        return
    match config.dataset.partition(":")[0]:
        case "text":
            for split in (config.train_split, config.validation_split):
                check_split(config.dataset, split)
            find_files(config.dataset.removeprefix("text:"))
        case "arrow":
            from moe.data.sources import arrow

            for split in (config.train_split, config.validation_split):
                arrow.open_arrow(config, split)
        case "tokens":
            from moe.data.token_files import open_token_rows

            for split in (config.train_split, config.validation_split):
                open_token_rows(config, split)
        case _:
            tfds.check_dataset(config)


def open_documents(config: DataConfig, split: str) -> Documents:
    """Returns the documents of a split, which are prepared first if that is needed.

    Raises ConfigError for a data set or a split that does not exist or has no text, and OSError if
    preparing it fails.
    """
    match config.dataset.partition(":")[0]:
        case "text":
            from moe.data.sources import text_files

            return text_files.open_text_files(config, split)
        case "arrow":
            from moe.data.sources import arrow

            return arrow.open_arrow(config, split)
        case _:
            return tfds.open_documents(config, split)


def reopen_documents(config: DataConfig, split: str, directory: str) -> Documents:
    """Returns the documents that `open_documents` has found in `directory`, in another process."""
    match config.dataset.partition(":")[0]:
        case "text":
            from moe.data.sources.records import RecordDocuments

            return RecordDocuments(directory, split)
        case "arrow":
            from moe.data.sources import arrow

            return arrow.open_arrow(config, split)
        case _:
            return tfds.TfdsDocuments(directory, split, config.text_field)


@contextlib.contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Puts the name of a mixture's source before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        if not name:
            raise
        raise ConfigError(f"data.mixture.{name}: {error}") from None
