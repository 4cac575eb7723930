"""Tests the records of rows byte for byte, and the program of a worker process."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from moe.config import DataConfig
from moe.data.packing.targets import mark_targets
from moe.data.prepare import PreparedRows
from moe.data.shards import ShardJob, decode_record, encode_record, shard_name, write_shard
from moe.data.sources import open_documents


def test_a_record_byte_for_byte():
    record = encode_record(
        np.array([7, 0x0102], np.uint16), np.array([2], np.uint32), vocab_size=256
    )
    assert record.hex(" ", 4) == "01000000 02000000 07000201"
    record = encode_record(
        np.array([7, 0x010203], np.uint32), np.array([1, 1], np.uint32), vocab_size=2**16 + 1
    )
    assert record.hex(" ", 4) == "02000000 01000000 01000000 07000000 03020100"


def test_a_record_with_marks_byte_for_byte():
    marked = mark_targets(np.array([7, 8, 9]), np.array([False, True, True]))
    record = encode_record(marked, np.array([3], np.uint32), vocab_size=256)
    assert record.hex(" ", -4) == "01000000 03000000 07000800 090060"
    tokens, lengths = decode_record(record, 256)
    assert tokens.tolist() == marked.tolist() and lengths.tolist() == [3]
    with pytest.raises(ValueError, match="2 bytes follow its 3 tokens"):
        decode_record(record + b"\0", 256)


@pytest.mark.parametrize("vocab_size", [256, 2**16, 2**16 + 1])
def test_decoding_gives_the_record_back(vocab_size: int):
    tokens = np.array([0, 5, vocab_size - 1], np.uint32)
    lengths = np.array([1, 2], np.uint32)
    decoded_tokens, decoded_lengths = decode_record(
        encode_record(tokens, lengths, vocab_size), vocab_size
    )
    assert decoded_tokens.tolist() == tokens.tolist()
    assert decoded_lengths.tolist() == lengths.tolist()
    assert decoded_tokens.itemsize == (2 if vocab_size <= 2**16 else 4)


@pytest.fixture
def job(small: DataConfig, rows: PreparedRows, tmp_path: Path) -> ShardJob:
    return ShardJob(
        small, "validation", open_documents(small, "validation").directory, str(tmp_path), 1, 2
    )


def test_a_shard_holds_its_documents_alone(job: ShardJob):
    counts = write_shard(job, 1, lambda num_read: None)
    ((record,), tokens) = (
        ArrayRecordReader(str(Path(job.target, shard_name(1)))).read_all(),
        [255, *"cdé".encode(), 255],
    )
    assert record == encode_record(np.array(tokens), np.array([6]), 256)
    sha256 = hashlib.sha256(record).hexdigest()
    assert counts == {
        "shard": 1,
        "num_rows": 1,
        "num_tokens": 6,
        "num_bytes": 4,
        "num_documents": 1,
        "num_targets": 5,
        "num_cut": 0,
        "num_placed": 6,
        "sha256": sha256,
    }
    assert [path.name for path in Path(job.target).iterdir()] == ["rows-00001.array_record"]


def test_a_worker_loads_no_framework(job: ShardJob):
    program = """
import sys
from moe.data import shards
shards.main(sys.argv[1:])
print({"jax", "tensorflow", "torch"} & {*sys.modules})
"""
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        program,
        json.dumps(dataclasses.asdict(job)),
        "0",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *counts, modules = done.stdout.splitlines()
    messages = [json.loads(line) for line in counts]
    assert [message["shard"] for message in messages if "shard" in message] == [0, 1]
    assert sum(message["num_read"] for message in messages if "num_read" in message) == 2
    assert modules == "set()"
    assert done.stderr == ""


def test_a_worker_that_fails_says_so_in_one_line(job: ShardJob):
    job = dataclasses.replace(job, target="/nonexistent")
    command = [
        sys.executable,
        "-m",
        "moe.data.shards",
        json.dumps(dataclasses.asdict(job)),
        "0",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as worker:
        error = worker.stderr.read()  # while its input is open
    assert worker.returncode == 1
    assert error.startswith("preparing the data failed: ")
    assert error.count("\n") == 1


def test_a_worker_ends_with_its_input(job: ShardJob):
    """The input ends with the parent, even if the parent is killed."""
    job = dataclasses.replace(job, num_shards=10**6)
    command = [
        sys.executable,
        "-m",
        "moe.data.shards",
        json.dumps(dataclasses.asdict(job)),
        "0",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as worker:
        assert worker.stdout.readline()
        worker.stdin.close()
        worker.stdout.read()  # ends with the worker
    assert (
        worker.returncode == -signal.SIGIO
        and not Path(job.target, "rows-99999.array_record").exists()
    )


def test_a_worker_that_holds_pythons_lock_ends_with_its_input():
    """As one does that waits inside a library, where no thread of Python could end it."""
    program = """
import ctypes
from moe.data import shards
shards._end_with_parent()
print("ready", flush=True)
ctypes.PyDLL(None).sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as worker:
        assert worker.stdout.readline() == b"ready\n"
        worker.stdin.close()
    assert worker.returncode == -signal.SIGIO
