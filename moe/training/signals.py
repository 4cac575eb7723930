"""Catches SIGINT and SIGTERM while a run trains.

The first signal asks the run to save and stop. The second one ends the process. In a job of several
processes, a signal before the first step is done ends all of them, since there is nothing to save.
Schedulers send one request as several SIGTERMs: SLURM signals a process both directly and through
its srun.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from moe.parallel import watch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_S = 5.0  # SIGTERMs that follow a SIGTERM within this time are the same request
_FIRST = "\nstopping: this step is finished and saved first; a second signal stops at once\n"
_SECOND = "\nstopped at once: what was trained since the last checkpoint is lost\n"


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM has arrived.

    A second signal, of either kind, ends the process with exit code 128 + its number, unless both
    are SIGTERM and the second follows within SAME_REQUEST_S. A thread of its own watches for
    signals: Python calls handlers only between two of its own instructions, and the main thread can
    spend minutes in a compilation or in a wait for a device.
    """
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield arrived.is_set  # only the main thread may have signal handlers
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    before = {number: signal.signal(number, lambda *_: arrived.set()) for number in SIGNALS}
    descriptor_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield arrived.is_set
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # this ends the thread
        watcher.join()
        reader.close()


def _watch(reader: socket.socket) -> None:
    """Tells the user that the first signal has arrived, and ends the process at the second one.

    Each byte from the socket is the number of a signal. Returns when the other end is closed.
    """
    first, deadline = None, 0.0
    while received := reader.recv(1):
        number = received[0]
        is_same = first == number == signal.SIGTERM and time.monotonic() < deadline
        if number not in SIGNALS or is_same:
            continue
        if not first:
            watch.stop_in_warm_up()
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, (_SECOND if first else _FIRST).encode())
        if first:
            os._exit(128 + number)
        first, deadline = number, time.monotonic() + SAME_REQUEST_S
