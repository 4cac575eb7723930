"""Configures the data: where text comes from, and how it becomes rows of tokens."""

import dataclasses
from pathlib import Path
from typing import Literal

from moe.config.checks import (
    check_path,
    check_positive,
    check_range,
    check_types,
    expand_path,
)

BYTE_VOCABULARY = 256  # token ids that the byte tokenizer produces
MAX_SEQUENCE_LENGTH = 2**24  # rotary positions are float32, which cannot tell larger ones apart


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says where the text comes from and how it becomes rows of tokens."""

    # The data set: "stdlib" (the Python standard library), or the TFDS name "name/config:version"
    # of any data set that has a "text" feature.
    dataset: str = "stdlib"
    text_field: str = "text"  # the field of an example that holds its text
    train_split: str = "train"  # the split that the model is trained on
    validation_split: str = "validation"  # the split that evaluations read
    tokenizer: Literal["byte"] = "byte"  # how text becomes token ids: "byte" takes its UTF-8 bytes
    sequence_length: int = 256  # the number of tokens in a row
    # The directory of TFDS's files and of the prepared rows. All hosts of a run must see it.
    directory: str = "~/.cache/moe"

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "sequence_length")
        check_range(self, 1, MAX_SEQUENCE_LENGTH, "sequence_length")
        check_path("directory", self.directory)

    @property
    def path(self) -> Path:
        """Returns `directory` with its ~ expanded.

        Raises ConfigError where the home directory is not known, as in some containers.
        """
        return Path(expand_path("data.directory", self.directory))
