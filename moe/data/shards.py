"""One shard of documents into one file of packed rows; also the program that the worker processes
of prepare.py run.

A record is: the number of pieces (uint32), their lengths (uint32 each), the tokens (uint16, or
uint32 for a vocabulary over 65,536), all little-endian. Nothing here may import JAX: it would cost
every worker seconds, and on an accelerator its memory.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moe.config import DataConfig
from moe.data.packing import pack
from moe.data.sources import Documents
from moe.data.tokenizers import make_tokenizer
from moe.files import flush


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What a worker has to know to write any of the shards."""

    config: DataConfig
    split: str
    source: str  # directory that TFDS has prepared
    target: str  # directory of the files of rows
    documents_per_shard: int
    num_shards: int


def shard_name(shard: int) -> str:
    return f"rows-{shard:05d}.array_record"


def encode_record(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> bytes:
    return (
        np.array([len(lengths), *lengths], "<u4").tobytes()
        + tokens.astype(_token_type(vocab_size)).tobytes()
    )


def decode_record(record: bytes, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, lengths of the pieces), as views of the record."""
    pieces = int(np.frombuffer(record, "<u4", 1)[0])
    lengths = np.frombuffer(record, "<u4", pieces, offset=4)
    return np.frombuffer(record, _token_type(vocab_size), offset=4 * (pieces + 1)), lengths


def _token_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_shard(job: ShardJob, shard: int) -> dict[str, int | str]:
    """Tokenises, packs and writes the documents of one shard, and counts them. The file is a
    function of them alone.
    """
    tokenizer = make_tokenizer(job.config)
    counts: dict[str, int | str] = {
        "shard": shard,
        "num_rows": 0,
        "num_tokens": 0,
        "num_bytes": 0,
        "num_documents": 0,
    }

    def documents() -> Iterator[np.ndarray]:
        first = shard * job.documents_per_shard
        for text in Documents(job.source, job.split).between(
            first, first + job.documents_per_shard
        ):
            if text:
                tokens = tokenizer.encode_document(text)
                counts["num_tokens"] += len(tokens)
                counts["num_bytes"] += len(text.encode())
                counts["num_documents"] += 1
                yield tokens

    path = Path(job.target, shard_name(shard))
    digest = hashlib.sha256()
    try:
        writer = ArrayRecordWriter(
            str(path), "group_size:1,zstd:1"
        )  # rows are read one by one, in any order
        for tokens, lengths in pack(documents(), job.config.sequence_length):
            record = encode_record(tokens, lengths, tokenizer.vocab_size)
            digest.update(record)
            writer.write(record)
            counts["num_rows"] += 1
        writer.close()
    except RuntimeError as error:  # what array_record raises for every error of a file
        reason = str(error).split("\n")[0]
        raise OSError(f"{path} could not be written: {reason}") from error
    flush(path)
    return counts | {"sha256": digest.hexdigest()}


def main(arguments: list[str]) -> None:
    """Writes every so-many-th shard from the first one on, and for each, when it is done, a line of
    JSON to stdout.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's to handle: it ends the workers
    job = json.loads(arguments[0])
    job = ShardJob(**job | {"config": DataConfig(**job["config"])})
    try:
        for shard in range(int(arguments[1]), job.num_shards, int(arguments[2])):
            line = json.dumps(write_shard(job, shard)) + "\n"
            os.write(
                sys.stdout.fileno(), line.encode()
            )  # at once: the workers share the pipe, and print may write in parts
    except OSError as error:  # a full disk, or a pipe that nobody reads since the parent was killed
        sys.exit(f"preparing the data failed: {error}")


def _end_with_parent() -> None:
    """Ends this process at the end of its input, whose other end the parent alone holds: when that
    is gone, even by SIGKILL.
    """
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(sys.argv[1:])
