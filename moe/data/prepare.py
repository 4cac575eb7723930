"""Tokenises and packs a split of a data set once, into rows that later runs reuse."""

import hashlib
import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe.config import ConfigError, DataConfig
from moe.config.data import is_token_files
from moe.data.chat import read_template
from moe.data.prepared_rows import PreparedRows, open_rows
from moe.data.shards import SUMS, ShardJob, write_shard
from moe.data.sources import Documents, open_documents, source_name
from moe.data.token_files import TokenFileRows, open_token_rows
from moe.data.tokenizers import make_tokenizer
from moe.data.workers import write_in_processes
from moe.files import flush, hold_lock, write_whole

__all__ = ["PreparedRows", "open_rows", "prepare"]

_FORMAT_VERSION = 2
# A shard has at least so many documents, or so many bytes of text, whichever are fewer documents.
_DOCUMENTS_PER_SHARD = 256
_BYTES_PER_SHARD = 2**24
_MAX_SHARDS = 32  # a file of rows that is not open costs milliseconds before it can be read
# Starting a process takes about as long as packing so many documents of bytes, or so many bytes of
# text. With other tokenizers a document takes eight times as long.
_DOCUMENTS_PER_WORKER = 2048
_BYTES_PER_WORKER = 2**25
_SAMPLED_DOCUMENTS = 16


def open_split(config: DataConfig, split: str) -> PreparedRows | TokenFileRows:
    """Returns the rows of a split, which are prepared first unless they are files of tokens."""
    if is_token_files(config.dataset):
        return open_token_rows(config, split)
    return prepare(config, split)


def prepare(config: DataConfig, split: str, num_workers: int | None = None) -> PreparedRows:
    """Returns the rows of a split, which are prepared first if they are not there yet.

    The rows lie under `config.directory`, in rows/FINGERPRINT. To prepare them, `num_workers`
    processes (by default, as many as are worth starting) tokenise, pack and write the documents;
    the bytes do not depend on their number. Any number of processes may call this at once, and what
    a killed one has written is never read. Raises ConfigError for a data set
    or a split that is unknown or empty, and OSError if files cannot be written.
    """
    if config.mixture:
        raise ConfigError(
            "data.mixture has several sources, and each is prepared alone: "
            "prepare data.for_source(source) for each of data.sources"
        )
    tokenizer = make_tokenizer(config)
    identity = {
        "source": source_name(config),
        "split": split,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "format_version": _FORMAT_VERSION,
    }
    if config.special_tokens:
        identity["special_tokens"] = json.dumps(config.special_tokens)
    if template := read_template(config):
        identity["chat_template"] = template.fingerprint
    # Version 1 divided large splits into more shards. Runs go on with rows that they began with.
    older = _directory(config, identity | {"format_version": 1})
    if older.exists():
        return open_rows(older)
    directory = _directory(config, identity)
    if not directory.exists():
        with hold_lock(directory.with_suffix(".lock")) as has_lock:
            # Another process may have prepared the rows while this one waited for the lock.
            if not directory.exists():
                _write(config, identity, directory, has_lock, num_workers)
    return open_rows(directory)


def _directory(config: DataConfig, identity: dict[str, Any]) -> Path:
    """Returns the directory of the rows with this identity."""
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return config.path / "rows" / fingerprint


def _write(
    config: DataConfig,
    identity: dict[str, Any],
    directory: Path,
    has_lock: bool,
    num_workers: int | None,
) -> None:
    """Writes all rows into a directory of this process, and then renames it to `directory`."""
    prefix = f".{directory.name}.{socket.gethostname()}."
    # Killed processes of this host may have left directories, which are deleted here. Those of
    # other hosts stay, as other hosts' locks may not be visible here: they may be in use.
    if has_lock:
        for stale in directory.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale)
    target = directory.with_name(f"{prefix}{os.getpid()}")
    target.mkdir()
    try:
        begun = time.monotonic()
        metadata = identity | _write_rows(config, identity["split"], target, num_workers)
        seconds = time.monotonic() - begun
        # The identity was read before the documents were opened.
        if source_name(config) != identity["source"]:
            raise ConfigError(
                f"data.dataset={config.dataset!r} has changed while its rows were made: "
                "run the same command again when its files are complete"
            )
        write_whole(target / "metadata.json", json.dumps(metadata, indent=2) + "\n")
        flush(target)
        try:
            target.rename(directory)
        except OSError:
            # If the directory is there now, another host was quicker, with the same bytes.
            if not directory.exists():
                raise
        flush(directory.parent)
        tqdm.write(_summary(open_rows(directory), seconds), file=sys.stderr)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _write_rows(
    config: DataConfig, split: str, target: Path, num_workers: int | None
) -> dict[str, Any]:
    """Writes the files of rows into `target`, and returns what metadata.json says about them."""
    documents = open_documents(config, split)
    # The division into shards depends only on the corpus, so the files do not depend on how many
    # processes write them.
    mean_bytes = _mean_bytes(documents)
    fewest = min(_DOCUMENTS_PER_SHARD, math.ceil(_BYTES_PER_SHARD / mean_bytes))
    per_shard = max(fewest, -(-len(documents) // _MAX_SHARDS))
    job = ShardJob(
        config,
        split,
        source=documents.directory,
        target=os.fspath(target),
        documents_per_shard=per_shard,
        num_shards=-(-len(documents) // per_shard),
    )
    if num_workers is None:
        num_workers = _worthwhile_workers(config, len(documents), mean_bytes)
    num_workers = min(num_workers, job.num_shards)
    title = f"preparing {split}"
    with tqdm(desc=title, total=len(documents), unit=" documents", disable=None) as bar:
        finished = (
            write_in_processes(job, num_workers, bar.update)
            if num_workers > 1
            else (write_shard(job, shard, bar.update) for shard in range(job.num_shards))
        )
        shards = sorted(finished, key=lambda counts: counts["shard"])
    if sum(counts["num_rows"] for counts in shards) == 0:
        raise ConfigError(
            f"split {split!r} of data.dataset={config.dataset!r} holds no text: "
            "set the split or the data set to others"
        )
    digests = "".join(counts["sha256"] for counts in shards)
    return {
        **{name: sum(counts[name] for counts in shards) for name in SUMS},
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "rows_per_shard": [counts["num_rows"] for counts in shards],
    }


def _worthwhile_workers(config: DataConfig, num_documents: int, mean_bytes: float) -> int:
    """Returns how many processes are worth starting, at most one for each core."""
    per_worker = min(_DOCUMENTS_PER_WORKER, _BYTES_PER_WORKER / mean_bytes)
    if config.tokenizer != "byte":
        per_worker /= 8
    return min(len(os.sched_getaffinity(0)), int(num_documents / per_worker))


def _mean_bytes(documents: Documents) -> float:
    """Returns about how many bytes a document has, from a few that are spread evenly."""
    count = min(_SAMPLED_DOCUMENTS, len(documents))
    starts = [number * len(documents) // count for number in range(count)]
    sizes = [
        len(document.text.encode(errors="replace"))
        for start in starts
        for document in documents.between(start, start + 1)
    ]
    return max(1.0, sum(sizes) / max(1, count))


def _summary(rows: PreparedRows, seconds: float) -> str:
    """Returns what was prepared, and how fast, in one line."""
    speed = f"{rows.num_tokens / seconds:,.0f} tokens/s"
    if rows.chat_template:  # of which only the answers' bytes are counted, and all tokens
        size = f"{rows.num_bytes:,} bytes of answers, {speed}"
    else:
        size = f"{rows.num_bytes / rows.num_tokens:.2f} bytes per token, {speed} "
        size += f"({rows.num_bytes / seconds / 1e6:.1f} MB/s)"
    return (
        f"prepared {rows.source}, {rows.split}: {rows.num_documents:,} documents, "
        f"{rows.num_tokens:,} tokens, {size}; "
        f"{rows.num_rows:,} rows, {rows.fullness or 0:.1%} full, {rows.num_cut:,} documents cut"
    )
