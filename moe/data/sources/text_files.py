"""Builds a TFDS data set from the user's own files.

The text of the files is copied into ArrayRecord once, so that it cannot change under a job that
reads it. The name of the data set follows from the files' names, sizes and times.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_builder
from tqdm import tqdm

from moe.config import ConfigError, DataConfig
from moe.data.sources import readers
from moe.data.sources.document import Document
from moe.data.sources.listing import (
    LINES,
    SPLITS,
    Listing,
    SourceFile,
    check_split,
    explained,
    find_files,
    is_plain,
)
from moe.data.sources.records import FEATURES, RecordDocuments, RecordWriter
from moe.data.sources.stdlib import is_validation
from moe.data.sources.tfds import is_prepared, prepare_builder
from moe.files import close_named

_TRAIN_SHARE = 0.95  # of the bytes of a single plain file
_SKIPPED = "skipped.txt"  # the file that lists the documents which could not be read


class TextFiles(dataset_builder.FileReaderBuilder):
    """Reads the files at a path, as docs/data/sources.md says.

    It writes the records itself, because TFDS's writer would hold up to 1 GB of them in memory.
    """

    VERSION = tfds.core.Version("1.0.0")  # of the rules by which files become documents

    def __init__(self, config: DataConfig) -> None:
        self._path = config.dataset.removeprefix("text:")
        self._text_field = config.text_field
        self._skips = config.skip_bad_documents
        self._listing = find_files(self._path)
        identity = [self._listing.fingerprint, self._text_field, self._skips]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        readable = re.sub(r"\W+", "_", self._path, flags=re.ASCII)[-32:].strip("_")
        self.content = f"{readable}-{digest}"
        directory = config.path / "tfds" / "text" / self.content
        super().__init__(data_dir=os.fspath(directory), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in FEATURES})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _download_and_prepare(
        self, dl_manager: tfds.download.DownloadManager, download_config: Any = None
    ) -> None:
        directory = Path(self.data_dir)
        writers = {split: RecordWriter(directory, split) for split in SPLITS}

        def refuse(place: str, reason: str) -> None:
            if skipped is None:
                fix = "or set data.skip_bad_documents to count and skip such documents"
                raise ConfigError(f"{place} {reason}, {fix}")
            try:
                skipped.write(f"{place} {reason}\n")
            except OSError as error:  # which would be taken for an error of reading the document
                raise RuntimeError(f"{path} cannot be written: {error.strerror}") from None

        with contextlib.ExitStack() as stack:
            path = directory / _SKIPPED
            skipped = path.open("w", encoding="utf-8") if self._skips else None
            if skipped is not None:
                stack.callback(close_named, skipped)
            for split, document in read_documents(self._listing, self._text_field, refuse):
                writers[split].write(document)
        if find_files(self._path).files != self._listing.files:
            raise ConfigError(
                f"data.dataset='text:{self._path}' has changed while it was read: "
                "run the same command again when its files are complete"
            )
        self.info.set_splits(tfds.core.SplitDict(list(self._finish(writers))))

    def _finish(self, writers: dict[str, RecordWriter]) -> Iterator[tfds.core.SplitInfo]:
        """Yields what TFDS knows of each split that has documents."""
        for split, writer in writers.items():
            if writer.shard_lengths:
                template = self._get_filename_template(split)
                writer.finish(template)
                yield tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=writer.shard_lengths,
                    num_bytes=writer.num_bytes,
                    filename_template=template,
                )


def read_documents(
    listing: Listing, text_field: str, refuse: readers.Refuse
) -> Iterator[tuple[str, Document]]:
    """Yields all documents, each with its split, in the order of the files' names."""
    folders = [file.name.split("/")[0] if "/" in file.name else "" for file in listing.files]
    has_folders = {*folders}.issuperset(SPLITS)
    chosen = [
        (folder, file)
        for folder, file in zip(folders, listing.files, strict=True)
        if not has_folders or folder in SPLITS
    ]
    _print_left_out(listing, len(chosen))
    is_alone = len(chosen) == 1 and is_plain(chosen[0][1])
    with tqdm(
        desc=f"reading text:{listing.path}",
        total=sum(file.size for _, file in chosen),
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for folder, file in chosen:
            for part, document in _read_file(listing, file, text_field, refuse, is_alone, bar):
                if is_alone:
                    # A file of one line has nothing for training, and its split must not exist.
                    if document.text:
                        yield SPLITS[part], document
                else:
                    is_held_out = is_validation(document.text)
                    yield folder if has_folders else SPLITS[is_held_out], document


def _print_left_out(listing: Listing, num_chosen: int) -> None:
    """Prints in one line how many files are not read."""
    num_left_out = len(listing.files) - num_chosen + listing.num_left_out
    if num_left_out:
        print(
            f"text:{listing.path}: {num_chosen} files are read, and {num_left_out} left out, which "
            "are hidden, of other kinds, or beside the folders train and validation",
            file=sys.stderr,
        )


def _read_file(
    listing: Listing,
    file: SourceFile,
    text_field: str,
    refuse: readers.Refuse,
    is_alone: bool,
    bar: tqdm,
) -> Iterator[tuple[int, Document]]:
    """Yields the documents of a file, and moves the bar.

    A plain file that stands alone has two parts, 0 and 1, and its documents come with their part.
    """
    address = listing.address(file)

    def refuse_with_address(place: str, reason: str) -> None:
        refuse(address.removesuffix(file.name) + place, reason)

    before = bar.n
    with explained(address), listing.open(file) as stream:
        if is_plain(file):
            stops = (_last_lines(stream, file.size), file.size) if is_alone else (file.size,)
            documents = readers.read_plain(stream, file.name, refuse_with_address, stops)
        else:
            is_lines = file.name.endswith(LINES)
            read = readers.read_lines if is_lines else readers.read_parquet
            documents = ((0, d) for d in read(stream, file.name, refuse_with_address, text_field))
        for part, document in documents:
            yield part, document
            # A Parquet file is not read from its beginning to its end.
            if not file.name.endswith(".parquet"):
                bar.update(before + stream.tell() - bar.n)
    bar.update(before + file.size - bar.n)


def _last_lines(stream: IO[bytes], size: int) -> int:
    """Returns where the last lines begin, which are at least 5 % of a file, and rewinds it."""
    stop = int(size * _TRAIN_SHARE)
    while stop > 0:
        start = max(0, stop - readers.LARGEST_PLAIN)
        stream.seek(start)
        newline = stream.read(stop - start).rfind(b"\n")
        if newline >= 0:
            stop = start + newline + 1
            break
        stop = start
    stream.seek(0)
    return stop


def open_text_files(config: DataConfig, split: str) -> RecordDocuments:
    """Returns the documents of a split of the user's files, which are copied first if need be.

    Raises ConfigError for files that cannot be read and for a split without documents.
    """
    check_split(config.dataset, split)
    builder = TextFiles(config)
    is_new = not is_prepared(builder)
    builder = prepare_builder(config, builder, lambda: TextFiles(config))
    skipped = Path(builder.data_dir, _SKIPPED)
    if is_new and skipped.exists() and (places := skipped.read_text("utf-8").splitlines()):
        print(
            f"{config.dataset}: {len(places)} documents were skipped, such as {places[0]}; "
            f"{skipped} lists them",
            file=sys.stderr,
        )
    if not builder.info.splits:
        raise ConfigError(
            f"data.dataset={config.dataset!r} holds no text: its files are empty, or all of their "
            "documents were skipped: set data.dataset to another"
        )
    if split not in builder.info.splits:
        raise ConfigError(
            f"split {split!r} of data.dataset={config.dataset!r} holds no document, since 5 % of "
            "all are validation: make a directory with the folders train and validation"
        )
    return RecordDocuments(os.fspath(builder.data_dir), split)


def source_name(config: DataConfig) -> str:
    """Returns a name that is another one if any of the files is changed, added or removed."""
    builder = TextFiles(config)
    return f"text/{builder.content}/{builder.version}"


def splits_with_documents(config: DataConfig) -> tuple[str, ...]:
    """Returns the splits of the user's files that hold documents, which are copied if need be."""
    builder = prepare_builder(config, TextFiles(config), lambda: TextFiles(config))
    return tuple(builder.info.splits)
