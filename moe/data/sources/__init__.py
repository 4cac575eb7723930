"""Finds documents: data sets of TFDS, and the standard library's text as one of them."""

from moe.config import DataConfig
from moe.data.sources import tfds
from moe.data.sources.document import Document, Documents

__all__ = [
    "Document",
    "Documents",
    "check_dataset",
    "open_documents",
    "reopen_documents",
    "source_name",
]


def source_name(config: DataConfig) -> str:
    """Returns the full name of the documents with their version, such as "stdlib/3.11.7".

    Raises ConfigError for a data set that does not exist.
    """
    return tfds.source_name(config)


def check_dataset(config: DataConfig) -> None:
    """Raises ConfigError for a data set that does not exist or cannot be read.

    Nothing is downloaded or prepared, and JAX is not imported.
    """
    tfds.check_dataset(config)


def open_documents(config: DataConfig, split: str) -> Documents:
    """Returns the documents of a split, which are prepared first if that is needed.

    Raises ConfigError for a data set or a split that does not exist or has no text, and OSError if
    preparing it fails.
    """
    return tfds.open_documents(config, split)


def reopen_documents(config: DataConfig, split: str, directory: str) -> Documents:
    """Returns the documents that `open_documents` has found in `directory`, in another process."""
    return tfds.TfdsDocuments(directory, split, config.text_field)
