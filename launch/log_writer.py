"""Writes the log of one process: the second process that launch.logs starts.

It gets what its process prints, writes it with time, host and rank in front of each line, and ends
after it. Only the standard library is imported here, before a log in an object store needs more.

A start writes into a file of its own first. Once its job owns the run, its lines go on in the run's
log, and so do those that were written before. If another job takes the run over, they go back.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.storage.lines import LineWriter

BAR_SECONDS = 30.0  # how often the log gets the state of a line that has not ended
MAX_LINE = 65536  # bytes after which a line is broken
OBJECT_SECONDS = 10.0  # how often a log in an object store is written
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and moves of the cursor


class Lines:
    """Splits what a process writes into lines, and keeps only the last state of a progress bar."""

    def __init__(self) -> None:
        self._unfinished, self._returned = b"", b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields the lines that `data` ends."""
        *ended, rest = (self._unfinished + data).split(b"\n")
        if ended:
            self._returned = b""
        for line in ended:
            yield _last_state(line)[0]
        self._unfinished = b"".join(_last_state(rest))
        if len(self._unfinished) > MAX_LINE:
            yield self._unfinished
            self._unfinished = b""

    def unfinished(self) -> Iterator[bytes]:
        """Yields the state of the line that has not ended, unless it was returned before."""
        state, _ = _last_state(self._unfinished)
        if state not in (b"", self._returned):
            self._returned = state
            yield state


def _last_state(line: bytes) -> tuple[bytes, bytes]:
    """Returns what was last seen in a line, and what came after it: returns and blanks.

    Each carriage return lets the text after it overwrite the text before it.
    """
    states = line.split(b"\r")
    last = len(states) - 1
    while last > 0 and not states[last].strip():
        last -= 1
    return states[last], b"".join(b"\r" + blank for blank in states[last + 1 :])


def time_text(seconds: float) -> str:
    """Returns a time as the log has it. Later times are larger texts."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


class Log:
    """Writes the lines of a process into the log of its run while the run is its own.

    Before and after that they are in `path`, a file of this start.
    """

    def __init__(self, path: str):
        self._path, self._file = path, _open(path)
        self._is_moved = False
        self._lease: tuple[str, int] | None = None

    def move(self, path: str, run: str, lease: int | None) -> None:
        """Goes on in the log of a run, which also gets what this start has written so far.

        `lease` is the number of the lease by which the job owns the run, if there is one.
        """
        self._lease = None if lease is None else (run, lease)
        if self._is_moved:
            return
        first, self._file, self._is_moved = Path(self._path), _open(path), True
        self._file.write(first.read_bytes())
        with contextlib.suppress(OSError):
            first.unlink()
            first.parent.rmdir()

    def write(self, text: bytes) -> None:
        """Adds whole lines, if there are any. In an object store, `flush` writes them."""
        if not text:
            return
        # A state of a progress bar is no line yet, and a look into an object store takes long.
        if isinstance(self._file, _File):
            self._leave_lost_run()
        self._file.write(text)

    def flush(self) -> None:
        """Writes what was held back."""
        self._leave_lost_run()
        self._file.flush()

    @property
    def period(self) -> float:
        """Returns after how many seconds what is unfinished or held back is to be written."""
        return OBJECT_SECONDS if isinstance(self._file, _Object) else BAR_SECONDS

    def _leave_lost_run(self) -> None:
        """Goes back to the file of this start if another job has taken the run over."""
        if not self._is_moved or self._lease is None or not _is_lost(*self._lease):
            return
        held_back = self._file.held_back()
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        self._file, self._is_moved = _open(self._path), False
        self._file.write(held_back)


def _open(path: str) -> "_File | _Object":
    return _Object(path) if "://" in path else _File(path)


def _is_lost(run: str, lease: int) -> bool:
    """Returns whether there is a newer lease of a run. An error says nothing about that."""
    if "://" not in run:
        with contextlib.suppress(OSError):
            names = os.listdir(os.path.join(run, "lease"))
            return any(int(name) > lease for name in names if name.isdecimal())
        return False
    from moe.config import ConfigError
    from moe.storage.owner import LostRun, check_lease
    from moe.storage.paths import cloud_errors, run_path

    try:
        check_lease(run_path(run), lease)
    except LostRun:
        return True
    except (ConfigError, OSError, *cloud_errors()):
        pass
    return False


class _File:
    """Appends to a log in a file system, and says once if that fails.

    It is locked until this process ends, so that a reader sees whether more lines may come.
    """

    def __init__(self, path: str):
        self._path, self._failed = path, False
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # a file system may have no locks
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def write(self, text: bytes) -> None:
        try:
            os.write(self._file, text)
        except OSError as error:
            if not self._failed:
                pass_on(2, f"{self._path} cannot be written: {error.strerror}\n".encode())
            self._failed = True

    def flush(self) -> None:
        """Has nothing to do, since nothing is held back."""

    def held_back(self) -> bytes:
        """Returns what was not written yet: nothing."""
        return b""


class _Object:
    """Appends to a log in an object store from time to time, and says once if that fails."""

    def __init__(self, path: str):
        self._path, self._failed = path, False
        self._pending: list[bytes] = []
        self._unwritten = b""  # what the writer has got and not yet written
        self._writer: LineWriter | None = None

    def write(self, text: bytes) -> None:
        self._pending.append(text)

    def held_back(self) -> bytes:
        """Returns what was not written yet."""
        return b"".join([self._unwritten, *self._pending])

    def flush(self) -> None:
        """Writes what came since the last call."""
        from moe.config import ConfigError
        from moe.storage.lines import LineWriter
        from moe.storage.owner import unchecked
        from moe.storage.paths import cloud_errors, explain, run_path

        if not self.held_back():
            return
        try:
            self._writer = self._writer or LineWriter(run_path(self._path), unchecked)
            text, self._pending = b"".join(self._pending), []
            # If the writer cannot write the text now, it holds it until the next try.
            self._unwritten += text
            self._writer.append(text.decode(errors="replace"))
            self._writer.flush()
            self._unwritten = b""
        except (ConfigError, OSError, *cloud_errors()) as error:
            if not self._failed:
                pass_on(2, f"{self._path} cannot be written: {explain(error)}\n".encode())
            self._failed = True


def pass_on(descriptor: int, data: bytes) -> bool:
    """Writes all of `data`, and returns whether somebody can still read it."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return False
    return True


def _read(source: int) -> bytes:
    """Returns what can be read, which is nothing if nobody can write any more."""
    try:
        return os.read(source, MAX_LINE)
    except OSError:  # a terminal says so by an error
        return b""


class Channel:
    """Reads what the process that is logged says on standard input: a line for each message."""

    def __init__(self) -> None:
        self._text = b""

    def read(self) -> Iterator[list | None]:
        """Yields the arguments of `Log.move`, or None where the process ends.

        The end is an empty line, or that of a process that was killed.
        """
        data = os.read(0, MAX_LINE)
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            yield json.loads(line) if line else None
        if not data:
            yield None


def _prefixed(texts: Iterable[bytes], name: str) -> bytes:
    """Returns the lines of the log for some texts of the process of this name."""
    prefix = f"{time_text(time.time())} {name} | ".encode()
    return b"".join(prefix + _ESCAPES.sub(b"", text) + b"\n" for text in texts)


def write_log(path: str, host: str, process_id: str, first_line: str, *sources: str) -> None:
    """Writes what can be read from `sources` until all of them end, or the process that is logged.

    Each source is a descriptor to read from and, after a colon, the one that gets the same text if
    this is process 0. The sources alone do not say that the process ends, since other processes
    that it started may hold them.
    """
    log, channel = Log(path), Channel()

    write = lambda texts: log.write(_prefixed(texts, f"{host} {process_id}"))
    write([first_line.encode(errors="replace")])
    targets = {int(read): int(write) for read, write in (pair.split(":") for pair in sources)}
    lines = {source: Lines() for source in targets}
    readers = set() if int(process_id) else set(targets)  # sources whose text is passed on
    due, is_ending = time.monotonic() + log.period, False
    while lines:
        left = 0.0 if is_ending else max(0.0, due - time.monotonic())
        waited_for = list(lines) if is_ending else [0, *lines]
        ready, _, _ = select.select(waited_for, [], [], left)
        if is_ending and not ready:
            break
        for message in channel.read() if 0 in ready else ():
            if message is None:
                is_ending = True
            else:
                log.move(*message)
                due = min(due, time.monotonic() + log.period)
        for source in (number for number in ready if number):
            data = _read(source)
            if source in readers and not pass_on(targets[source], data):
                readers.remove(source)
            write(lines[source].feed(data) if data else lines.pop(source).unfinished())
        if time.monotonic() >= due:
            due = time.monotonic() + log.period
            for unfinished in lines.values():
                write(unfinished.unfinished())
            log.flush()
    for unfinished in lines.values():
        write(unfinished.unfinished())
    log.flush()


if __name__ == "__main__":
    write_log(*sys.argv[1:])
