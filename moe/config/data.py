"""Configures the data: where text comes from, and how it becomes rows of tokens."""

import dataclasses
from pathlib import Path

from moe.config.checks import (
    ConfigError,
    check_path,
    check_positive,
    check_range,
    check_types,
    expand_path,
    show,
)

BYTE_VOCABULARY = 256  # token ids that the byte tokenizer produces
MAX_SEQUENCE_LENGTH = 2**24  # rotary positions are float32, which cannot tell larger ones apart


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Says where the text comes from and how it becomes rows of tokens."""

    # The data set: "text:PATH" (your own files: a file, a directory or a glob, here, at gs:// or at
    # s3://), "arrow:PATH" (a directory that Hugging Face's datasets have saved), "tokens:PATH" (a
    # directory of token files), "stdlib" (the Python standard library), or a TFDS name,
    # "name/config:version".
    dataset: str = "stdlib"
    text_field: str = "text"  # the field of an example that holds its text
    # Whether documents of "text:PATH" that cannot be read are counted and left out. They are errors
    # otherwise.
    skip_bad_documents: bool = False
    train_split: str = "train"  # the split that the model is trained on
    validation_split: str = "validation"  # the split that evaluations read
    # How text becomes token ids: "byte" takes its UTF-8 bytes. Otherwise this is the path of a
    # tokenizer.json (Hugging Face), a SentencePiece model or a tiktoken file.
    tokenizer: str = "byte"
    split_pattern: str = ""  # the regular expression that a tiktoken file needs and does not hold
    # Tokens that no text ever becomes. Those that the tokenizer's file lacks get the next ids.
    special_tokens: tuple[str, ...] = ()
    # The path of a Jinja template that turns conversations into text. The text field then holds
    # lists of messages, and answers alone are learnt.
    chat_template: str = ""
    sequence_length: int = 256  # the number of tokens in a row
    # The share of documents whose middle task "fill_in_the_middle" moves to their end.
    middle_rate: float = 0.5
    # The directory of TFDS's files and of the prepared rows. All hosts of a run must see it.
    directory: str = "~/.cache/moe"

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "sequence_length", "middle_rate")
        check_range(self, 0.0, 1.0, "middle_rate")
        check_range(self, 1, MAX_SEQUENCE_LENGTH, "sequence_length")
        check_path("directory", self.directory)
        self._check_tokenizer()
        if self.chat_template:
            check_path("chat_template", self.chat_template)

    def _check_tokenizer(self) -> None:
        """Raises ConfigError for fields of the tokenizer that cannot belong together."""
        check_path("tokenizer", self.tokenizer)
        if self.split_pattern and self.tokenizer == "byte":
            raise ConfigError(
                f"split_pattern={show(self.split_pattern)} is for a tiktoken file, and "
                "tokenizer='byte' splits nothing: leave split_pattern out, or set tokenizer"
            )
        for number, name in enumerate(self.special_tokens):
            if not name or name in self.special_tokens[:number]:
                what = "holds an empty name" if not name else f"names {show(name)} twice"
                raise ConfigError(
                    f"special_tokens={show(self.special_tokens)} {what}: "
                    "set special_tokens to names that differ"
                )

    @property
    def path(self) -> Path:
        """Returns `directory` with its ~ expanded.

        Raises ConfigError where the home directory is not known, as in some containers.
        """
        return Path(expand_path("data.directory", self.directory))
