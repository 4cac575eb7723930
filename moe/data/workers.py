"""Writes the shards of a split in several processes, and watches over them."""

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from moe.config import ConfigError
from moe.data.shards import ShardCounts, ShardJob, shard_name

# After this many seconds without any news, a message says what each worker is doing.
_PATIENCE = 10.0


def write_in_processes(
    job: ShardJob, num_workers: int, advance: Callable[[int], object]
) -> Iterator[ShardCounts]:
    """Yields the counts of each shard as soon as a worker process has written it.

    `advance` is called with the number of documents that were read since its last call. Raises
    ConfigError for a document that a worker refuses, and OSError for a worker that fails.

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
            yield from _read_counts(pipe, workers, shards_left, advance)
        if any(shards_left):
            for worker in workers:
                worker.wait()
            _check_workers(workers, shards_left)
    finally:
        # All that is to be written is on disk, so nobody waits for how a worker ends.
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
    pipe: IO[bytes],
    workers: list[subprocess.Popen[bytes]],
    shards_left: list[list[int]],
    advance: Callable[[int], object],
) -> Iterator[ShardCounts]:
    """Yields the counts of all shards, or those that come until all workers have closed the pipe.

    If nothing comes for a while, it prints what each worker does.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    unread, begun, patience = b"", time.monotonic(), _PATIENCE
    while any(shards_left):
        if not poll.poll(500):  # milliseconds
            if time.monotonic() - begun > patience:
                tqdm.write(f"waiting for {_describe(workers, shards_left)}", file=sys.stderr)
                patience *= 4
        elif chunk := pipe.read(2**16):
            *lines, unread = (unread + chunk).split(b"\n")
            for message in map(json.loads, lines):
                if "refused" in message:
                    raise ConfigError(message["refused"])
                if "num_read" in message:
                    advance(message["num_read"])
                    continue
                shards_left[message["shard"] % len(workers)].remove(message["shard"])
                yield message
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
            state = Path(f"/proc/{worker.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except OSError:  # the worker has just ended, or the system is not Linux
            state = b""
        advice = f", which is stopped (kill -CONT {worker.pid} lets it go on)"
        stopped = advice if state == b"T" else ""
        texts.append(f"data worker {worker.pid} writing {shard_name(left[0])}{stopped}")
    return "; ".join(texts)
