"""Writes one shard of documents into one file of packed rows; it is also the worker's program.

A record holds the number of pieces (uint32), their lengths (uint32 each) and the tokens (uint16, or
uint32 for a vocabulary over 65,536), all little-endian. If only some tokens are targets, a bit for
each token follows, the first one in a byte's highest bit. Nothing here may import JAX: it would
cost every worker seconds, and on an accelerator its memory.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from moe.config import ConfigError, DataConfig
from moe.data.chat import make_chat
from moe.data.packing import is_cut, pack
from moe.data.packing.targets import count_targets, mark_targets, split_targets
from moe.data.sources import Document, reopen_documents
from moe.data.tokenizers import Tokenizer, make_tokenizer
from moe.files import flush

# What is counted in each shard, and added up over all of them.
SUMS = (
    "num_rows",
    "num_tokens",
    "num_bytes",
    "num_documents",
    "num_targets",
    "num_cut",
    "num_placed",
)
_REPORT_SECONDS = 0.5  # the time between two reports on a shard


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Holds what a worker must know to write any of the shards."""

    config: DataConfig
    split: str
    source: str  # the directory that TFDS has prepared
    target: str  # the directory for the files of rows
    documents_per_shard: int
    num_shards: int


class ShardCounts(TypedDict):
    """Counts what a shard holds, as `PreparedRows` does; a worker sends it as a line of JSON."""

    shard: int
    num_rows: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_targets: int
    num_cut: int
    num_placed: int
    sha256: str  # of the shard's records


def shard_name(shard: int) -> str:
    """Returns the name of a shard's file."""
    return f"rows-{shard:05d}.array_record"


def encode_record(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> bytes:
    """Returns the record of a row from its tokens and the lengths of its pieces."""
    tokens, is_target = split_targets(tokens)
    header = np.array([len(lengths), *lengths], "<u4")
    bits = b"" if is_target is None else np.packbits(is_target).tobytes()
    return header.tobytes() + tokens.astype(_token_type(vocab_size)).tobytes() + bits


def decode_record(record: bytes, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens, with marks if the record has them, and the lengths of the pieces.

    Both are views of the record if it has no marks.
    """
    num_pieces = int(np.frombuffer(record, "<u4", 1)[0])
    lengths = np.frombuffer(record, "<u4", num_pieces, offset=4)
    num_tokens = int(lengths.sum(dtype=np.int64))
    offset = 4 * (num_pieces + 1)
    tokens = np.frombuffer(record, _token_type(vocab_size), num_tokens, offset)
    bits = np.frombuffer(record, np.uint8, offset=offset + tokens.nbytes)
    if not len(bits):
        return tokens, lengths
    if len(bits) != -(-num_tokens // 8):
        raise ValueError(f"{len(bits)} bytes follow its {num_tokens} tokens")
    return mark_targets(tokens, np.unpackbits(bits, count=num_tokens)), lengths


def _token_type(vocab_size: int) -> str:
    """Returns the NumPy type in which tokens are stored."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def document_encoder(
    config: DataConfig, tokenizer: Tokenizer
) -> Callable[[Document], tuple[np.ndarray, int]]:
    """Returns the function from a document to its tokens and the bytes of text that they predict.

    A conversation goes through the config's chat template, if there is one.
    """
    if chat := make_chat(config, tokenizer):
        return lambda document: chat.encode_document(document.text, document.origin)
    return lambda document: (
        tokenizer.encode_document(document.text),
        len(document.text.encode()),
    )


def write_shard(job: ShardJob, shard: int, advance: Callable[[int], object]) -> ShardCounts:
    """Tokenises, packs and writes the documents of one shard, and counts them.

    The bytes of the file depend only on the documents. `advance` is called with the number of
    documents that were read since its last call. Raises OSError if the file cannot be written.
    """
    tokenizer = make_tokenizer(job.config)
    zeros = dict.fromkeys(SUMS, 0)
    counts = ShardCounts(**zeros, shard=shard, sha256="")  # pyright: ignore[reportArgumentType]
    encode = document_encoder(job.config, tokenizer)

    def encoded_documents() -> Iterator[np.ndarray]:
        for document in _documents(job, shard, advance):
            tokens, num_bytes = encode(document)
            counts["num_cut"] += is_cut(job.config, counts["num_tokens"], len(tokens))
            counts["num_tokens"] += len(tokens)
            counts["num_bytes"] += num_bytes
            counts["num_documents"] += 1
            counts["num_targets"] += count_targets(tokens)
            yield tokens

    path = Path(job.target, shard_name(shard))
    digest = hashlib.sha256()
    try:
        # Each row is a group of its own, since training reads single rows in a random order.
        writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
        for tokens, lengths in pack(job.config, encoded_documents()):
            record = encode_record(tokens, lengths, tokenizer.vocab_size)
            digest.update(record)
            writer.write(record)
            counts["num_rows"] += 1
            counts["num_placed"] += len(tokens)
        writer.close()
    except RuntimeError as error:  # array_record raises it for every error of a file
        reason = str(error).split("\n")[0]
        raise OSError(f"{path} could not be written: {reason}") from error
    flush(path)
    counts["sha256"] = digest.hexdigest()
    return counts


def _documents(job: ShardJob, shard: int, advance: Callable[[int], object]) -> Iterator[Document]:
    """Yields the documents of a shard with any text, and reports now and then how many were read.

    A conversation without text is yielded too, so that the chat encoder refuses it.
    """
    first = shard * job.documents_per_shard
    documents = reopen_documents(job.config, job.split, job.source)
    reported, num_read = time.monotonic(), 0
    for document in documents.between(first, first + job.documents_per_shard):
        if document.text or job.config.chat_template:
            yield document
        num_read += 1
        if time.monotonic() - reported > _REPORT_SECONDS:
            advance(num_read)
            reported, num_read = time.monotonic(), 0
    advance(num_read)


def main(arguments: list[str]) -> int:
    """Writes a worker's shards, and after each of them a line of JSON to stdout.

    Returns the exit code.
    The arguments are the job, the number of the first shard, and the distance to the next ones.
    """
    # Ctrl-C is left to the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(arguments[0])
    job = ShardJob(**job | {"config": DataConfig(**job["config"])})
    try:
        for shard in range(int(arguments[1]), job.num_shards, int(arguments[2])):
            _send(write_shard(job, shard, lambda num_read: _send({"num_read": num_read})))
    except ConfigError as error:  # a document that the source or the tokenizer refuses
        _send({"refused": str(error)[:2000]})
    except OSError as error:  # a full disk, or a pipe without a reader after the parent was killed
        print(f"preparing the data failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _send(message: Mapping[str, Any]) -> None:
    """Writes a line of JSON to stdout, which is a pipe that the workers share.

    os.write writes a short line at once, and print may not.
    """
    os.write(sys.stdout.fileno(), (json.dumps(message) + "\n").encode())


def _end_with_parent() -> None:
    """Makes the system end this process, by SIGIO, when its input ends.

    Only the parent holds the other end of the input, so this happens even if the parent is killed.
    A thread that waits for the end would not do: it needs Python's lock, which it does not get
    while a library holds it, nor after Python has begun to end.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # the input had ended before
        os._exit(1)


def _fail(*error: Any) -> None:
    """Prints the traceback of an error and ends this process."""
    sys.__excepthook__(*error)
    os._exit(1)


if __name__ == "__main__":
    _end_with_parent()
    sys.excepthook = _fail
    # Python's own way out waits for threads of libraries, which may wait for each other.
    os._exit(main(sys.argv[1:]))
