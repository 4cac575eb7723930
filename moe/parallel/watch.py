"""Watches the processes of a job, and ends this one when another has died or is stuck.

Process 0 is the hub. Every process, process 0 too, holds one TCP connection to it, on which it says
each second what it does. The system closes a connection when its process ends, even after kill -9,
so a connection that closes without a goodbye means that the process has died. TCP itself finds a
host that is gone. A process is stuck if it stays for too long in one training step, or in one batch
of an evaluation, while no other process compiles, saves or prepares. The hub tells the processes
that are left. Each prints one line and leaves by `fatal`, because JAX's own exit would wait for the
lost process.

A run of one process has no watch. Then `fatal` alone does anything. This file imports no JAX.
"""

import atexit
import contextlib
import faulthandler
import json
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from moe.config import ConfigError
from moe.exit_codes import INTERRUPTED, PEER_DIED, PEER_STUCK
from moe.parallel.cluster import process_name
from moe.parallel.hub import (
    COMMON_ENDS,
    IN_STEP,
    PAUSE,
    TICK,
    Connection,
    HostTimes,
    Hub,
    Phase,
    Place,
    Verdict,
)
from moe.storage.paths import RunPath

# Until its first step is done, a process has nothing to save.
_WARM_UP = ("starting", "preparing", "compiling")
_STUCK_VARIABLE = "MOE_STUCK_SECONDS"
_STUCK_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
_LAST_SECONDS = 60.0  # process 0 waits so long for the others' goodbyes, since it is the hub
# Another process may have failed before this one, which then fails too. The watch has so many
# seconds to say so. The hub needs less for it.
_CAUSE_SECONDS = 3.0


class _Watch:
    """Holds this process's connection to the hub."""

    def __init__(self, process_id: int, num_processes: int, address: str):
        self.process_id, self.num_processes = process_id, num_processes
        self.place = Place("starting")
        self.exit_code: int | None = None
        self.hub: Hub | None = None
        self.last_lines: Callable[[int], str] = lambda process_id: ""
        host, port, token, self.hub_host = json.loads(address)
        self.connection = Connection(socket.create_connection((host, port), _CONNECT_SECONDS))
        self.connection.send(process_id=process_id, host=socket.gethostname(), token=token)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def say(self) -> None:
        """Tells the hub what this process does."""
        self.connection.send(**self.place._asdict())

    def say_goodbye(self, code: int) -> None:
        """Tells the others how this process ends. Process 0, the hub, waits for their goodbyes."""
        if self.exit_code is not None:
            return
        self.exit_code = code
        # A command that only evaluates has no steps, and nothing to save either.
        is_early = self.place.phase in _WARM_UP or not self.place.step
        is_early &= code == INTERRUPTED
        reason = "was asked to stop before its first step was done" if is_early else ""
        self.connection.send(exit_code=code, reason=reason)
        if self.hub is not None:
            self.hub.all_said_goodbye.wait(_LAST_SECONDS)

    def end(self, verdict: Verdict) -> None:
        """Ends this process, since one process of the job has failed."""
        if verdict.code == PEER_STUCK:
            faulthandler.dump_traceback(file=2, all_threads=True)
        code = verdict.code if self.exit_code is None else self.exit_code
        text = f"{verdict.text}: this process ends too, with exit code {code}"
        if verdict.process_id == self.process_id:
            text = verdict.text
        if self.process_id == verdict.speaker != verdict.process_id:
            text = f"{text}\n{self.last_lines(verdict.process_id)}".rstrip()
            _show(text)
        fatal(code, text)

    def _run(self) -> None:
        """Talks with the hub until this process ends."""
        heard = before = said = time.monotonic()
        limit = None
        hub, hub_place = process_name(0, self.num_processes, self.hub_host), ""
        selector = selectors.DefaultSelector()
        selector.register(self.connection, selectors.EVENT_READ)
        while self.exit_code is None:
            selector.select(TICK)
            messages, now = self.connection.receive(), time.monotonic()
            for message in messages:
                if "verdict" in message:
                    self.end(Verdict(*message["verdict"]))
                limit, hub_place = message["limit"], message["place"]
            if messages or now - before > PAUSE:  # this process itself may have been stopped
                heard = now
            if not self.connection.is_open and self.exit_code is None:
                self.end(Verdict(PEER_DIED, f"{hub} died", 0, 1))
            if limit is not None and now - heard > limit:
                text = f"{hub} is stuck in {hub_place}, and does not run"
                self.end(Verdict(PEER_STUCK, text, 0, 1))
            before = now
            if now - said >= TICK:
                said = now
                self.say()


_watch: _Watch | None = None
_show: Callable[[str], None] = lambda text: None
_finish: Callable[[], None] = lambda: None
_move_log: Callable[[RunPath, int | None], None] = lambda run, lease: None


def start(
    process_id: int,
    num_processes: int,
    host: str,
    from_first: Callable[[str, Callable[[], str]], str],
) -> None:
    """Starts to watch the processes of this job, once all have joined it.

    `host` is the address at which the others reach process 0. `from_first` gives every process the
    text that process 0 made. MOE_STUCK_SECONDS says how long a step may take at least. From here
    on, SIGTERM raises KeyboardInterrupt as SIGINT does, and an error that nobody catches ends the
    whole job. Raises ConfigError for a wrong variable, and OSError if process 0 is not reached.
    """
    global _watch
    seconds = _stuck_seconds(os.environ.get(_STUCK_VARIABLE))
    hub, is_watching = None, threading.Event()

    def end(verdict: Verdict) -> None:
        is_watching.wait()  # another process may fail before process 0 itself has connected
        watch.end(verdict)

    def open_hub() -> str:
        nonlocal hub
        hub = Hub(host, num_processes, seconds, end)
        return hub.address

    watch = _Watch(process_id, num_processes, from_first("watch", open_hub))
    watch.hub, _watch = hub, watch
    is_watching.set()
    sys.excepthook = _end_job
    # A program that ends without `leave` says goodbye before JAX's own exit waits for the others.
    atexit.register(watch.say_goodbye, 0)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def report(phase: Phase, step: int = 0, batch: int = 0) -> None:
    """Reports what this process does now. Without a step, it is still that of the phase before.

    In an evaluation `batch` is the number of the batch, from 1. "waiting" belongs to that batch.
    """
    watch = _watch
    if watch is None:
        return
    before = watch.place
    is_new = phase != before.phase and not {phase, before.phase} <= set(IN_STEP)
    batch = before.batch if phase == "waiting" else batch
    watch.place = Place(phase, step or before.step, batch)
    if is_new:
        watch.say()


def send_times(step: int, step_seconds: float, host_seconds: float) -> None:
    """Sends process 0 how long the steps up to this one took here."""
    if _watch is not None:
        _watch.connection.send(times=[step, step_seconds, host_seconds])


def take_times(last: int = 0) -> list[HostTimes]:
    """Returns, on process 0, the times that have come from all processes since the last call.

    It waits up to a second for those of the step `last`, if that is not 0.
    """
    return _watch.hub.take_times(last) if _watch is not None and _watch.hub is not None else []


def use_log(
    show: Callable[[str], None],
    finish: Callable[[], None],
    move: Callable[[RunPath, int | None], None] = _move_log,
) -> None:
    """Sets what is called if this process has a log instead of printing.

    `show` prints a text all the same. `finish` waits at the end until the log is written. `move`
    continues the log in the directory of a run.
    """
    global _show, _finish, _move_log
    _show, _finish, _move_log = show, finish, move


def log_into(run: RunPath, lease: int | None) -> None:
    """Continues the log of this process in the directory of a run that its job owns now.

    `lease` is the number of the lease by which the job owns it, if there is one.
    """
    _move_log(run, lease)


def show_last_lines(read: Callable[[int], str]) -> None:
    """Sets the function that returns the last lines of a process, which are shown if it fails."""
    if _watch is not None:
        _watch.last_lines = read


def stop_in_warm_up() -> None:
    """Ends the whole job with exit code 75, if this process has not finished its first step.

    There is nothing to save yet. Returns if the process has no watch, or has finished a step.
    """
    if _watch is not None and _watch.place.phase in _WARM_UP:
        leave(INTERRUPTED, "stopped before the first step was done: nothing had to be saved")


def leave(code: int, text: str = "") -> None:
    """Prints a text, says goodbye with the exit code and ends this process.

    The others come to the same end by themselves, or the hub ends them. Process 0 leaves last.
    Returns only without a watch.
    """
    if _watch is None:
        return
    if code not in COMMON_ENDS:
        time.sleep(_CAUSE_SECONDS)
    _watch.say_goodbye(code)
    fatal(code, text, flush_seconds=5.0)


def fatal(code: int, text: str = "", *, flush_seconds: float = 1.0) -> NoReturn:
    """Prints a text and ends this process at once, from any thread.

    It waits neither for JAX's other processes nor for a thread that holds a stream.
    """
    if text:
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"\n{text}\n".encode())  # a progress bar may be on this line
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(flush_seconds)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    _finish()


def _end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that nobody caught, and ends this process with exit code 1."""
    sys.__excepthook__(kind, error, trace)
    leave(1)


def _stuck_seconds(text: str | None) -> float:
    try:
        seconds = _STUCK_SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{_STUCK_VARIABLE}={text}: set it to a number of seconds above 0")
    return seconds
