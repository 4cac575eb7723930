"""Counts what documents are like, in memory that does not grow with their number."""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from moe.data.sources import Document

_AT_ONCE = 2**22  # hashes that are compared at once, 32 MB of them
_NUM_BINS = 48  # lengths of up to 2**48 bytes


class DocumentCounts(NamedTuple):
    """Says what some documents are like."""

    num_documents: int
    num_bytes: int
    num_duplicates: int  # documents whose text an earlier one has, bit for bit
    num_empty: int
    lengths: list[int]  # how many have a length of 2**n up to 2**(n + 1) - 1 bytes, by n


class Source(NamedTuple):
    """Says what the rows of a source are like. What rows do not know of themselves is None."""

    name: str
    num_documents: int | None
    num_bytes: int | None
    num_tokens: int | None
    num_rows: int
    fullness: float | None  # the share of the rows' positions that hold a token
    num_cut: int | None  # documents that lie in several rows

    @classmethod
    def of_rows(cls, name: str, rows: Any, *, are_conversations: bool = False) -> "Source":
        """Returns what the rows of a source know of themselves.

        Of conversations they know only how many bytes the answers have, which would be wrong beside
        the tokens of whole conversations.
        """
        known: dict[str, Any] = {field: getattr(rows, field, None) for field in cls._fields[1:]}
        known["num_rows"] = len(rows)
        if are_conversations or not known["num_bytes"]:  # token files say 0
            known["num_bytes"] = None
        return cls(name, **known)


def source_table(sources: Sequence[Source]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the head and the rows of the table of sources."""
    head = ("source", "documents", "bytes", "tokens", "bytes/token", "rows", "full", "cut", "share")
    total = sum(source.num_rows for source in sources)
    rows = []
    for source in sources:
        per_token = (source.num_bytes or 0) / (source.num_tokens or 1)
        rows.append(
            (
                source.name or "all",
                _count(source.num_documents),
                _count(source.num_bytes),
                _count(source.num_tokens),
                f"{per_token:.3f}" if source.num_bytes and source.num_tokens else "?",
                _count(source.num_rows),
                "?" if source.fullness is None else f"{source.fullness:.1%}",
                _count(source.num_cut),
                f"{source.num_rows / total:.1%}",
            )
        )
    return head, rows


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def count_documents(documents: Iterable[Document]) -> DocumentCounts:
    """Counts documents, their lengths, and the texts that occur again.

    A text's hash has 64 bits, and hashes wait in a file, so a million documents take 8 MB of disk.
    """
    num_documents = num_bytes = num_empty = 0
    lengths = np.zeros(_NUM_BINS, np.int64)
    with tempfile.TemporaryFile() as hashes:
        for document in documents:
            content = document.text.encode(errors="surrogatepass")
            num_documents += 1
            num_bytes += len(content)
            num_empty += not content
            if content:
                lengths[len(content).bit_length() - 1] += 1
                hashes.write(hashlib.blake2b(content, digest_size=8).digest())
        num_distinct = _count_distinct(hashes, num_documents - num_empty)
    num_duplicates = num_documents - num_empty - num_distinct
    return DocumentCounts(num_documents, num_bytes, num_duplicates, num_empty, lengths.tolist())


def _count_distinct(hashes: IO[bytes], count: int, at_once: int = _AT_ONCE) -> int:
    """Counts the different hashes in a file.

    If there are many, each reading of the file compares those with one remainder alone.
    """
    parts = -(-count // at_once)
    return sum(_count_part(hashes, part, parts, at_once) for part in range(parts))


def _count_part(hashes: IO[bytes], part: int, parts: int, at_once: int) -> int:
    """Counts the different hashes whose remainder by `parts` is `part`."""
    hashes.seek(0)
    chosen = []
    while chunk := hashes.read(8 * at_once):
        numbers = np.frombuffer(chunk, "<u8")
        chosen.append(numbers[numbers % parts == part])
    return len(np.unique(np.concatenate(chosen)))


def histogram(counts: DocumentCounts, row_bytes: float) -> list[tuple[str, int, str]]:
    """Returns the lines of the histogram: a range of lengths, its documents, and a remark.

    The remark marks the range in which the length of a row lies.
    """
    filled = np.flatnonzero(counts.lengths)
    if not len(filled):
        return []
    rows = []
    for n in range(int(filled[0]), int(filled[-1]) + 1):
        remark = "about the length of a row" if 2**n <= row_bytes < 2 ** (n + 1) else ""
        label = f"{_bytes(2**n)} to {_bytes(2 ** (n + 1))}"
        rows.append((label, counts.lengths[n], remark))
    return rows


def _bytes(number: int) -> str:
    """Returns a power of two with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number} {unit}"
        number //= 1024
    return f"{number} TiB"
