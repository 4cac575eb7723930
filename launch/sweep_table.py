"""Writes what is known of each run of a sweep: a result file for each, and one table of all.

Runs may be trained by several processes or jobs at once, so each writes a file of its own,
results/IDENTITY.json. Its name is the hash of the run's config. So the result of a run is found
whatever the run is called. The table, runs.parquet and runs.csv, is gathered from these files.
"""

import dataclasses
import io
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from launch.series import read_series
from launch.sweep_directory import CSV_FILE, PARQUET_FILE, RESULTS
from moe.config import ConfigError, MeshConfig, RunConfig
from moe.data.prepare import open_split
from moe.scaling.experiments.sweep import Run, identity
from moe.scaling.flops import model_columns, planned_flops, planned_tokens
from moe.scaling.memory import state_bytes
from moe.storage.paths import RunPath, make_directory, write_whole
from moe.workdir.identity import digest
from moe.workdir.tracking import METRICS_FILE, read_metrics

LAST = 10  # logged steps at the end of a run over which the router's statistics are averaged

# The columns of the table, with the types that pyarrow gives them. docs/scaling_laws/sweeps.md says
# what each of them holds.
COLUMNS = {
    **dict.fromkeys(("run", "identity", "status", "reason"), "string"),
    **dict.fromkeys(("seed", "parameters", "active_parameters", "embedding_parameters"), "int64"),
    "tokens": "int64",
    **dict.fromkeys(("flops", "loss", "repeats"), "double"),
    **dict.fromkeys(("experts", "experts_per_token", "expert_dim"), "int64"),
    **dict.fromkeys(("granularity", "sparsity", "learning_rate"), "double"),
    **dict.fromkeys(("batch_tokens", "warmup_steps", "steps"), "int64"),
    **dict.fromkeys(("dataset", "tokenizer"), "string"),
    **dict.fromkeys(("vocab_size", "sequence_length"), "int64"),
    **dict.fromkeys(("worst_max_vio", "dropped_fraction", "step_seconds"), "double"),
    "memory_bytes": "int64",
    **dict.fromkeys(("code", "config"), "string"),
}
_ONE_DEVICE = MeshConfig(data=1)

Row = dict[str, Any]  # a value for each column, or None where it is not known


def planned_row(run: Run) -> Row:
    """Returns what is known of a run before it is trained, but for its config as JSON."""
    config = run.config
    model, length = config.model, config.data.sequence_length
    values = {
        "run": run.name,
        "identity": run.identity,
        "status": "waiting",
        "seed": config.seed,
        "tokens": planned_tokens(config),
        "flops": planned_flops(config),
        "expert_dim": model.moe.expert_dim if model.moe.num_experts else model.feed_forward_dim,
        "learning_rate": config.optimizer.learning_rate,
        "batch_tokens": config.train.batch_size * length,
        "warmup_steps": config.warmup_steps,
        "steps": config.train.steps,
        "dataset": config.data.description,
        "tokenizer": config.data.tokenizer,
        "vocab_size": model.vocab_size,
        "sequence_length": length,
        "memory_bytes": state_bytes(config, _ONE_DEVICE).total,
        **model_columns(config),
    }
    return {name: values.get(name) for name in COLUMNS}


def _config_json(config: RunConfig) -> str:
    """Returns a config as JSON, without paths."""
    values = config.to_dict()
    del values["data"]["directory"]
    return json.dumps(values)


def write_result(
    run: Run, workdir: RunPath, status: str, code: str, reason: str | None = None
) -> Row:
    """Writes the result file of a run with what its directory says, and returns its row.

    If the directory is damaged, the run has failed, so that the others can go on.
    """
    row = planned_row(run) | {"status": status, "code": code, "reason": reason}
    row["config"] = _config_json(run.config)
    try:
        if (workdir / run.name / METRICS_FILE).exists():
            row |= _measured(run.config, workdir / run.name)
        if status == "finished":
            row["repeats"] = row["tokens"] / _distinct_tokens(run.config)
    except ConfigError as error:
        row |= {"status": "failed", "reason": str(error)}
    make_directory(workdir / RESULTS)
    saved = row | {"sha256": digest(row)}
    write_whole(result_path(workdir, run.identity), json.dumps(saved, indent=1) + "\n")
    return row


def _distinct_tokens(config: RunConfig) -> int:
    """Returns how many tokens an epoch of a run's training data has, in its rows."""
    data = config.data
    if config.task == "span_corruption":
        data = dataclasses.replace(data, sequence_length=config.corrupted_row.tokens)
    rows = [open_split(data.for_source(source), source.train_split) for source in data.sources]
    return sum(map(len, rows)) * config.data.sequence_length


def result_path(workdir: RunPath, key: str) -> RunPath:
    """Returns the path of the result file of the run with the identity `key`."""
    return workdir / RESULTS / f"{key}.json"


def _measured(config: RunConfig, workdir: RunPath) -> Row:
    """Returns the columns that a run's metrics tell. Only the last step's validation counts."""
    metrics = read_metrics(workdir)
    losses = read_series(metrics, "validation/loss")
    speeds = read_series(metrics, "train/tokens_per_second").values
    is_last = bool(len(losses.steps)) and losses.steps[-1] == config.train.steps
    loss = float(losses.values[-1]) if is_last else None
    values = {
        name: statistics.fmean(map(float, series[-LAST:]))
        for name in ("worst_max_vio", "dropped_fraction")
        if len(series := read_series(metrics, f"router/{name}").values)
    }
    if len(speeds):
        batch_tokens = config.train.batch_size * config.data.sequence_length
        values["step_seconds"] = batch_tokens / statistics.median(map(float, speeds))
    return values | {"loss": loss if loss is None or math.isfinite(loss) else None}


def _fits(value: Any, kind: str) -> bool:
    """Returns whether a value may stand in a column of this type. A value may be missing."""
    if value is None or kind == "string":
        return value is None or isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, float):
        return kind == "double"
    return abs(value) < 2**63


def read_result(workdir: RunPath, run: Run) -> Row | None:
    """Returns the row of a run's result file, under the run's name, or None if it has none.

    Columns that the version which wrote it did not have are None, and older versions wrote no
    checksum. Raises ConfigError for a damaged file, and for the result of another config: a default
    may have changed since it was written.
    """
    path = result_path(workdir, run.identity)
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        is_whole = row.pop("sha256", None) in (None, digest(row))
        is_whole = is_whole and all(_fits(value, COLUMNS[name]) for name, value in row.items())
        is_whole = is_whole and row["identity"] == run.identity
        trained = RunConfig.from_config_dict(json.loads(row["config"])) if is_whole else None
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        trained = None
    if trained is None:
        raise ConfigError(f"{path} is not what was written: delete it, and the run is done again")
    if identity(trained) != run.identity:
        raise ConfigError(
            f"{path} is the result of another config, since a default has changed: "
            "delete it, and the run is done again, or read it with the version that wrote it"
        )
    return dict.fromkeys(COLUMNS) | row | {"run": run.name}


def gather(runs: Sequence[Run], workdir: RunPath) -> list[Row]:
    """Writes the table of runs, and returns its rows."""
    rows = [
        read_result(workdir, run) or planned_row(run) | {"config": _config_json(run.config)}
        for run in runs
    ]
    write_table(rows, workdir)
    return rows


def write_table(rows: Sequence[Row], workdir: RunPath) -> None:
    """Writes rows as runs.parquet and runs.csv, each whole or not at all."""
    import pyarrow  # takes a while, which bad input need not wait for
    from pyarrow import csv, parquet

    schema = pyarrow.schema(list(COLUMNS.items()))
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    for name, write in ((PARQUET_FILE, parquet.write_table), (CSV_FILE, csv.write_csv)):
        content = io.BytesIO()
        write(table, content)
        write_whole(workdir / name, content.getvalue())
