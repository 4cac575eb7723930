"""Gives each process of a job its own log file, with time, host and rank in front of each line.

`start` sends the standard output and error of this process through a small second process, which
writes the log. It lives until nobody can write any more, so the log also has the last lines of a
process that was killed, and what native libraries wrote. It is this very file, run as a script, so
nothing but the standard library is imported here.

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
from collections.abc import Iterator
from pathlib import Path

BAR_SECONDS = 30.0  # how often the log gets the state of a line that has not ended
MAX_LINE = 65536  # bytes after which a line is broken
FINISH_SECONDS = 5.0  # how long a process waits for its writer at its end
_STARTS = "starts: "  # in the first line of each start
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # colours and moves of the cursor
# These would end the writer with its process, before the last lines are written.
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def log_directory(command: str, workdir: Path | None) -> Path:
    """Returns the folder of a command's logs: WORKDIR/logs if it trains, or else logs/COMMAND.

    The latter is in the current directory, since the run that a command reads may be somebody
    else's.
    """
    trains = command in ("compare", "train")
    return workdir / "logs" if trains and workdir else Path("logs", command)


def log_path(directory: Path, process_id: int) -> Path:
    """Returns the path of a process's log file."""
    return directory / f"process-{process_id:05d}.log"


def start(path: Path, process_id: int, num_processes: int) -> None:
    """Sends all output of this process to its log file, and that of process 0 to both.

    Process 0 still writes to a terminal if it did so before, so a progress bar looks the same.
    Lines are appended. Raises OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    command = shlex.join(sys.orig_argv).replace("\n", " ")
    text = f"process {process_id} of {num_processes} on {host} {_STARTS}{command}"
    with path.open("ab") as file:
        file.write(_prefix(host, process_id) + text.encode(errors="replace") + b"\n")
    _open_closed_descriptors()
    before = {number: os.dup(number) for number in (1, 2)}
    is_one_file = os.path.sameopenfile(1, 2)
    # In one pipe, the order of the lines on standard output and error is kept.
    joined = [(1, 2)] if process_id or is_one_file else [(1,), (2,)]
    channels = {numbers: _open_channel(numbers[0], process_id == 0) for numbers in joined}
    sources = [f"{read}:{numbers[0]}" for numbers, (read, _) in channels.items()]
    arguments = [str(path), host, str(process_id), *(sources)]
    writer = _start_writer(arguments, [read for read, _ in channels.values()])
    _flush_streams()
    for numbers, (read, write) in channels.items():
        for number in numbers:
            os.dup2(write, number)
        os.close(read)
        os.close(write)
    # A killed process loses what is in Python's own buffer. A stream that was closed has none.
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(line_buffering=True)
    atexit.register(_finish, writer, before)


def last_lines(path: Path, count: int = 20) -> list[str]:
    """Returns the last lines of a log file, at most back to the last start of its process."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - count * 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for number, line in reversed(list(enumerate(lines))):
        if re.match(rf"\S+ \S+ \d+ \| process \d+ of \d+ on \S+ {_STARTS}", line):
            lines = lines[number + 1 :]
            break
    return lines[-count:]


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


def _start_writer(arguments: list[str], descriptors: list[int]) -> subprocess.Popen[bytes]:
    """Starts the process that writes the log. Its standard streams are still the old ones."""
    # A process inherits the signals that are blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        # -I and -S: the writer starts within milliseconds, whatever is installed.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _flush_streams() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()


def _finish(writer: subprocess.Popen[bytes], before: dict[int, int]) -> None:
    """Waits until everything is written, so that nothing appears after this process has ended."""
    _flush_streams()
    for number, descriptor in before.items():
        os.dup2(descriptor, number)
    # A process that this one has started may still write.
    with contextlib.suppress(subprocess.TimeoutExpired):
        writer.wait(FINISH_SECONDS)


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


def _prefix(host: str, process_id: str | int) -> bytes:
    now = time.time()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{seconds}.{int(now % 1 * 1000):03d}Z {host} {process_id} | ".encode()


class _Writer:
    """Appends lines to the log, and says once if that fails."""

    def __init__(self, path: str, host: str, process_id: str):
        self._path, self._host, self._process_id = path, host, process_id
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._failed = False

    def write(self, lines: Iterator[bytes]) -> None:
        prefix = _prefix(self._host, self._process_id)
        text = b"".join(prefix + _ESCAPES.sub(b"", line) + b"\n" for line in lines)
        try:
            os.write(self._file, text)
        except OSError as error:
            if not self._failed:
                _pass_on(2, f"{self._path} cannot be written: {error.strerror}\n".encode())
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


def _write_log(path: str, host: str, process_id: str, *sources: str) -> None:
    """Writes what can be read from `sources` until all of them end.

    Each source is a descriptor to read from and, after a colon, the one that gets the same text if
    this is process 0.
    """
    writer = _Writer(path, host, process_id)
    targets = {int(read): int(write) for read, write in (pair.split(":") for pair in sources)}
    lines = {source: Lines() for source in targets}
    readers = set() if int(process_id) else set(targets)  # sources whose text is passed on
    due = time.monotonic() + BAR_SECONDS
    while lines:
        ready, _, _ = select.select(list(lines), [], [], max(0.0, due - time.monotonic()))
        for source in ready:
            try:
                data = os.read(source, MAX_LINE)
            except OSError:  # so a terminal says that nobody can write to it any more
                data = b""
            if source in readers and not _pass_on(targets[source], data):
                readers.remove(source)
            writer.write(lines[source].feed(data) if data else lines.pop(source).unfinished())
        if time.monotonic() >= due:
            due = time.monotonic() + BAR_SECONDS
            for unfinished in lines.values():
                writer.write(unfinished.unfinished())


if __name__ == "__main__":
    _write_log(*sys.argv[1:])
