"""Trains the runs of a sweep, each in a process of its own, so that none can end the others.

A run is `python -m launch.train` with the flags that make its config, and goes on from its own
checkpoint. If this process is killed, the system kills its runs as well.
"""

import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from launch.child_processes import shell_code
from launch.local_signals import STOP_SIGNALS, Signals, catch_signals, pause
from launch.sweep_file import Planned
from launch.sweep_process import Slot, reason_of, start_run, status_of
from launch.sweep_progress import DONE, Progress
from launch.sweep_table import Row, gather, planned_row, read_result, write_result
from moe.exit_codes import BAD_INPUT, DIVERGED, INTERRUPTED
from moe.storage.paths import RunPath, make_directory
from moe.workdir.version import code_version

POLL_SECONDS = 1.0


class Running(NamedTuple):
    """Is a run in training."""

    planned: Planned
    process: subprocess.Popen[bytes]
    slot: int
    begin: float


class Sweep:
    """Trains distinct runs, at most `jobs` at once, and writes their results.

    With `shown`, the runs print where this process does. Otherwise each has a file for that, and
    this process shows the progress of all.
    """

    def __init__(
        self, planned: Sequence[Planned], workdir: RunPath, jobs: int, *, shown: bool = False
    ):
        self._planned, self._workdir, self._jobs, self._shown = planned, workdir, jobs, shown
        self._code = code_version()
        self._running: list[Running] = []
        self._num_stops = 0  # signals that asked to stop
        self._codes: dict[str, int] = {}  # exit codes of the runs that this process has trained
        self._rows = {
            one.name: read_result(workdir, one.run) or planned_row(one.run) for one in planned
        }

    def train(self) -> int:
        """Trains what is neither finished nor diverged, and returns the command's exit code.

        Runs that have failed are tried again. After a signal, or when a run is interrupted by its
        scheduler, no run begins, and those in training save.
        """
        waiting = [one for one in self._planned if self._status(one.name) not in DONE]
        rows, first_steps = self._rows.values(), [one.first_step for one in self._planned]
        shown = not self._shown
        with (
            catch_signals() as signals,
            Progress(list(rows), first_steps, self._workdir, shown=shown) as progress,
        ):
            self._report_past(progress)
            try:
                while self._running or (waiting and not self._num_stops):
                    if not self._num_stops:
                        waiting = self._start_ready(waiting, progress)
                    if self._running:
                        progress.show([one.planned.name for one in self._running])
                        self._wait(signals, progress)
                        self._collect(progress)
            finally:
                self._stop_running(signals, progress)
        return self._exit_code()

    def _stop_running(self, signals: Signals, progress: Progress) -> None:
        """Lets the runs save and end. There are some only where an error ends this process."""
        if not self._num_stops:
            for one in self._running:
                one.process.send_signal(signal.SIGTERM)
            self._num_stops += 1 if self._running else 0
        while self._running:
            self._wait(signals, progress)
            self._running = [one for one in self._running if one.process.poll() is None]

    def _status(self, name: str) -> str:
        return self._rows[name]["status"]

    def _report_past(self, progress: Progress) -> None:
        """Says what was trained before, and whether another version of the code has done it."""
        begun = [row for row in self._rows.values() if row["code"]]
        done = sum(row["status"] in DONE for row in begun)
        if begun:
            progress.say(f"{done} of {len(self._rows)} runs are done already")
        others = [row["code"] for row in begun if row["code"] != self._code]
        if others:
            progress.say(
                f"{len(others)} of the runs that have begun did so with another version of the "
                f"code ({', '.join(sorted(set(others)))}); this is {self._code}"
            )

    def _start_ready(self, waiting: list[Planned], progress: Progress) -> list[Planned]:
        """Starts runs while there is room, and returns those that still wait.

        A fork waits for its trunk. If the trunk cannot be trained, the fork fails.
        """
        free = sorted(set(range(self._jobs)) - {one.slot for one in self._running})
        left = []
        for one in waiting:
            trunk = one.run.fork_from
            if trunk and self._is_lost(trunk):
                reason = f"{trunk}, from which it starts, is {self._status(trunk)}"
                # No restart helps a trunk that has diverged.
                code = DIVERGED if self._status(trunk) == "diverged" else 1
                self._record(one, "failed", code, reason, 0.0, progress)
            elif free and (trunk is None or self._status(trunk) == "finished"):
                self._start(one, free.pop(0))
            else:
                left.append(one)
        return left

    def _is_lost(self, trunk: str) -> bool:
        """Returns whether a run has ended, and not by finishing."""
        is_over = trunk in self._codes or self._status(trunk) in DONE
        return is_over and self._status(trunk) != "finished"

    def _start(self, one: Planned, slot: int) -> None:
        """Starts a run. Until it ends, its result says that it was interrupted."""
        directory = self._workdir / one.name
        make_directory(directory)
        row = write_result(one.run, self._workdir, "interrupted", self._code)
        self._rows[one.name] = row
        arguments = one.arguments(self._workdir)
        process = start_run(arguments, directory, Slot(slot, self._jobs), shown=self._shown)
        self._running.append(Running(one, process, slot, time.monotonic()))

    def _wait(self, signals: Signals, progress: Progress) -> None:
        """Waits a moment for the end of a run, or for a signal, which it passes on to all runs."""
        for number in signals.wait(POLL_SECONDS):
            if number == signal.SIGTSTP:
                pause([one.process for one in self._running])
            if number not in STOP_SIGNALS:
                continue
            self._num_stops += 1
            progress.say("stopping: each run saves first; a second signal stops at once")
            # Of two SIGTERMs, a run may take the second for a repetition of the first.
            passed_on = signal.SIGTERM if self._num_stops == 1 else signal.SIGINT
            for one in self._running:
                one.process.send_signal(passed_on)

    def _collect(self, progress: Progress) -> None:
        """Writes the results of the runs that have ended, and the table."""
        ended = [one for one in self._running if one.process.poll() is not None]
        self._running = [one for one in self._running if one not in ended]
        for one in ended:
            code = shell_code(one.process.returncode)
            directory = self._workdir / one.planned.name
            status, reason = status_of(code), reason_of(code, directory, shown=self._shown)
            seconds = time.monotonic() - one.begin
            self._record(one.planned, status, code, reason, seconds, progress)
            # If nobody has asked this process to stop, the time of its job is running out.
            self._num_stops += status == "interrupted" and not self._num_stops
        if ended and not self._shown:
            gather([one.run for one in self._planned], self._workdir)

    def _record(
        self,
        one: Planned,
        status: str,
        code: int,
        reason: str | None,
        seconds: float,
        progress: Progress,
    ) -> None:
        """Writes the result of a run that has ended, and says so."""
        row = write_result(one.run, self._workdir, status, self._code, reason)
        if row["status"] == "failed":  # as a run of damaged files may be that has ended with 0
            code = code or BAD_INPUT
        self._rows[one.name], self._codes[one.name] = row, code
        progress.end(row, seconds)

    def _exit_code(self) -> int:
        """Returns 0 if all runs are finished. Of several reasons, that of a restart comes first."""
        statuses = [row["status"] for row in self._rows.values()]
        if self._num_stops:
            return INTERRUPTED
        if "failed" in statuses:
            # A scheduler restarts a single run by its own exit code.
            return max(self._codes.values()) if self._shown else 1
        return DIVERGED if "diverged" in statuses else 0


def report_rows(rows: Sequence[Row]) -> str:
    """Returns the counts of runs by status, and a line for each that has failed or diverged."""
    statuses = [row["status"] for row in rows]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses))
    lines = [
        f"{row['status']}: {row['run']}: {row['reason']}"
        for row in rows
        if row["status"] in ("failed", "diverged")
    ]
    return "\n".join([f"{len(rows)} runs: {counts}", *lines])
