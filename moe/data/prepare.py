"""Tokenising and packing, once: a split of a data set into a directory of rows, reused by every
later run that wants the same.
"""

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

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from moe.config import ConfigError, DataConfig
from moe.data.packing import unpack
from moe.data.shards import ShardJob, decode_record, shard_name, write_shard
from moe.data.sources import open_documents, source_name
from moe.data.tokenizers import make_tokenizer
from moe.files import exclusive, flush

_FORMAT_VERSION = 1
_DOCUMENTS_PER_SHARD = 256
_MAX_SHARDS = 512  # each is an open file while training
_SHARDS_PER_WORKER = 8  # starting a process takes about as long as packing these
_PATIENCE = 10.0  # seconds without a finished shard, after which it is told who works on what


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """Packed rows on disk, by index; to be shared by threads, or pickled."""

    directory: Path
    source: str  # full name of the data set, with its version
    split: str
    tokenizer: str
    vocab_size: int
    boundary_id: int
    sequence_length: int
    packing: str
    format_version: int
    sha256: str  # of the rows: the same on every machine that has prepared the same ones
    num_rows: int
    num_tokens: int  # of all documents, boundaries included
    num_bytes: int  # of all documents, as UTF-8
    num_documents: int
    rows_per_shard: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Tokens predicted in an epoch: all but the first of each document."""
        return self.num_tokens - self.num_documents

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row's fields of a batch (`packing.unpack`), each [sequence_length]. Raises
        IndexError; OSError for a damaged file.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows} in {self.directory}")
        ends = np.cumsum(self.rows_per_shard)
        shard = int(np.searchsorted(ends, index, side="right"))
        row = index - int(ends[shard]) + self.rows_per_shard[shard]
        try:
            # By its bounds, not as a list of indices, nor through ArrayRecordDataSource: those take
            # longer the longer the file is.
            (record,) = self._readers[shard].read(row, row + 1)
        except (RuntimeError, IndexError) as error:
            self.__dict__.pop("_readers", None)  # a file that could not be opened would stay so
            raise _unreadable(self.directory / shard_name(shard), str(error)) from error
        try:
            return unpack(*decode_record(record, self.vocab_size), self.sequence_length)
        except (ValueError, IndexError, RuntimeError, AssertionError, ArithmeticError) as error:
            raise _unreadable(
                self.directory / shard_name(shard), f"row {index}: {error}"
            ) from error

    def __reduce__(self) -> tuple:
        return open_rows, (self.directory,)  # open files can't be pickled

    @functools.cached_property
    def _readers(self) -> list[ArrayRecordReader]:
        paths = [
            str(self.directory / shard_name(shard)) for shard in range(len(self.rows_per_shard))
        ]
        return [
            ArrayRecordReader(
                path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15
            )
            for path in paths
        ]


def prepare(config: DataConfig, split: str, num_workers: int | None = None) -> PreparedRows:
    """The rows of a split: opened if they are there, else tokenised, packed and written by
    `num_workers` processes.

    They lie under `config.directory`, in rows/FINGERPRINT. Their bytes don't depend on num_workers
    (by default, as many as are worth starting). A process killed here leaves nothing that is ever
    read, and any number of them may do this at once. Raises ConfigError for an unknown or empty
    data set or split, OSError where files cannot be written.
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
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    directory = config.path / "rows" / fingerprint
    if not directory.exists():
        with exclusive(directory.with_suffix(".lock")) as alone:
            if not directory.exists():
                _write(config, identity, directory, alone, num_workers)
    return open_rows(directory)


def open_rows(directory: Path) -> PreparedRows:
    """The rows that `prepare` has left in `directory`."""
    path = directory / "metadata.json"
    text = path.read_bytes()
    try:
        metadata = json.loads(text)
        rows = PreparedRows(
            directory, **metadata | {"rows_per_shard": tuple(metadata["rows_per_shard"])}
        )
        counts = (
            rows.num_rows,
            rows.num_tokens,
            rows.num_bytes,
            rows.num_documents,
            rows.sequence_length,
            *rows.rows_per_shard,
        )
        whole = (
            all(type(count) is int and count >= 0 for count in counts)
            and sum(rows.rows_per_shard) == rows.num_rows
        )
        whole = whole and type(rows.sha256) is str
    except (ValueError, TypeError, LookupError, RecursionError):
        whole = False
    if not whole:
        raise OSError(f"{path} is damaged: delete {directory}")
    return rows


def _unreadable(path: Path, reason: str) -> OSError:
    """Says that a file is damaged only where it can be read: deleting it helps against nothing
    else. The reader does not tell.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        return OSError(
            f"{path} was deleted while it was in use: run the same command again, which prepares it anew"
        )
    except OSError as error:
        return OSError(f"{path} cannot be read: {error.strerror}")
    first_line = reason.split("\n")[0]
    return OSError(f"{path} is damaged ({first_line}): delete {path.parent}")


def _write(
    config: DataConfig, identity: dict, directory: Path, alone: bool, num_workers: int | None
) -> None:
    prefix = f".{directory.name}.{socket.gethostname()}."
    if (
        alone
    ):  # what killed processes of this host have left; another host's lock may not be ours to see
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
            if not directory.exists():  # otherwise another host was quicker, with the same bytes
                raise
        flush(directory.parent)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _write_rows(config: DataConfig, split: str, target: Path, num_workers: int | None) -> dict:
    documents = open_documents(config, split)
    # A function of the corpus alone, so that the files don't depend on how many processes write
    # them.
    per_shard = max(_DOCUMENTS_PER_SHARD, -(-len(documents) // _MAX_SHARDS))
    job = ShardJob(
        config,
        split,
        documents.directory,
        os.fspath(target),
        per_shard,
        -(-len(documents) // per_shard),
    )
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), job.num_shards // _SHARDS_PER_WORKER)
    done = (
        _in_processes(job, num_workers)
        if num_workers > 1
        else (write_shard(job, shard) for shard in range(job.num_shards))
    )
    counts = sorted(
        tqdm(done, f"preparing {split}", job.num_shards, unit="shard", disable=None),
        key=lambda count: count["shard"],
    )
    totals = {
        name: sum(count[name] for count in counts)
        for name in ("num_rows", "num_tokens", "num_bytes", "num_documents")
    }
    if totals["num_rows"] == 0:
        raise ConfigError(
            f"split {split!r} of data.dataset={config.dataset!r} holds no text: set the split or the data set to others"
        )
    sha256 = hashlib.sha256("".join(count["sha256"] for count in counts).encode()).hexdigest()
    return totals | {"sha256": sha256, "rows_per_shard": [count["num_rows"] for count in counts]}


def _in_processes(job: ShardJob, num_workers: int) -> Iterator[dict]:
    """The counts of the shards, as worker processes finish them.

    Not by multiprocessing: its children import the main module again, and with it JAX.
    """
    read_end, write_end = (
        os.pipe()
    )  # one for all workers, whose lines are short enough not to be torn apart
    command = [sys.executable, "-P", "-m", "moe.data.shards", json.dumps(dataclasses.asdict(job))]
    # A worker ends itself at the end of its input: when this process is gone, however it went.
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": write_end,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    }
    workers = [
        subprocess.Popen([*command, str(worker), str(num_workers)], **pipes)
        for worker in range(num_workers)
    ]
    os.close(write_end)
    shards = [
        list(range(worker, job.num_shards, num_workers)) for worker in range(num_workers)
    ]  # in the order they are written
    begun, patience = time.monotonic(), _PATIENCE
    try:
        with open(read_end, "rb", buffering=0) as pipe:
            unread, poll = b"", select.poll()
            poll.register(pipe, select.POLLIN)
            while True:
                if not poll.poll(500):  # milliseconds
                    if time.monotonic() - begun > patience:
                        tqdm.write(f"waiting for {_doing(workers, shards)}", file=sys.stderr)
                        patience *= 4
                elif chunk := pipe.read(2**16):
                    *lines, unread = (unread + chunk).split(b"\n")
                    for count in map(json.loads, lines):
                        shards[count["shard"] % num_workers].remove(count["shard"])
                        yield count
                    begun, patience = time.monotonic(), _PATIENCE
                else:
                    break
                _check_workers(workers, shards)
        for worker in workers:
            worker.wait()
        _check_workers(workers, shards)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdin.close()


def _check_workers(workers: list[subprocess.Popen], shards: list[list[int]]) -> None:
    """Raises OSError for a worker that failed or was killed, with what it had left of its shards."""
    for worker, left in zip(workers, shards, strict=True):
        code = worker.poll()
        if code is not None and code < 0:
            why = " (as the system does where memory runs out)" if -code == signal.SIGKILL else ""
            where = f" while it wrote {shard_name(left[0])}" if left else ""
            raise OSError(
                f"preparing the data failed: a worker process was killed by {signal.Signals(-code).name}{where}{why}"
            )
        if code:
            raise OSError("preparing the data failed in a worker process: its message is above")


def _doing(workers: list[subprocess.Popen], shards: list[list[int]]) -> str:
    """The processes that still work and the file each writes, with a word on those that are
    stopped.
    """
    texts = []
    for worker, left in zip(workers, shards, strict=True):
        if left:
            try:
                state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just ended, or this is no Linux
                state = ""
            stopped = (
                f", which is stopped (kill -CONT {worker.pid} lets it go on)"
                if state == "T"
                else ""
            )
            texts.append(f"data worker {worker.pid} writing {shard_name(left[0])}{stopped}")
    return "; ".join(texts) or "data workers to end"
