"""Provides a small data set of documents that are easy to tell apart, prepared by TFDS once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import tensorflow_datasets as tfds

from moe.config import DataConfig
from moe.data.prepare import PreparedRows, prepare

TRAIN = [
    "" if i % 100 == 50 else f"document {i}: " + chr(ord("a") + i % 26) * (i % 7) + "é" * (i % 3)
    for i in range(600)
]


class SmallText(tfds.core.GeneratorBasedBuilder):
    """Has 600 training documents in three shards, 6 of them empty, and two tiny splits."""

    VERSION = tfds.core.Version("1.2.3")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="plain"),
        tfds.core.BuilderConfig(name="no_text"),
    ]
    before_generating: ClassVar[Callable[[], None]] = lambda: None

    def _info(self) -> tfds.core.DatasetInfo:
        feature = "text" if self.builder_config.name == "plain" else "title"
        features = tfds.features.FeaturesDict({feature: tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        texts = {"train": TRAIN, "validation": ["ab", "cdé"], "blank": ["", ""]}
        return {split: self._generate_examples(documents) for split, documents in texts.items()}

    def _generate_examples(self, texts: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
        type(self).before_generating()
        for i, text in enumerate(texts):
            yield i, {next(iter(self.info.features)): text}


@pytest.fixture(autouse=True, scope="session")
def _quiet_tfds() -> None:
    tfds.disable_progress_bar()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Returns the config for rows of 8 tokens, in a directory that a test must not change."""
    return DataConfig(
        dataset="small_text/plain",
        sequence_length=8,
        directory=str(tmp_path_factory.mktemp("small")),
    )


@pytest.fixture(scope="session")
def rows(small: DataConfig) -> PreparedRows:
    return prepare(small, "train")


@pytest.fixture
def fresh(small: DataConfig, rows: PreparedRows, tmp_path: Path) -> DataConfig:
    """Returns the config with a new directory, where TFDS has prepared the data set."""
    (tmp_path / "tfds").symlink_to(Path(small.directory, "tfds"))
    return DataConfig(dataset=small.dataset, sequence_length=8, directory=str(tmp_path))
