"""Tokenises and packs a split of a data set once, into rows that later runs reuse."""

import dataclasses
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from moe.config import ConfigError, DataConfig
from moe.data.chat import read_template
from moe.data.packing.concat import unpack
from moe.data.shards import ShardCounts, ShardJob, decode_record, shard_name, write_shard
from moe.data.sources import open_documents, source_name
from moe.data.token_files import TokenFileRows, open_token_rows
from moe.data.tokenizers import make_tokenizer
from moe.files import flush, hold_lock

_FORMAT_VERSION = 1
_DOCUMENTS_PER_SHARD = 256
_MAX_SHARDS = 512  # each shard is an open file while training
_SHARDS_PER_WORKER = 8  # starting a process takes about as long as packing these
# After this many seconds without a finished shard, a message says what each worker is doing.
_PATIENCE = 10.0


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Reads packed rows from disk by their index. Threads can share it, and it can be pickled."""

    directory: Path
    source: str  # the full name of the data set, with its version
    split: str
    tokenizer: str
    vocab_size: int
    boundary_id: int
    sequence_length: int
    packing: str
    format_version: int
    sha256: str  # of all rows, so that two machines can tell whether they have the same ones
    num_rows: int
    num_tokens: int  # of all documents, boundaries included
    num_bytes: int  # of all documents, as UTF-8; of conversations, their answers alone
    num_documents: int
    num_targets: int  # tokens that an epoch predicts
    rows_per_shard: tuple[int, ...]
    chat_template: str = ""  # the checksum of the template of conversations

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns one row's fields of a batch, each [sequence_length], as `packing.unpack` does.

        Raises IndexError for a row that does not exist, and OSError for a damaged file.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.directory}")
        ends = np.cumsum(self.rows_per_shard)
        shard = int(np.searchsorted(ends, index, side="right"))
        row = index - int(ends[shard]) + self.rows_per_shard[shard]
        path = self.directory / shard_name(shard)
        try:
            # The row is read by its bounds. A list of indices or ArrayRecordDataSource would take
            # longer the longer the file is.
            (record,) = self._readers[shard].read(row, row + 1)
        except (RuntimeError, IndexError) as error:
            # Without this, a file that could not be opened once could never be read again.
            self.__dict__.pop("_readers", None)
            raise _read_error(path, str(error)) from error
        try:
            return unpack(*decode_record(record, self.vocab_size), self.sequence_length)
        except (ValueError, IndexError, RuntimeError, AssertionError, ArithmeticError) as error:
            raise _read_error(path, f"row {index}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return open_rows, (self.directory,)  # open files cannot be pickled

    @functools.cached_property
    def _readers(self) -> list[ArrayRecordReader]:
        """Returns an open reader for each shard."""
        return [
            ArrayRecordReader(
                str(self.directory / shard_name(shard)),
                options="readahead_buffer_size:0",
                file_reader_buffer_size=2**15,
            )
            for shard in range(len(self.rows_per_shard))
        ]


def open_split(config: DataConfig, split: str) -> PreparedRows | TokenFileRows:
    """Returns the rows of a split, which are prepared first unless they are files of tokens."""
    is_tokens = config.dataset.startswith("tokens:")
    return open_token_rows(config, split) if is_tokens else prepare(config, split)


def prepare(config: DataConfig, split: str, num_workers: int | None = None) -> PreparedRows:
    """Returns the rows of a split, which are prepared first if they are not there yet.

    The rows lie under `config.directory`, in rows/FINGERPRINT. To prepare them, `num_workers`
    processes (by default, as many as are worth starting) tokenise, pack and write the documents;
    the bytes do not depend on their number. Any number of processes may call this at once, and what
    a killed one has written is never read. Raises ConfigError for a data set
    or a split that is unknown or empty, and OSError if files cannot be written.
    """
    tokenizer = make_tokenizer(config)
    identity = {
        "source": source_name(config),
        "split": split,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "sequence_length": config.sequence_length,
        "packing": "concat",
        "format_version": _FORMAT_VERSION,
    }
    if template := read_template(config):
        identity["chat_template"] = template.fingerprint
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    directory = config.path / "rows" / fingerprint
    if not directory.exists():
        with hold_lock(directory.with_suffix(".lock")) as has_lock:
            # Another process may have prepared the rows while this one waited for the lock.
            if not directory.exists():
                _write(config, identity, directory, has_lock, num_workers)
    return open_rows(directory)


def open_rows(directory: Path) -> PreparedRows:
    """Returns the rows that `prepare` left in `directory`. Raises OSError if they are damaged."""
    path = directory / "metadata.json"
    text = path.read_bytes()
    try:
        metadata = json.loads(text)
        rows_per_shard = tuple(metadata["rows_per_shard"])
        # Rows that an earlier version has prepared predict all tokens but each document's first.
        metadata.setdefault("num_targets", metadata["num_tokens"] - metadata["num_documents"])
        rows = PreparedRows(directory, **metadata | {"rows_per_shard": rows_per_shard})
        is_consistent = _is_consistent(rows)
    except (ValueError, TypeError, LookupError, RecursionError):
        is_consistent = False
    if not is_consistent:
        raise OSError(f"{path} is damaged: delete {directory}")
    return rows


def _is_consistent(rows: PreparedRows) -> bool:
    """Says whether the numbers in metadata are valid and agree with each other."""
    counts = (
        rows.num_rows,
        rows.num_tokens,
        rows.num_bytes,
        rows.num_documents,
        rows.num_targets,
        rows.sequence_length,
        *rows.rows_per_shard,
    )
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and sum(rows.rows_per_shard) == rows.num_rows
        and type(rows.sha256) is str
    )


def _read_error(path: Path, reason: str) -> OSError:
    """Returns the error for a file from which a row could not be read.

    The reader does not tell damage from other failures, so this opens the file again. Only a file
    that can be opened is called damaged, because only then does deleting it help.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return OSError(
            f"{path} was deleted while it was in use: run the same command again, "
            "which prepares it anew"
        )
    except OSError as error:
        return OSError(f"{path} cannot be read: {error.strerror}")
    first_line = reason.split("\n")[0]
    return OSError(f"{path} is damaged ({first_line}): delete {path.parent}")


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
        metadata = identity | _write_rows(config, identity["split"], target, num_workers)
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        flush(target / "metadata.json")
        flush(target)
        try:
            target.rename(directory)
        except OSError:
            # If the directory is there now, another host was quicker, with the same bytes.
            if not directory.exists():
                raise
        flush(directory.parent)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _write_rows(
    config: DataConfig, split: str, target: Path, num_workers: int | None
) -> dict[str, Any]:
    """Writes the files of rows into `target`, and returns what metadata.json says about them."""
    documents = open_documents(config, split)
    # The division into shards depends only on the corpus, so the files do not depend on how many
    # processes write them.
    per_shard = max(_DOCUMENTS_PER_SHARD, -(-len(documents) // _MAX_SHARDS))
    job = ShardJob(
        config,
        split,
        source=documents.directory,
        target=os.fspath(target),
        documents_per_shard=per_shard,
        num_shards=-(-len(documents) // per_shard),
    )
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), job.num_shards // _SHARDS_PER_WORKER)
    finished = (
        _in_processes(job, num_workers)
        if num_workers > 1
        else (write_shard(job, shard) for shard in range(job.num_shards))
    )
    progress = tqdm(finished, f"preparing {split}", job.num_shards, unit="shard", disable=None)
    shards = sorted(progress, key=lambda counts: counts["shard"])
    if sum(counts["num_rows"] for counts in shards) == 0:
        raise ConfigError(
            f"split {split!r} of data.dataset={config.dataset!r} holds no text: "
            "set the split or the data set to others"
        )
    digests = "".join(counts["sha256"] for counts in shards)
    return {
        "num_rows": sum(counts["num_rows"] for counts in shards),
        "num_tokens": sum(counts["num_tokens"] for counts in shards),
        "num_bytes": sum(counts["num_bytes"] for counts in shards),
        "num_documents": sum(counts["num_documents"] for counts in shards),
        "num_targets": sum(counts["num_targets"] for counts in shards),
        "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "rows_per_shard": [counts["num_rows"] for counts in shards],
    }


def _in_processes(job: ShardJob, num_workers: int) -> Iterator[ShardCounts]:
    """Yields the counts of each shard as soon as a worker process has written it.

    multiprocessing is not used, because its children import the main module again, and with it JAX.
    """
    # All workers write into one pipe. Their lines are so short that each arrives in one piece.
    read_end, write_end = os.pipe()
    workers = _start_workers(job, num_workers, write_end)
    os.close(write_end)
    # The shards that each worker has still to write, in its order.
    shards_left = [
        list(range(worker, job.num_shards, num_workers)) for worker in range(num_workers)
    ]
    try:
        with open(read_end, "rb", buffering=0) as pipe:
            yield from _read_counts(pipe, workers, shards_left)
        for worker in workers:
            worker.wait()
        _check_workers(workers, shards_left)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdin:
                worker.stdin.close()


def _start_workers(job: ShardJob, num_workers: int, output: int) -> list[subprocess.Popen[bytes]]:
    """Starts the worker processes, which write their counts to the file descriptor `output`."""
    command = [sys.executable, "-P", "-m", "moe.data.shards", json.dumps(dataclasses.asdict(job))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return [
        subprocess.Popen(
            [*command, str(worker), str(num_workers)],
            # A worker ends itself when its input ends, which happens when this process is gone,
            # even if that was killed.
            stdin=subprocess.PIPE,
            stdout=output,
            env=environment,
        )
        for worker in range(num_workers)
    ]


def _read_counts(
    pipe: IO[bytes], workers: list[subprocess.Popen[bytes]], shards_left: list[list[int]]
) -> Iterator[ShardCounts]:
    """Yields the counts that the workers write into the pipe, until all of them have closed it.

    If no shard is finished for a while, it prints what each worker does. Raises OSError for a
    worker that fails.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    unread, begun, patience = b"", time.monotonic(), _PATIENCE
    while True:
        if not poll.poll(500):  # milliseconds
            if time.monotonic() - begun > patience:
                tqdm.write(f"waiting for {_describe(workers, shards_left)}", file=sys.stderr)
                patience *= 4
        elif chunk := pipe.read(2**16):
            *lines, unread = (unread + chunk).split(b"\n")
            for counts in map(json.loads, lines):
                shards_left[counts["shard"] % len(workers)].remove(counts["shard"])
                yield counts
            begun, patience = time.monotonic(), _PATIENCE
        else:
            return
        _check_workers(workers, shards_left)


def _check_workers(workers: list[subprocess.Popen[bytes]], shards_left: list[list[int]]) -> None:
    """Raises OSError for a worker that failed or was killed, and names the file it was writing."""
    for worker, left in zip(workers, shards_left, strict=True):
        code = worker.poll()
        if code is not None and code < 0:
            why = " (as the system does where memory runs out)" if -code == signal.SIGKILL else ""
            where = f" while it wrote {shard_name(left[0])}" if left else ""
            raise OSError(
                "preparing the data failed: a worker process was killed by "
                f"{signal.Signals(-code).name}{where}{why}"
            )
        if code:
            raise OSError("preparing the data failed in a worker process: its message is above")


def _describe(workers: list[subprocess.Popen[bytes]], shards_left: list[list[int]]) -> str:
    """Returns which file each worker writes, and how to wake a worker that is stopped."""
    texts = []
    for worker, left in zip(workers, shards_left, strict=True):
        if not left:
            continue
        try:
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # the worker has just ended, or the system is not Linux
            state = ""
        advice = f", which is stopped (kill -CONT {worker.pid} lets it go on)"
        stopped = advice if state == "T" else ""
        texts.append(f"data worker {worker.pid} writing {shard_name(left[0])}{stopped}")
    return "; ".join(texts) or "data workers to end"
