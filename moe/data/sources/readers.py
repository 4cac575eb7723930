"""Reads the documents of one file: plain text, one JSON object a line, or Parquet.

Memory does not grow with a file: a plain one is cut into documents of at most 1 MiB, and the others
are read one line or one batch at a time.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe.data.sources.document import Document

LARGEST_PLAIN = 2**20  # bytes of a document that is cut from a plain file
_ROWS_AT_ONCE = 256  # of a Parquet file
_FIX_LINE = "write one object a line"
_BLOCK = 2**18  # bytes that are decompressed at once
_CODECS = {".gz": "gzip", ".zst": "zstd"}

# What is called with the place and the reason where a document cannot be read. It raises an error,
# or it counts the document, which is then left out.
Refuse = Callable[[str, str], None]


def read_plain(
    file: IO[bytes], name: str, refuse: Refuse, stops: Sequence[int]
) -> Iterator[tuple[int, Document]]:
    """Yields the documents of a plain file, each with the number of its part.

    The parts end at the bytes `stops`. Each is one document, or several that end where lines end.
    """
    line = 1
    for part, stop in enumerate(stops):
        rest, is_last = b"", False
        while not is_last:
            block = rest + file.read(min(LARGEST_PLAIN + 1 - len(rest), stop - file.tell()))
            is_last = len(block) <= LARGEST_PLAIN
            end = len(block) if is_last else _end_of_line(block)
            data, rest = block[:end], block[end:]
            is_whole = is_last and line == 1 and len(stops) == 1
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                bad_line = line + data.count(b"\n", 0, error.start)
                refuse(f"{name}:{bad_line}", not_utf8(error))
            else:
                yield part, Document(text, name if is_whole else f"{name}:{line}", {})
            line += data.count(b"\n")


def _end_of_line(block: bytes) -> int:
    """Returns where to cut a block that is too long: after a line, or between two characters."""
    if end := block.rfind(b"\n", 0, LARGEST_PLAIN) + 1:
        return end
    end = LARGEST_PLAIN
    while end > LARGEST_PLAIN - 3 and block[end] & 0xC0 == 0x80:  # a byte inside a character
        end -= 1
    return end


def read_lines(file: IO[bytes], name: str, refuse: Refuse, text_field: str) -> Iterator[Document]:
    """Yields a document for each line of JSON objects, which may be compressed."""
    number = 0
    try:
        for number, line in enumerate(_decompressed(file, name), 1):
            origin = f"{name}:{number}"
            if line.isspace():
                continue
            try:
                # Windows writes a mark at the beginning of a file, which belongs to no line.
                example = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                refuse(origin, not_utf8(error))
            except json.JSONDecodeError as error:
                refuse(origin, f"is not JSON ({error.msg}, column {error.colno}): {_FIX_LINE}")
            except (ValueError, RecursionError) as error:  # too long a number, or nested too deeply
                refuse(origin, f"is not JSON ({error}): {_FIX_LINE}")
            else:
                if document := read_example(example, origin, refuse, text_field):
                    yield document
    except (pa.ArrowException, OSError) as error:
        refuse(f"{name}:{number + 1}", _damaged(error))


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """Returns the lines of a file that may be compressed."""
    codec = next((codec for suffix, codec in _CODECS.items() if name.endswith(suffix)), None)
    return io.BufferedReader(_Decompressed(file, codec), _BLOCK) if codec else file


class _Decompressed(io.RawIOBase):
    """Decompresses a file, and raises the error of a damaged one after all that comes before it.

    Unlike zstandard, Arrow raises an error for a file that was cut, but the read that fails drops
    what it has already decompressed. So those bytes are read again, one at a time.
    """

    def __init__(self, file: IO[bytes], codec: str) -> None:
        self._file, self._codec = file, codec
        # All streams are kept: the first one's end would close the file.
        self._streams = [self._open()]
        self._num_read, self._read_size = 0, _BLOCK

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            data = self._streams[-1].read(min(len(buffer), self._read_size))
        except (pa.ArrowException, OSError) as error:
            if self._read_size == 1 or _is_failure(error):
                raise
            self._read_again()
            return self.readinto(buffer)
        if not data and not self._num_read and not self._file.tell():
            raise pa.ArrowInvalid("it has no bytes")
        buffer[: len(data)] = data
        self._num_read += len(data)
        return len(data)

    def _open(self) -> pa.NativeFile:
        return pa.CompressedInputStream(pa.PythonFile(self._file, "r"), self._codec)

    def _read_again(self) -> None:
        """Begins the file again, and goes on behind the bytes that were read."""
        self._file.seek(0)
        self._streams.append(self._open())
        for start in range(0, self._num_read, _BLOCK):
            self._streams[-1].read(min(_BLOCK, self._num_read - start))
        self._read_size = 1


def read_parquet(file: IO[bytes], name: str, refuse: Refuse, text_field: str) -> Iterator[Document]:
    """Yields a document for each row of a Parquet file."""
    number = 0
    try:
        table = pq.ParquetFile(file, pre_buffer=False)
        columns = columns_to_read(table.schema_arrow, text_field)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from read_batch(batch, name, number, refuse, text_field)
            number += len(batch)
    except (pa.ArrowException, OSError) as error:
        refuse(f"{name}:{number + 1}", _damaged(error))


def columns_to_read(schema: pa.Schema, text_field: str) -> list[str]:
    """Returns the columns of the text, and of the numbers and strings by which to slice.

    The others are not read, since Python cannot hold every value of them, such as a date of the
    year 10000.
    """
    return [
        field.name for field in schema if field.name == text_field or _can_be_sliced(field.type)
    ]


def _can_be_sliced(kind: pa.DataType) -> bool:
    """Returns whether a column holds numbers, truth values or strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in (*kinds, *numbers))


def read_batch(
    batch: pa.RecordBatch, name: str, num_before: int, refuse: Refuse, text_field: str
) -> Iterator[Document]:
    """Yields a document for each row of a batch, before which the file has `num_before` rows."""
    for number, example in enumerate(_examples(batch), num_before + 1):
        origin = f"{name}:{number}"
        if isinstance(example, UnicodeDecodeError):
            refuse(origin, not_utf8(example))
        elif document := read_example(example, origin, refuse, text_field):
            yield document


def _examples(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yields the rows of a batch, or the error of one that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                (example,) = batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error
            else:
                yield example


def read_example(example: Any, origin: str, refuse: Refuse, text_field: str) -> Document | None:
    """Returns an example's text and its other fields. A list of messages becomes JSON text."""
    if not isinstance(example, Mapping):
        refuse(origin, f"is no JSON object: {_FIX_LINE}")
        return None
    text = example.get(text_field)
    if isinstance(text, list):
        try:
            text = json.dumps(text, ensure_ascii=False)
        except TypeError as error:  # a date or bytes, which Parquet can hold
            names = ", ".join(example)[:300]
            fix = f"set data.text_field to one of ({names})"
            refuse(origin, f"field {text_field!r} holds a list that is no JSON ({error}): {fix}")
            return None
    if not isinstance(text, str):
        known = f"holds {type(text).__name__}, no text" if text_field in example else "is missing"
        names = ", ".join(example)[:300]
        refuse(origin, f"field {text_field!r} {known}: set data.text_field to one of ({names})")
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(origin, f"has half a character, {text[error.start]!r}: write it as UTF-8")
        return None
    fields = {
        name: value
        for name, value in example.items()
        if name != text_field and isinstance(value, str | int | float | bool)
    }
    return Document(text, origin, fields)


def not_utf8(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with bytes that are no text, and the fix."""
    bad = error.object[error.start]
    return f"is not UTF-8 (byte 0x{bad:02x}): convert the file, as iconv does"


def _damaged(error: Exception) -> str:
    """Returns what is wrong with a file that ends too early or cannot be decompressed.

    Raises the error again if it says that the file could not be read at all.
    """
    if _is_failure(error):
        raise error
    reason = " ".join(str(error).split())[:200]
    return f"is damaged, as a file that was cut is ({reason}): copy or download it again"


def _is_failure(error: Exception) -> bool:
    """Returns whether a file could not be read at all, and is not just damaged.

    Arrow's own errors are plain OSErrors without a number.
    """
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None)
