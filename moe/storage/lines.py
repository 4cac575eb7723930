"""Appends lines to a file of a run directory, also where nothing can be appended to a file.

In a file system the lines are in one file. An object store can only write an object whole. There
the lines are in parts, NAME, NAME.000001, NAME.000002 and so on, of about a megabyte each, and the
last part is written again as it grows. A short run has the file NAME alone in both.
"""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moe.files import naming_file
from moe.storage.paths import RunPath, write_whole

PART_BYTES = 2**20  # a part that has grown beyond this is followed by another one
FLUSH_SECONDS = 10  # an object store's readers see lines that are at most so old


def line_parts(path: RunPath) -> list[RunPath]:
    """Returns the files that hold the lines of `path`, in order. There are none before the first.

    In a file system it is `path` itself.
    """
    if not path.exists():
        return []
    if isinstance(path, Path):
        return [path]
    names = sorted(other.name for other in path.parent.iterdir())
    later = [name for name in names if name.removeprefix(f"{path.name}.").isdecimal()]
    return [path, *(path.with_name(name) for name in later)]


def read_lines(path: RunPath) -> Iterator[str]:
    """Yields the lines of one part. The last one has no line end if it was cut short."""
    if isinstance(path, Path):
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file
    else:
        yield from io.StringIO(path.read_bytes().decode(errors="replace"), newline="\n")


class LineWriter:
    """Appends lines to a file of a run. In an object store they are written in batches.

    `check` is called before each write. It raises an error if the run has another owner now.
    """

    def __init__(self, path: RunPath, check: Callable[[], None] = lambda: None):
        self._path, self._check = path, check
        self._part, self._content = path, b""  # the last part, and what it holds
        self._has_new_lines, self._written = False, time.monotonic()
        if not isinstance(path, Path) and (parts := line_parts(path)):
            self._part, self._content = parts[-1], parts[-1].read_bytes()

    def append(self, line: str) -> None:
        """Adds a line. In a file system it is written when this returns."""
        if isinstance(self._path, Path):
            self._check()
            with naming_file(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._content += line.encode()
        self._has_new_lines = True
        if time.monotonic() - self._written >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that were not written yet. Raises OSError."""
        if not self._has_new_lines:
            return
        self._check()
        write_whole(self._part, self._content)
        self._has_new_lines, self._written = False, time.monotonic()
        if len(self._content) >= PART_BYTES:
            number = int(self._part.name.removeprefix(self._path.name).lstrip(".") or 0) + 1
            self._part = self._path.with_name(f"{self._path.name}.{number:06}")
            self._content = b""
