"""Configures the data: where text comes from, and how it becomes rows of tokens."""

import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from moe.config.checks import (
    ConfigError,
    check_not_negative,
    check_path,
    check_positive,
    check_range,
    check_types,
    expand_path,
    show,
)

BYTE_VOCABULARY = 256  # token ids that the byte tokenizer produces
MAX_SEQUENCE_LENGTH = 2**24  # rotary positions are float32, which cannot tell larger ones apart
MIXTURE_BLOCK = 65_536  # the number of examples in which each source has its exact share
_SOURCE_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)  # it is part of flags and of metrics' names


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Describes one source of a mixture: its text, and how much of it a run reads."""

    name: str = ""  # the name of the source in flags and metrics
    dataset: str = ""  # the data set, as in data.dataset
    text_field: str = "text"  # the field of an example that holds its text
    train_split: str = "train"  # the split that the model is trained on
    validation_split: str = "validation"  # the split that evaluations read
    # The weight of the source in each stage of data.stages. Its share of a stage's examples is its
    # weight over the sum of all sources' weights.
    weights: tuple[float, ...] = ()
    # How often the run may read the source. A run that would read it more often is refused before
    # it starts. 0 sets no limit.
    max_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(self, "max_epochs")

    @classmethod
    def config_dict(cls, **fields: Any) -> dict[str, Any]:
        """Returns the fields of a source of data.mixture as a dict, also those that have a default.

        So a flag can change each of them.
        """
        return {field.name: field.default for field in dataclasses.fields(cls)[1:]} | fields

    def check_in_mixture(self, num_stages: int) -> None:
        """Raises ConfigError for a source that cannot be one of a mixture with so many stages."""
        if not _SOURCE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"mixture has a source named {self.name!r}, and a name becomes part of flags and "
                "metrics: use a letter, and then letters, digits and _"
            )
        field = f"mixture.{self.name}"
        if not self.dataset:
            raise ConfigError(f"{field}.dataset='' names no data set: set it to one")
        if len(self.weights) != num_stages:
            count = f"{len(self.weights)} weight{'s' * (len(self.weights) != 1)}"
            raise ConfigError(
                f"{field}.weights={self.weights} has {count}, and data.stages has {num_stages} "
                f"stage{'s' * (num_stages != 1)}: set one weight for each stage"
            )
        for weight in self.weights:
            if weight <= 0:
                raise ConfigError(
                    f"{field}.weights={self.weights} has a weight of 0 or below: "
                    "set each weight to more than 0, or leave the source out"
                )


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
    # How documents become rows: "concat" lays them end to end and cuts them at the ends of rows,
    # "best_fit" cuts only those that are longer than a row, and "pad" gives each a row of its own.
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    # Several sources, each under a name: data.mixture.code.dataset, data.mixture.code.weights and
    # so on. They take the place of dataset, train_split and validation_split.
    mixture: tuple[SourceConfig, ...] = ()
    # The numbers of examples consumed at which the weights of the mixture change.
    stages: tuple[int, ...] = (0,)
    # The share of documents whose middle task "fill_in_the_middle" moves to their end.
    middle_rate: float = 0.5
    # The directory of TFDS's files and of the prepared rows. All hosts of a run must see it.
    directory: str = "~/.cache/moe"

    def __post_init__(self) -> None:
        check_types(self, wide=("stages",))
        check_positive(self, "sequence_length", "middle_rate")
        check_range(self, 0.0, 1.0, "middle_rate")
        check_range(self, 1, MAX_SEQUENCE_LENGTH, "sequence_length")
        check_path("directory", self.directory)
        self._check_stages()
        if self.mixture:
            self._check_mixture()
        self._check_tokenizer()
        if self.chat_template:
            self._check_chat()
        self._check_token_files()
        self._check_skipping()

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

    def _check_chat(self) -> None:
        """Raises ConfigError for conversations that would be cut."""
        check_path("chat_template", self.chat_template)
        if self.packing == "concat":
            raise ConfigError(
                "packing='concat' cuts conversations at the ends of rows, so that an answer may "
                "stand without its question: set packing to 'best_fit' or 'pad'"
            )

    def _check_token_files(self) -> None:
        """Raises ConfigError for fields without effect on token files, which are read in place."""
        is_read_in_place = any(is_token_files(one.dataset) for one in self.sources)
        for name in ("packing", "chat_template"):
            value = getattr(self, name)
            if is_read_in_place and value != getattr(DataConfig, name):
                raise ConfigError(
                    f"{name}={show(value)} has no effect on the token files of dataset='tokens:"
                    f"...', which are read as they are: leave {name} out"
                )

    def _check_skipping(self) -> None:
        """Raises ConfigError where bad documents would be skipped, and none ever are."""
        has_own_files = any(source.dataset.startswith("text:") for source in self.sources)
        if self.skip_bad_documents and not has_own_files:
            raise ConfigError(
                f"skip_bad_documents=True has no effect on dataset={show(self.dataset)}, only on "
                "'text:...': leave skip_bad_documents out"
            )

    def _check_stages(self) -> None:
        """Raises ConfigError for stages that do not follow each other, or that change nothing."""
        starts = self.stages
        if starts[:1] != (0,) or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ConfigError(
                f"stages={starts} does not begin with 0 and increase: "
                "set stages to the numbers of examples at which each stage begins, as in (0, 5000)"
            )
        if starts[-1] > sys.maxsize:
            raise ConfigError(
                f"stages={starts} goes beyond the last example: set it to at most {sys.maxsize}"
            )
        if len(starts) > 1 and not self.mixture:
            raise ConfigError(
                f"stages={starts} has no effect without data.mixture: "
                "set stages to (0,), or name the sources in data.mixture"
            )

    def _check_mixture(self) -> None:
        """Raises ConfigError for a mixture that cannot be read in its stages."""
        for name in _FIELDS_OF_A_SOURCE:
            value = getattr(self, name)
            if value != getattr(DataConfig, name):
                raise ConfigError(
                    f"{name}={value!r} has no effect with data.mixture: "
                    f"set data.mixture.NAME.{name} of each source"
                )
        for source in self.mixture:
            source.check_in_mixture(len(self.stages))
        # The stream must not depend on the order in which a file names its sources.
        by_name = {source.name: source for source in self.mixture}
        if len(by_name) < len(self.mixture):
            raise ConfigError("mixture names a source twice: give each source a name of its own")
        object.__setattr__(self, "mixture", tuple(by_name[name] for name in sorted(by_name)))
        for stage, quotas in enumerate(self.quotas):
            for source, quota in zip(self.mixture, quotas, strict=True):
                if not quota:
                    raise ConfigError(
                        f"mixture.{source.name}.weights={source.weights} gives the source no "
                        f"example in {MIXTURE_BLOCK:,} of stage {stage}: "
                        "set a larger weight, or leave the source out"
                    )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Returns the sources of the mixture, or the only one, whose name is ""."""
        if self.mixture:
            return self.mixture
        shared = {name: getattr(self, name) for name in _FIELDS_OF_A_SOURCE}
        return (SourceConfig(weights=(1.0,), **shared),)

    @property
    def quotas(self) -> tuple[tuple[int, ...], ...]:
        """Returns how many of `MIXTURE_BLOCK` examples each source has, for each stage."""
        return tuple(
            _largest_remainders([source.weights[stage] for source in self.sources])
            for stage in range(len(self.stages))
        )

    def for_source(self, source: SourceConfig) -> "DataConfig":
        """Returns the config of one source alone, without a mixture."""
        shared = {name: getattr(source, name) for name in _FIELDS_OF_A_SOURCE}
        return dataclasses.replace(self, mixture=(), stages=(0,), **shared)

    @property
    def path(self) -> Path:
        """Returns `directory` with its ~ expanded.

        Raises ConfigError where the home directory is not known, as in some containers.
        """
        return Path(expand_path("data.directory", self.directory))

    def with_validation_split(self, split: str) -> "DataConfig":
        """Returns the config in which evaluations read another split, of every source."""
        if not self.mixture:
            return dataclasses.replace(self, validation_split=split)
        sources = (dataclasses.replace(one, validation_split=split) for one in self.mixture)
        return dataclasses.replace(self, mixture=tuple(sources))

    @property
    def description(self) -> str:
        """Returns the data set, or the sources of the mixture with their weights, in one line."""
        if not self.mixture:
            return self.dataset
        sources = [
            f"{source.name}={source.dataset} {'/'.join(f'{w:g}' for w in source.weights)}"
            for source in self.mixture
        ]
        starts = f" from {'/'.join(map(str, self.stages))}" if len(self.stages) > 1 else ""
        return " + ".join(sources) + starts


# The fields that a source has in the mixture, and that DataConfig has for an only source.
_FIELDS_OF_A_SOURCE = tuple(
    field.name
    for field in dataclasses.fields(SourceConfig)
    if field.name in {field.name for field in dataclasses.fields(DataConfig)}
)


def is_token_files(dataset: str) -> bool:
    """Returns whether a data set is a directory of token files, which are read in place."""
    return dataset.startswith("tokens:")


def _largest_remainders(weights: Sequence[float]) -> tuple[int, ...]:
    """Divides `MIXTURE_BLOCK` examples among sources by their weights.

    Each source gets its share rounded down. The examples that are left go to those sources that
    rounding has taken most from. A weight is taken as its decimals say, so that 0.1 is 1/10.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight * MIXTURE_BLOCK / sum(exact) for weight in exact]
    quotas = [int(share) for share in shares]
    by_loss = sorted(range(len(shares)), key=lambda index: quotas[index] - shares[index])
    for index in by_loss[: MIXTURE_BLOCK - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)
