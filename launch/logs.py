"""Gives each process of a job its own log file, with time, host and rank in front of each line.

`start` sends the standard output and error of this process through a small second process, which
writes the log. It ends after its process, so the log also has the last lines of a process that was
killed, and what native libraries wrote. It is this very file, run as a script, so only the standard
library is imported here before a log in an object store needs more.

A progress bar overwrites its line again and again. The log has its state every 30 seconds, and the
last one.
"""

import atexit
import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moe.storage.lines import LineWriter
    from moe.storage.paths import RunPath

BAR_SECONDS = 30.0  # how often the log gets the state of a line that has not ended
MAX_LINE = 65536  # bytes after which a line is broken
OBJECT_SECONDS = 10.0  # how often a log in an object store is written
FINISH_SECONDS = 10.0  # how long a process waits for its writer at its end
_STARTS = "starts: "  # in the first line of each start
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and moves of the cursor
# These would end the writer with its process, before the last lines are written. SIGUSR1 asks a
# process for its stacks, and SLURM sends it to the writer too.
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class _Running(NamedTuple):
    """The log of this process while it is open."""

    process_id: int
    writer: subprocess.Popen[bytes]
    before: dict[int, int]  # copies of the standard output and error from before the log


_running: _Running | None = None


def log_directory(command: str, workdir: "RunPath | None") -> "RunPath":
    """Returns the folder of a command's logs: WORKDIR/logs of launch.train, or else logs/COMMAND.

    The latter is in the current directory, since the run that a command reads may be somebody
    else's. If that cannot be written, as in a container, it is in the directory for short-lived
    files.
    """
    if workdir and command == "train":
        return workdir / "logs"
    here = "" if os.access(os.curdir, os.W_OK) else os.environ.get("TMPDIR", "/tmp")
    return Path(here, "logs", command)


def log_path(directory: "RunPath", process_id: int) -> "RunPath":
    """Returns the path of a process's log file."""
    return directory / f"process-{process_id:05d}.log"


def start(path: "RunPath", process_id: int, num_processes: int) -> None:
    """Sends all output of this process to its log file, and that of process 0 to both.

    Process 0 still writes to a terminal if it did so before, so a progress bar looks the same.
    Lines are appended. Raises OSError if the file cannot be written.
    """
    global _running
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    _open_closed_descriptors()
    before = {number: os.dup(number) for number in (1, 2)}
    is_one_file = os.path.sameopenfile(1, 2)
    # In one pipe, the order of the lines on standard output and error is kept.
    joined = [(1, 2)] if process_id or is_one_file else [(1,), (2,)]
    channels = {numbers: _open_channel(numbers[0], process_id == 0) for numbers in joined}
    sources = [f"{read}:{numbers[0]}" for numbers, (read, _) in channels.items()]
    host = socket.gethostname()
    command = shlex.join(sys.orig_argv).replace("\n", " ")
    text = f"process {process_id} of {num_processes} on {host} {_STARTS}{command}"
    arguments = [str(path), host, str(process_id), text, *sources]
    writer = _start_writer(path, arguments, [read for read, _ in channels.values()])
    _flush_streams()
    for numbers, (read, write) in channels.items():
        for number in numbers:
            os.dup2(write, number)
        os.close(read)
        os.close(write)
    # A killed process loses what is in Python's own buffer. A stream that was closed has none.
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(line_buffering=True)
    _running = _Running(process_id, writer, before)
    atexit.register(finish)


def show(text: str) -> None:
    """Shows a text where this process wrote before it had a log. All of process 0's is shown."""
    if _running is not None and _running.process_id:
        _pass_on(_running.before[2], f"{text}\n".encode(errors="replace"))


def finish() -> None:
    """Waits until everything is written, so that nothing appears after this process has ended.

    What it prints from here on is not in the log. Does nothing without a log.
    """
    global _running
    if _running is None:
        return
    running, _running = _running, None
    _flush_streams()
    for number, descriptor in running.before.items():
        os.dup2(descriptor, number)
    assert running.writer.stdin is not None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        running.writer.stdin.write(b"\n")
        running.writer.wait(FINISH_SECONDS)


def last_lines(path: "RunPath", count: int = 20, since: float = 0.0) -> list[str]:
    """Returns the last lines of a log file, at most back to the last start of its process.

    Lines from before the time `since` are left out. There are none if the file cannot be read.
    """
    try:
        text = _read_end(path, count * 4096)
    except OSError:
        return []
    lines = text.decode(errors="replace").splitlines()
    for number, line in reversed(list(enumerate(lines))):
        if re.match(rf"\S+ \S+ \d+ \| process \d+ of \d+ on \S+ {_STARTS}", line):
            lines = lines[number + 1 :]
            break
    return [line for line in lines if line >= _time_text(since)][-count:]


def _read_end(path: "RunPath", size: int) -> bytes:
    """Returns the last bytes of a log file. Raises OSError."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read()
    from moe.storage.lines import line_parts
    from moe.storage.paths import cloud_errors, explain

    try:
        return b"".join(part.read_bytes() for part in line_parts(path)[-2:])
    except cloud_errors() as error:
        raise OSError(explain(error)) from None


def _open_closed_descriptors() -> None:
    """Opens standard streams that are closed, or a pipe would get one of their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(number, True)


def _open_channel(number: int, is_passed_on: bool) -> tuple[int, int]:
    """Returns two descriptors: what is written to the second can be read from the first.

    They are the ends of a pipe or, if the output goes on to a terminal, of a terminal of their own.
    """
    if not (is_passed_on and os.isatty(number)):
        return os.pipe()
    read, write = os.openpty()
    tty.setraw(write)  # the text is passed on as it is
    termios.tcsetwinsize(write, termios.tcgetwinsize(number))
    return read, write


def _start_writer(
    path: "RunPath", arguments: list[str], descriptors: list[int]
) -> subprocess.Popen[bytes]:
    """Starts the process that writes the log. Its standard streams are still the old ones."""
    # With -I and -S it starts within milliseconds, but finds no packages.
    script = ["-I", "-S", __file__] if isinstance(path, Path) else ["-m", "launch.logs"]
    # A process inherits the signals that are blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        return subprocess.Popen(
            [sys.executable, *script, *arguments],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            bufsize=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _flush_streams() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()


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


def _time_text(seconds: float) -> str:
    """Returns a time as the log has it. Later times are larger texts."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


class _File:
    """Appends to a log in a file system, and says once if that fails."""

    def __init__(self, path: str):
        self._path, self._failed = path, False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, text: bytes) -> None:
        try:
            os.write(self._file, text)
        except OSError as error:
            if not self._failed:
                _pass_on(2, f"{self._path} cannot be written: {error.strerror}\n".encode())
            self._failed = True

    def flush(self) -> None:
        """Has nothing to do, since nothing is held back."""


class _Object:
    """Appends to a log in an object store from time to time, and says once if that fails."""

    def __init__(self, path: str):
        self._path, self._failed = path, False
        self._pending: list[bytes] = []
        self._writer: LineWriter | None = None

    def write(self, text: bytes) -> None:
        self._pending.append(text)

    def flush(self) -> None:
        """Writes what came since the last call."""
        from moe.config import ConfigError
        from moe.storage.lines import LineWriter
        from moe.storage.owner import unchecked
        from moe.storage.paths import cloud_errors, explain, run_path

        if not any(self._pending):
            return
        try:
            self._writer = self._writer or LineWriter(run_path(self._path), unchecked)
            self._writer.append(b"".join(self._pending).decode(errors="replace"))
            self._pending = []
            self._writer.flush()
        except (ConfigError, OSError, *cloud_errors()) as error:
            if not self._failed:
                _pass_on(2, f"{self._path} cannot be written: {explain(error)}\n".encode())
            self._failed = True


def _pass_on(descriptor: int, data: bytes) -> bool:
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


def _write_log(path: str, host: str, process_id: str, first_line: str, *sources: str) -> None:
    """Writes what can be read from `sources` until all of them end, or the process that is logged.

    Each source is a descriptor to read from and, after a colon, the one that gets the same text if
    this is process 0. Standard input says that the process ends: it gets a byte, or is closed by a
    kill. The sources alone would not do, since other processes that it started may hold them.
    """
    log, period = (_Object(path), OBJECT_SECONDS) if "://" in path else (_File(path), BAR_SECONDS)

    def write(texts: Iterable[bytes]) -> None:
        prefix = f"{_time_text(time.time())} {host} {process_id} | ".encode()
        log.write(b"".join(prefix + _ESCAPES.sub(b"", text) + b"\n" for text in texts))

    write([first_line.encode(errors="replace")])
    targets = {int(read): int(write) for read, write in (pair.split(":") for pair in sources)}
    lines = {source: Lines() for source in targets}
    readers = set() if int(process_id) else set(targets)  # sources whose text is passed on
    due, is_ending = time.monotonic() + period, False
    while lines:
        left = 0.0 if is_ending else max(0.0, due - time.monotonic())
        waited_for = list(lines) if is_ending else [0, *lines]
        ready, _, _ = select.select(waited_for, [], [], left)
        if is_ending and not ready:
            break
        is_ending |= 0 in ready
        for source in (number for number in ready if number):
            data = _read(source)
            if source in readers and not _pass_on(targets[source], data):
                readers.remove(source)
            write(lines[source].feed(data) if data else lines.pop(source).unfinished())
        if time.monotonic() >= due:
            due = time.monotonic() + period
            for unfinished in lines.values():
                write(unfinished.unfinished())
            log.flush()
    for unfinished in lines.values():
        write(unfinished.unfinished())
    log.flush()


if __name__ == "__main__":
    _write_log(*sys.argv[1:])
