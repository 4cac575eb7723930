"""Builds a TFDS data set from the Python standard library, a real text on every machine."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_VALIDATION_HASHES = 13  # of the 256 values of a hash's first byte: 5 % of the files


class Stdlib(tfds.core.GeneratorBasedBuilder):
    """Reads the .py files of the running Python's standard library, without its tests.

    The version of the data set is Python's.
    """

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

    def _info(self) -> tfds.core.DatasetInfo:
        return text_with_path(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {
            "train": self._generate_examples(False),
            "validation": self._generate_examples(True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        for path, text in files_of_split(validation):
            yield path, {"text": text, "path": path}


def text_with_path(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
    """Returns TFDS's description of a data set of texts with the paths of their files, in order."""
    features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
    return tfds.core.DatasetInfo(
        builder=builder, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )


def files_of_split(validation: bool) -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each file of the library in the validation or train split."""
    for path, text in python_files(Path(sysconfig.get_path("stdlib"))):
        if is_validation(text) == validation:
            yield path, text


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the path relative to `root` and the text of each .py file, in the order of the paths.

    Tests, empty files and files that are not UTF-8 are left out.
    """
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(relative.parts):
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if text:
                yield relative.as_posix(), text


def is_validation(text: str) -> bool:
    """Returns whether a document belongs to the validation split.

    That depends only on its contents, so all copies of a document are in the same split.
    """
    return hashlib.sha256(text.encode()).digest()[0] < _VALIDATION_HASHES
