"""Lets a launcher wait for its processes and for the signals that it passes on to them."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# `timeout` sends a signal to its command, and then to the command's group: that is one signal.
SAME_SIGNAL_SECONDS = 0.1


class Signals:
    """Waits for signals, and says which have come."""

    def __init__(self, reader: socket.socket):
        self._reader, self._last, self._time = reader, 0, 0.0

    def wait(self, seconds: float | None) -> list[int]:
        """Returns the signals that have come, after the first one or after some seconds.

        A signal that comes twice within an instant counts once.
        """
        ready, _, _ = select.select([self._reader], [], [], seconds)
        found = []
        for number in self._reader.recv(256) if ready else b"":
            now = time.monotonic()
            if number != self._last or now - self._time > SAME_SIGNAL_SECONDS:
                found.append(number)
            if number != signal.SIGCHLD:
                self._last, self._time = number, now
        return found


@contextlib.contextmanager
def catch_signals() -> Iterator[Signals]:
    """Yields the signals that arrive from here on, instead of letting them end this process.

    SIGUSR1 asks processes for their stacks. A scheduler sends it to all of a job, and a launcher
    ignores it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {
        number: signal.signal(number, lambda *_: None)
        for number in (*STOP_SIGNALS, signal.SIGCHLD, signal.SIGTSTP)
        # Under nohup, SIGHUP is ignored, and stays so.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    descriptor_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield Signals(reader)
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


def pause(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stops this process and the groups of others, as Ctrl-Z does, until a shell continues it."""
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        if number == signal.SIGSTOP:
            os.kill(os.getpid(), signal.SIGSTOP)


def signal_name(number: int) -> str | None:
    """Returns the name of a signal, or None if no signal with a name has this number."""
    return {member.value: member.name for member in signal.Signals}.get(number)
