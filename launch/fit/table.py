"""The flags that say which table is fitted and what its columns hold, and how they are read."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from moe.config import ConfigError
from moe.scaling.experiments.runs import Runs, read_bytes, read_runs

# The help lists the flags that are defined here as the command's own.
flags.disclaim_key_flags()

# The columns that a flag may name, and what they hold.
COLUMNS = {
    "parameters": "all parameters of the model",
    "tokens": "the tokens that it was trained on",
    "loss": "the loss at the end of training",
    "active_parameters": "the parameters that a token uses; all of a dense model's by default",
    "embedding_parameters": "the parameters of embeddings; 0, if the column is missing",
    "flops": "the training FLOPs",
    "run": "the run's name; rows of one name are drawn together by the bootstrap",
    "status": "finished, or why there is no result",
    "dataset": "the training data",
    "tokenizer": "the tokenizer",
    "repeats": "how often the text was repeated: tokens / distinct tokens",
    "experts": "the number of experts; 1 for a dense model",
    "experts_per_token": "how many experts a token uses; 1, if the column is missing",
    "granularity": "feed-forward width of the dense model / width of an expert",
    "sparsity": "1 - experts_per_token / experts",
    "learning_rate": "the highest learning rate",
    "batch_tokens": "the tokens of a step",
    "vocab_size": "the size of the vocabulary",
}
COUNTS = {"ones": 1.0, "thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
FLOPS = {"FLOP": 1.0, "PF-days": 1e15 * 24 * 3600}
MOST_FLOPS = 1e40  # of a budget. Products of its counts are then far from the largest float.
LOSSES = {"nats": 1.0, "bits": math.log(2)}
# The flags of units: their name, the units, the columns that have it, and what it is for.
UNITS = (
    (
        "parameters_unit",
        COUNTS,
        ("parameters", "active_parameters", "embedding_parameters"),
        "The unit of the columns of parameters.",
    ),
    ("tokens_unit", COUNTS, ("tokens",), "The unit of the column of tokens."),
    ("flops_unit", FLOPS, ("flops",), "The unit of the column of training FLOPs."),
    (
        "loss_unit",
        LOSSES,
        ("loss",),
        "The unit of the losses, per token or per byte. Bits are turned into nats before the fit.",
    ),
)


def define_flags(flag_values: flags.FlagValues) -> None:
    """Defines the flags of the table."""
    flags.DEFINE_string(
        "runs",
        None,
        "The table of runs, a CSV or Parquet file. Required.",
        required=True,
        flag_values=flag_values,
    )
    flags.DEFINE_multi_string(
        "where",
        None,
        "COLUMN=VALUE keeps only the rows that have this value in this column of the table, or "
        "one of several, as in COLUMN=A,B.",
        flag_values=flag_values,
    )
    for name, units, _, description in UNITS:
        flags.DEFINE_enum(
            name, next(iter(units)), list(units), description, flag_values=flag_values
        )
    for name, content in COLUMNS.items():
        flags.DEFINE_string(
            f"column_{name}", None, f"The column that holds {content}.", flag_values=flag_values
        )


def read_table(path: Path, values: flags.FlagValues) -> tuple[Runs, str]:
    """Returns the runs that the flags choose, in nats, FLOP and ones, and the file's SHA-256.

    Raises ConfigError.
    """
    named = {name: getattr(values, f"column_{name}") for name in COLUMNS}
    columns = {name: str(column) for name, column in named.items() if column is not None}
    scale: dict[str, float] = {}
    for flag, units, names, _ in UNITS:
        scale |= dict.fromkeys(names, units[str(getattr(values, flag))])
    where = read_where(values.where or [])
    content = read_bytes(path)
    runs = read_runs(path, columns, where=where, scale=scale, content=content)
    return runs, hashlib.sha256(content).hexdigest()


def read_where(texts: Sequence[str]) -> dict[str, str]:
    """Returns the values that columns must have. Raises ConfigError."""
    where = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not column or not equals:
            raise ConfigError(
                f"--where={text} names no column and value: write --where=COLUMN=VALUE"
            )
        if where.setdefault(column, value) != value:
            raise ConfigError(
                f"--where={text} and --where={column}={where[column]} leave no row: give one"
            )
    return where


def read_budgets(texts: Sequence[str]) -> list[float]:
    """Returns the FLOPs of --budget, in order. Raises ConfigError."""
    budgets = []
    for text in texts:
        try:
            budget = float(text)
        except ValueError:
            budget = math.nan
        if not 1 <= budget <= MOST_FLOPS:
            raise ConfigError(
                f"--budget={text} is no number of FLOPs from 1 to {MOST_FLOPS:g}: write numbers "
                "such as 1e20, with commas between them"
            )
        budgets.append(budget)
    return sorted(set(budgets))
