"""Gives each process of a job its own log file, with time, host and rank in front of each line.

`start` sends the standard output and error of this process through a small second process,
launch/log_writer.py, which writes the log. It ends after its process, so the log also has the last
lines of a process that was killed, and what native libraries wrote.

A start of a command that writes a run has a log file of its own first. The lines move to the log of
the run once the job owns it, so a start that is refused leaves nothing in the run's directory.

A progress bar overwrites its line again and again. The log has its state every 30 seconds, and the
last one.
"""

import atexit
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.local_signals import signal_name
from launch.log_writer import pass_on, time_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe.storage.paths import RunPath

_WRITER = Path(__file__).with_name("log_writer.py")
FINISH_SECONDS = 10.0  # how long a process waits for its writer at its end
WRITTEN_SECONDS = 2.0  # how long a reader waits for the log of a process that has just ended
_QUIET_SECONDS = 0.2  # after which a log without a change counts as written
LOST = "log lost: "  # begins the line of a process whose log has ended before it
_STARTS = "starts: "  # in the first line of each start
# These would end the writer with its process, before the last lines are written. SIGUSR1 asks a
# process for its stacks, and SLURM sends it to the writer too.
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class _Running(NamedTuple):
    """The log of this process while it is open."""

    process_id: int
    writer: subprocess.Popen[bytes]
    output: int  # the descriptor of Python's standard output
    before: dict[int, int]  # copies of the standard output and error from before the log
    run_log: "RunPath | None"  # where the log goes on once the job owns its run


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


class Places(NamedTuple):
    """Says in which folder the processes of a job have their logs."""

    first: "RunPath"
    run: "RunPath | None" = None  # from when the job owns its run

    def path(self, process_id: int) -> "RunPath":
        """Returns the log file of a process. That in the first folder is gone once it has moved."""
        first = log_path(self.first, process_id)
        if self.run is None or first.exists():
            return first
        return log_path(self.run, process_id)


def find_places(command: str, workdir: "RunPath | None", coordinator: str) -> Places:
    """Returns where the logs of a job are, whose process 0 has the address `coordinator`.

    The address tells this start of a command from others in the same directory.
    """
    directory, first = log_directory(command, workdir), log_directory(command, None)
    if directory == first:
        return Places(first)
    return Places(first / re.sub(r"[^\w.-]+", "-", coordinator), directory)


def log_path(directory: "RunPath", process_id: int) -> "RunPath":
    """Returns the path of a process's log file."""
    return directory / f"process-{process_id:05d}.log"


def start(
    path: "RunPath", process_id: int, num_processes: int, run_log: "RunPath | None" = None
) -> None:
    """Sends all output of this process to its log file; that of process 0 still goes on, too.

    It goes where it went before. If that is a terminal, a progress bar looks the same.
    Lines are appended. If there is a `run_log`, the log goes on there when `own` is called. What
    native libraries write to the standard output goes to the standard error. Raises OSError if the
    file cannot be written.
    """
    global _running
    _try(path)
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
    needs_packages = any("://" in str(place) for place in (path, run_log))
    descriptors = [read for read, _ in channels.values()]
    writer = _start_writer(arguments, descriptors, needs_packages)
    _flush_streams()
    for numbers, (read, write) in channels.items():
        for number in numbers:
            os.dup2(write, number)
        os.close(read)
        os.close(write)
    _running = _Running(process_id, writer, _separate_output(), before, run_log)
    atexit.register(finish)


def _separate_output() -> int:
    """Returns a descriptor for what Python prints, and sends all native text to descriptor 2.

    Gloo prints to descriptor 1 whenever it connects processes, and the result of a command would no
    longer be JSON alone.
    """
    output = os.dup(1)
    os.dup2(2, 1)
    if sys.stdout is not None:  # it is None if it was closed
        # A killed process loses what is in Python's own buffer, which therefore has one line.
        names = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
        sys.stdout = open(output, "w", buffering=1, **names)  # noqa: SIM115  # to the end
    return output


def has_started() -> bool:
    """Returns whether what this process prints goes to its log."""
    return _running is not None


def write_line(command: str, process_id: int, text: str) -> None:
    """Appends a line to the log of a process that ends before its log has started.

    It is among those of commands that own no run. Raises OSError if it cannot be written.
    """
    path = Path(log_path(log_directory(command, None), process_id))
    _try(path)
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"{time_text(time.time())} {socket.gethostname()} {process_id} | {text}\n")


def own(run: "RunPath", lease: int | None) -> None:
    """Lets the log go on in the directory of the run, which the job of this process owns now.

    `lease` is the number of the lease by which it does, if there is one: the log leaves the run if
    there is a newer one. Does nothing for a command without a run. Raises OSError if the file
    cannot be written.
    """
    if _running is None or _running.run_log is None:
        return
    _try(_running.run_log, "workdir")
    _say(_running, json.dumps([str(_running.run_log), str(run), lease]))


def show(text: str) -> None:
    """Shows a text where this process wrote before it had a log. All of process 0's is shown."""
    if _running is not None and _running.process_id:
        pass_on(_running.before[2], f"{text}\n".encode(errors="replace"))


def finish() -> None:
    """Waits until everything is written, so that nothing appears after this process has ended.

    What it prints from here on is not in the log. Does nothing without a log.
    """
    global _running
    if _running is None:
        return
    running, _running = _running, None
    _flush_streams()
    for number, descriptor in ((running.output, 1), (1, 2), (2, 2)):
        os.dup2(running.before[descriptor], number)
    _say(running, "")
    with contextlib.suppress(subprocess.TimeoutExpired):
        if code := running.writer.wait(FINISH_SECONDS):
            # It begins a line of its own, since a progress bar may have been cut off.
            text = (
                f"\n{LOST}process {running.process_id}'s {_WRITER.name} {ending(code)}, and what "
            )
            text += "the process printed since then is neither shown nor in its log\n"
            pass_on(2, text.encode())


def ending(code: int) -> str:
    """Returns how a process ended whose return code this is, for a message."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal_name(-code) or f'signal {-code}'}"


def _say(running: _Running, text: str) -> None:
    """Sends the writer a line, if it is still there."""
    assert running.writer.stdin is not None
    with contextlib.suppress(OSError):
        running.writer.stdin.write(f"{text}\n".encode())


def _try(path: "RunPath", place: str = "the current directory") -> None:
    """Makes a log file, or raises OSError. An object store says only later whether it can.

    The error says to set the `place` to another one.
    """
    if isinstance(path, Path):
        from moe.storage.paths import make_directory

        make_directory(path.parent, place)
        path.open("ab").close()


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
    return [line for line in lines if line >= time_text(since)][-count:]


def last_lines_of_ended(
    find_path: "Callable[[], RunPath]", since: float = 0.0, seconds: float = WRITTEN_SECONDS
) -> list[str]:
    """Returns the last lines of a process that has just ended, whose writer may still be writing.

    Returns them once the writer has ended and there are some, or after `seconds`. Where no lock
    tells whether it has, they count as whole if they stay the same for a while. The log may move
    until then.
    """
    end, before = time.monotonic() + seconds, []
    while True:
        is_open = _is_open(path := find_path())
        lines = last_lines(path, since=since)
        if (lines and lines == before and not is_open) or time.monotonic() > end:
            return lines
        before = lines
        time.sleep(_QUIET_SECONDS)


def _is_open(path: "RunPath") -> bool:
    """Returns whether a writer still holds a log, as far as the file system tells."""
    if isinstance(path, Path):
        try:
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no file, or there are no locks
            pass
    return False


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
    arguments: list[str], descriptors: list[int], needs_packages: bool
) -> subprocess.Popen[bytes]:
    """Starts the process that writes the log. Its standard streams are still the old ones."""
    # With -I and -S it starts within milliseconds, but finds no packages.
    script = ["-m", "launch.log_writer"] if needs_packages else ["-I", "-S", str(_WRITER)]
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
