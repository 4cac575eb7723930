"""Says which source each training example comes from, and which of the source's examples it is.

Examples are numbered through the whole run. In a stage, every block of `MIXTURE_BLOCK` examples has
each source exactly as often as its quota says, in a random order that follows from (seed, stage,
block). So the place of an example follows from its number alone, and nothing else has to be saved.
Each source counts its own examples, and so has epochs of its own.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from moe.config import MIXTURE_BLOCK, ConfigError, DataConfig, RunConfig
from moe.data.rows import JoinedRows, Rows
from moe.data.sources import naming_source

# What prepared rows know of themselves.
_KNOWN_OF_ROWS = (
    "packing",
    "fullness",
    "num_cut",
    "num_documents",
    "num_tokens",
    "num_bytes",
    "sha256",
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Maps the numbers of a run's examples to sources, which are numbered from 0."""

    seed: int
    starts: tuple[int, ...]  # the example with which each stage begins
    quotas: tuple[tuple[int, ...], ...]  # [stage][source]: how many examples of a block

    def locate(self, example: int) -> tuple[int, int]:
        """Returns the source of an example, and the number that the example has in its source."""
        if len(self.quotas[0]) == 1:
            return 0, example
        stage = bisect.bisect_right(self.starts, example) - 1
        block, index = divmod(example - self.starts[stage], MIXTURE_BLOCK)
        sources, ranks = self._block(stage, block)
        source = int(sources[index])
        before = self._counts_before_stages[stage][source] + block * self.quotas[stage][source]
        return source, before + int(ranks[index])

    def counts(self, examples: int) -> list[int]:
        """Returns how many of the first `examples` examples come from each source."""
        if len(self.quotas[0]) == 1:
            return [examples]
        stage = max(0, bisect.bisect_left(self.starts, examples) - 1)
        counts = self._counts_in_stage(stage, examples - self.starts[stage])
        return [a + b for a, b in zip(self._counts_before_stages[stage], counts, strict=True)]

    def _counts_in_stage(self, stage: int, examples: int) -> list[int]:
        """Returns how many of a stage's first `examples` examples come from each source."""
        blocks, rest = divmod(examples, MIXTURE_BLOCK)
        sources, _ = self._block(stage, blocks)
        rests = np.bincount(sources[:rest], minlength=len(self.quotas[stage])).tolist()
        return [
            blocks * quota + rest for quota, rest in zip(self.quotas[stage], rests, strict=True)
        ]

    @functools.cached_property
    def _counts_before_stages(self) -> list[list[int]]:
        """Returns how many examples of each source come before each stage."""
        totals = [[0] * len(self.quotas[0])]
        for stage, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            counts = self._counts_in_stage(stage, stop - start)
            totals.append([a + b for a, b in zip(totals[-1], counts, strict=True)])
        return totals

    def _block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each example of a block, and its rank among those of its source."""
        return _ordered_block(self.seed, stage, block, self.quotas[stage])


# A batch lies in one or two blocks, and the batches that threads read ahead lie near it.
@functools.lru_cache(maxsize=4)
def _ordered_block(
    seed: int, stage: int, block: int, quotas: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sources of a block's examples in random order, and each one's rank in its source.

    NumPy promises that the numbers of a SeedSequence never change. It does not promise that of
    a Generator's.
    """
    keys = np.random.SeedSequence([seed, stage, block]).generate_state(MIXTURE_BLOCK, np.uint64)
    sources = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(keys, kind="stable")]
    ranks = np.empty(MIXTURE_BLOCK, np.int64)
    for source, quota in enumerate(quotas):
        ranks[sources == source] = np.arange(quota)
    return sources, ranks


def row_of_example(example: int, num_rows: int, seed: int) -> int:
    """Returns the row that is a source's example of this number.

    Every epoch has each row once, in a random order of its own.
    """
    epoch, index = divmod(example, num_rows)
    return index_shuffle(index, max_index=num_rows - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=256)
def _epoch_seed(seed: int, epoch: int) -> int:
    # With seed + epoch, the second epoch of seed 0 would have the order of seed 1's first.
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """Gives access to the rows that a run is trained on, by the numbers of its examples."""

    rows: JoinedRows
    mixture: Mixture  # whose sources are in the order of those of `rows`

    def example(self, number: int) -> dict[str, np.ndarray]:
        """Returns the fields of the row that is the run's example of this number."""
        source, number = self.mixture.locate(number)
        rows = self._sources[source]
        return rows[row_of_example(number, len(rows), self.mixture.seed)]

    def epochs(self, examples: int) -> dict[str, float]:
        """Returns how often each source is read in the first `examples` examples of the run."""
        counts = self.mixture.counts(examples)
        named = zip(self.rows.sources.items(), counts, strict=True)
        return {name: count / len(rows) for (name, rows), count in named}

    @functools.cached_property
    def _sources(self) -> tuple[Rows, ...]:
        return tuple(self.rows.sources.values())


Open = Callable[[RunConfig, str], Rows]  # opens a split of the only source of a config


def open_training(config: RunConfig, open_rows: Open) -> TrainingRows:
    """Opens the rows that a run is trained on, all sources of them.

    Raises ConfigError if the run would read a source more often than the config allows.
    """
    splits = [source.train_split for source in config.data.sources]
    rows = TrainingRows(_open(config, open_rows, splits), make_mixture(config.data, config.seed))
    _check_epochs(config, rows)
    return rows


def open_validation(config: RunConfig, open_rows: Open) -> JoinedRows:
    """Opens the rows of each source that evaluations read."""
    return _open(config, open_rows, [source.validation_split for source in config.data.sources])


def _open(config: RunConfig, open_rows: Open, splits: list[str]) -> JoinedRows:
    """Opens a split of each source."""
    rows = {}
    for source, split in zip(config.data.sources, splits, strict=True):
        one = config
        if config.data.mixture:
            one = dataclasses.replace(config, data=config.data.for_source(source))
        with naming_source(source.name):
            rows[source.name] = open_rows(one, split)
    return JoinedRows(rows)


def make_mixture(data: DataConfig, seed: int) -> Mixture:
    """Returns the mixture of a config's sources; without a mixture, that of its only source."""
    return Mixture(seed, data.stages, data.quotas)


def describe_sources(config: RunConfig, rows: TrainingRows) -> list[dict[str, Any]]:
    """Returns what the whole run reads of each source, and what is known of its rows.

    A task's own rows need not know more of themselves than their number: the rest is None.
    """
    examples = config.train.steps * config.train.batch_size
    epochs = rows.epochs(examples)
    described = []
    for source in config.data.sources:
        one = rows.rows.sources[source.name]
        described.append(
            {
                "name": source.name,
                "source": getattr(one, "source", source.dataset),
                "split": source.train_split,
                "share": epochs[source.name] * len(one) / examples,
                "epochs": epochs[source.name],
                "max_epochs": source.max_epochs,
                "num_rows": len(one),
                **{name: getattr(one, name, None) for name in _KNOWN_OF_ROWS},
            }
        )
    return described


def _check_epochs(config: RunConfig, rows: TrainingRows) -> None:
    """Raises ConfigError for a source that the whole run would read more often than it may."""
    size = config.train.batch_size
    epochs = rows.epochs(config.train.steps * size)
    for source in config.data.sources:
        limit, planned = source.max_epochs, epochs[source.name]
        if limit and planned > limit:
            most = math.floor(config.train.steps * limit / planned)
            fewer = f", or set train.steps to about {most}" if most else ""
            raise ConfigError(
                f"data.mixture.{source.name}.max_epochs={limit:g} is less than the "
                f"{planned:.3g} epochs that {config.train.steps} steps of {size} rows read of the "
                f"source's {len(rows.rows.sources[source.name]):,} rows: lower its weights, or "
                f"raise max_epochs{fewer}"
            )
