"""Reads documents from TFDS, which stores them as ArrayRecord, readable without TensorFlow."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moe.config import ConfigError, DataConfig
from moe.data.sources.document import Document
from moe.files import hold_lock

# Importing TFDS takes a second, so the functions that need it import it themselves. Rows that are
# prepared already can be opened without it.
if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# "name/config:version". It rejects TFDS's other notations, namespaces (which ask the network) and
# arguments, as well as "../x".
_NAME = re.compile(r"\w+(/\w[\w.+-]*)?(:[\d.*]+)?", re.ASCII)
_READ_AT_ONCE = 64


class _Records(Protocol):
    """Describes TFDS's access to the records of a split by their index."""

    def __getitems__(self, indices: Sequence[int], /) -> Sequence[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class TfdsDocuments:
    """Reads the documents of a split that TFDS has prepared in `directory`, by their numbers."""

    directory: str
    split: str
    text_field: str

    def __len__(self) -> int:
        return self._prepared_builder.info.splits[self.split].num_examples

    def between(self, start: int, stop: int) -> Iterator[Document]:
        """Yields the documents from `start` to `stop`, or to the last one.

        Several are read at once, because each read takes longer the longer its file is.
        """
        stop = min(stop, len(self))
        for first in range(start, stop, _READ_AT_ONCE):
            indices = range(first, min(first + _READ_AT_ONCE, stop))
            for index, record in zip(indices, self._records.__getitems__(indices), strict=True):
                yield self._document(index, record)

    def _document(self, index: int, record: dict[str, Any]) -> Document:
        """Returns a record's text and its other numbers and strings."""
        try:
            text = record[self.text_field].decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self.directory}: example {index} of split {self.split!r} is not UTF-8 "
                f"({error.reason} at byte {error.start}): set data.dataset to another"
            ) from None
        fields = {name: _scalar(value) for name, value in record.items() if name != self.text_field}
        known = {name: value for name, value in fields.items() if value is not None}
        return Document(text, f"{self.split} example {index}", known)

    @functools.cached_property
    def _prepared_builder(self) -> "tfds.core.DatasetBuilder":
        """Returns TFDS's builder of the prepared data set."""
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory)

    @functools.cached_property
    def _records(self) -> _Records:
        """Returns TFDS's access to the records. It cannot be opened for a split without any."""
        # TFDS wraps the method in a decorator whose type hides its arguments.
        return self._prepared_builder.as_data_source(self.split)  # pyright: ignore[reportCallIssue]


def _scalar(value: Any) -> str | int | float | bool | None:
    """Returns a number or a string of a record as Python has it, or None for other values."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value.item() if isinstance(value, np.generic) else None


def source_name(config: DataConfig) -> str:
    """Returns the full name of the data set with its version, such as "stdlib/3.11.7".

    Raises ConfigError for a data set that TFDS does not know.
    """
    if config.dataset == "stdlib":
        name = "stdlib/" + ".".join(map(str, sys.version_info[:3]))
    else:
        name = _builder(config).info.full_name
    return name if config.text_field == "text" else f"{name}#{config.text_field}"


def open_documents(config: DataConfig, split: str) -> TfdsDocuments:
    """Returns the documents of a split, which TFDS prepares first if they are not there yet.

    They are downloaded to `config.directory`. Raises ConfigError for a data set or a split that is
    unknown or has no text, and OSError if preparing it fails.
    """
    builder = _builder(config)
    _check_text(config, builder)
    builder = prepare_builder(config, builder, lambda: _builder(config))
    _check_split(config, builder, split)
    return TfdsDocuments(os.fspath(builder.data_dir), split, config.text_field)


def prepare_builder(
    config: DataConfig,
    builder: "tfds.core.DatasetBuilder",
    make: Callable[[], "tfds.core.DatasetBuilder"],
) -> "tfds.core.DatasetBuilder":
    """Returns the builder if it is prepared, or a new one that this process or another prepares.

    `make` makes the builder anew. Raises ConfigError for examples that cannot be read, and OSError
    if preparing fails.
    """
    if is_prepared(builder):
        return builder
    with hold_lock(Path(builder.data_dir_root, f"{builder.name}.lock")) as has_lock:
        # Killed processes may have left directories, which are deleted here. Without a lock,
        # another process may still be writing to them.
        if has_lock:
            for stale in Path(builder.data_dir).parent.glob("incomplete.*"):
                shutil.rmtree(stale, ignore_errors=True)
        return _download_and_prepare(config, make)


def check_dataset(config: DataConfig) -> None:
    """Raises ConfigError for a data set that TFDS does not know or that has no text.

    A split that it lacks is refused too, if the data set is prepared already and its splits are
    known. Nothing is downloaded. JAX is not imported, and TFDS only where it is needed.
    """
    splits = (config.train_split, config.validation_split)
    if config.dataset == "stdlib" and {"train", "validation"}.issuperset(splits):
        return
    builder = _builder(config)
    _check_text(config, builder)
    if is_prepared(builder):
        for split in splits:
            _check_split(config, builder, split)
    else:
        _report_needs(config, builder)


def _report_needs(config: DataConfig, builder: "tfds.core.DatasetBuilder") -> None:
    """Prints what preparing a data set downloads, and refuses one that needs TensorFlow.

    TFDS reports neither. The file of a builder that uses TensorFlow has a global name for it, which
    TFDS loads on its first use.
    """
    names = vars(sys.modules[type(builder).__module__])
    wanted = {"tf": "tensorflow", "tensorflow": "tensorflow", "beam": "apache_beam"}
    for package in {wanted[name] for name in wanted if name in names}:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"data.dataset={config.dataset!r} needs {package} to be prepared, which is not "
                "installed: prepare it where it is, by `tfds build --file_format=array_record`, "
                f"and copy it to {builder.data_dir}"
            )
    urls = builder.url_infos or {}
    if size := sum(url.size or 0 for url in urls.values()):
        print(
            f"data.dataset={config.dataset!r} is not prepared yet: TFDS downloads up to "
            f"{size / 1e6:,.1f} MB before training",
            file=sys.stderr,
        )


def _check_text(config: DataConfig, builder: "tfds.core.DatasetBuilder") -> None:
    """Raises ConfigError for a data set whose documents have no text."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    texts = [
        name
        for name, feature in (features.items() if is_dict else ())
        if isinstance(feature, tfds.features.Text)
    ]
    if config.text_field not in texts:
        fix = f"data.text_field to {' or '.join(map(repr, texts))}" if texts else "data.dataset"
        raise ConfigError(
            f"data.dataset={config.dataset!r} has no feature {config.text_field!r} of text: "
            f"set {fix}" + ("" if texts else " to one that has")
        )


def _check_split(config: DataConfig, builder: "tfds.core.DatasetBuilder", split: str) -> None:
    """Raises ConfigError for a split that a prepared data set does not have."""
    try:
        builder.info.splits[split]
    except (KeyError, ValueError):
        splits = " or ".join(repr(name) for name in builder.info.splits)
        raise ConfigError(
            f"split {split!r} is not one of data.dataset={config.dataset!r}: "
            f"set the split to {splits}"
        ) from None


def _builder(config: DataConfig) -> "tfds.core.DatasetBuilder":
    """Returns TFDS's builder of the data set. Raises ConfigError for one that it does not know."""
    if not _NAME.fullmatch(config.dataset):
        raise ConfigError(
            f"data.dataset={config.dataset!r} is not a name: "
            "set data.dataset to 'stdlib' or TFDS's 'name/config:version'"
        )
    import tensorflow_datasets as tfds

    # TFDS knows the name of a builder as soon as its class is defined.
    import moe.data.sources.stdlib
    import moe.data.sources.stdlib_functions  # noqa: F401

    directory = config.path / "tfds"
    try:
        return tfds.builder(
            config.dataset, data_dir=os.fspath(directory), file_format="array_record"
        )
    # TFDS raises one of these for an unknown name or config, and the other for a version.
    except (ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"data.dataset={config.dataset!r}: {reason}: set data.dataset to a name that TFDS lists"
        ) from None


def is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    """Returns whether TFDS has prepared the data set."""
    # The builder has a method for this, but it warns if nothing is there yet.
    return Path(builder.data_dir, "dataset_info.json").exists()


def _download_and_prepare(
    config: DataConfig, make: Callable[[], "tfds.core.DatasetBuilder"]
) -> "tfds.core.DatasetBuilder":
    """Returns the builder of a data set after preparing it. Raises OSError if that fails."""
    builder = make()
    if is_prepared(builder):  # another process has done so while this one waited for the lock
        return builder
    import tensorflow_datasets as tfds

    # TFDS shows a bar for each of its phases. For stdlib they take only a second.
    if builder.name == "stdlib":
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except ConfigError:
        raise
    except (ImportError, OSError, ValueError, AssertionError, RuntimeError) as error:
        builder = make()
        # If it is prepared now, another host was quicker: hosts need not see each other's locks.
        if not is_prepared(builder):
            reason = str(error).split("\n")[0]
            raise OSError(
                f"data.dataset={config.dataset!r} could not be prepared in {builder.data_dir}: "
                f"{reason}"
            ) from error
    finally:
        tfds.enable_progress_bar()
    return builder
