"""Where documents come from: TFDS, written as ArrayRecord, which is read without TensorFlow."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.config import ConfigError, DataConfig
from moe.files import exclusive

if TYPE_CHECKING:  # importing TFDS takes a second, which opening rows that are there should not
    import tensorflow_datasets as tfds

# Keeps out TFDS's other notations (namespaces, which ask the network, and arguments), and "../x".
_NAME = re.compile(r"\w+(/\w[\w.+-]*)?(:[\d.*]+)?", re.ASCII)
_READ_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[str]):
    """The texts of a split of a data set that TFDS has prepared in `directory`, by index."""

    directory: str
    split: str

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        return self._records[range(len(self))[index]]["text"].decode(errors="replace")

    def between(self, start: int, stop: int) -> Iterator[str]:
        """The documents from start to stop, or the end. Several are read at once: a read takes
        longer the longer its file is.
        """
        for first in range(start, stop := min(stop, len(self)), _READ_AT_ONCE):
            for record in self._records.__getitems__(
                range(first, min(first + _READ_AT_ONCE, stop))
            ):
                yield record["text"].decode(errors="replace")

    @functools.cached_property
    def _records(self) -> Sequence[dict[str, bytes]]:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.directory)
        return (
            builder.as_data_source(self.split)
            if builder.info.splits[self.split].num_examples
            else []
        )


def source_name(config: DataConfig) -> str:
    """The full name of the data set, with its version: "stdlib/3.11.7". Raises ConfigError for one
    that TFDS doesn't know.
    """
    if config.dataset == "stdlib":
        return "stdlib/" + ".".join(map(str, sys.version_info[:3]))
    return _builder(config).info.full_name


def open_documents(config: DataConfig, split: str) -> Documents:
    """The documents of a split; downloaded and prepared under `config.directory` where they are not
    yet.

    Raises ConfigError for an unknown data set or split or one without text, OSError where preparing
    it fails.
    """
    builder = _builder(config)
    _check_text(config, builder)
    if not _is_prepared(builder):
        with exclusive(config.path / "tfds" / f"{builder.name}.lock") as alone:
            # what killed preparations have left; with no lock, another process may be at work there
            if alone:
                for stale in Path(builder.data_dir).parent.glob("incomplete.*"):
                    shutil.rmtree(stale, ignore_errors=True)
            builder = _prepared(config)
    _check_split(config, builder, split)
    return Documents(os.fspath(builder.data_dir), split)


def check_dataset(config: DataConfig) -> None:
    """Raises ConfigError for a data set that TFDS doesn't know or that has no text, and for a split
    that it lacks, if that is known.

    Nothing is downloaded, and JAX is not imported, nor TFDS where it is not needed.
    """
    splits = (config.train_split, config.validation_split)
    if config.dataset == "stdlib" and {"train", "validation"}.issuperset(splits):
        return
    builder = _builder(config)
    _check_text(config, builder)
    if _is_prepared(builder):
        for split in splits:
            _check_split(config, builder, split)


def _check_text(config: DataConfig, builder: "tfds.core.DatasetBuilder") -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    if not (
        isinstance(features, tfds.features.FeaturesDict)
        and "text" in features
        and isinstance(features["text"], tfds.features.Text)
    ):
        raise ConfigError(
            f"data.dataset={config.dataset!r} has no feature 'text' of text: set data.dataset to one that has"
        )


def _check_split(config: DataConfig, builder: "tfds.core.DatasetBuilder", split: str) -> None:
    try:
        builder.info.splits[split]
    except (KeyError, ValueError):
        splits = " or ".join(repr(name) for name in builder.info.splits)
        raise ConfigError(
            f"split {split!r} is not one of data.dataset={config.dataset!r}: set the split to {splits}"
        ) from None


def _builder(config: DataConfig) -> "tfds.core.DatasetBuilder":
    if not _NAME.fullmatch(config.dataset):
        raise ConfigError(
            f"data.dataset={config.dataset!r} is not a name: set data.dataset to 'stdlib' or TFDS's 'name/config:version'"
        )
    import tensorflow_datasets as tfds

    import moe.data.stdlib  # noqa: F401  (defining the builder makes its name known to TFDS)

    directory = config.path / "tfds"
    try:
        return tfds.builder(
            config.dataset, data_dir=os.fspath(directory), file_format="array_record"
        )
    except (
        ValueError,
        AssertionError,
    ) as error:  # an unknown name or config, or an unknown version
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"data.dataset={config.dataset!r}: {reason}: set data.dataset to a name that TFDS lists"
        ) from None


def _is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    return Path(
        builder.data_dir, "dataset_info.json"
    ).exists()  # the builder's own test warns where nothing is there yet


def _prepared(config: DataConfig) -> "tfds.core.DatasetBuilder":
    builder = _builder(config)
    if _is_prepared(builder):  # by whoever had the lock before
        return builder
    import tensorflow_datasets as tfds

    if builder.name == "stdlib":  # TFDS has a bar for each of its phases, which here take a second
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except (ImportError, OSError, ValueError, AssertionError) as error:
        builder = _builder(config)
        if not _is_prepared(builder):  # otherwise another host, behind another lock, was quicker
            reason = str(error).split("\n")[0]
            raise OSError(
                f"data.dataset={config.dataset!r} could not be prepared in {builder.data_dir}: {reason}"
            ) from error
    finally:
        tfds.enable_progress_bar()
    return builder
