"""A TFDS builder over the Python standard library: real text that is on every machine."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_VALIDATION_HASHES = 13  # of 256 values of a hash's first byte: 5 %


class Stdlib(tfds.core.GeneratorBasedBuilder):
    """The .py files of the running interpreter's standard library, tests left out; another Python
    is another version.
    """

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "path": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {
            "train": self._generate_examples(False),
            "validation": self._generate_examples(True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        for path, text in python_files(Path(sysconfig.get_path("stdlib"))):
            if is_validation(text) == validation:
                yield path, {"text": text, "path": path}


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """(path relative to root, text) of every non-empty UTF-8 .py file that is not a test, in the
    order of the paths.
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
    """Whether a document is held out. A function of its contents alone, so that no copy of it lies
    in the other split.
    """
    return hashlib.sha256(text.encode()).digest()[0] < _VALIDATION_HASHES
