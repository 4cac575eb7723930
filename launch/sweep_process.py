"""Starts the process of one run, and says how it ended. It imports no JAX."""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from launch.child_processes import ending_with_parent, gpu_names
from launch.local_signals import signal_name
from moe.exit_codes import DIVERGED, INTERRUPTED
from moe.storage.paths import RunPath

OUTPUT_FILE = "output.log"
# A run that was interrupted has saved, was stopped at once by a second signal, or had not begun.
_STATUS = {
    0: "finished",
    DIVERGED: "diverged",
    **dict.fromkeys((INTERRUPTED, 128 + signal.SIGINT, 128 + signal.SIGTERM), "interrupted"),
}


class Slot:
    """Is the part of this machine that one of several runs at once has for itself."""

    def __init__(self, number: int, count: int):
        cores = sorted(os.sched_getaffinity(0))
        self.number = number
        # With fewer cores than runs, the system shares them out.
        self._cores = share(cores, number, count) or cores
        self._count = count

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Returns the variables of a run, with its share of the GPUs."""
        gpus = share(gpu_names(environment), self.number, self._count)
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus and self._count > 1 else {}
        return {**environment, **own}

    def enter(self) -> None:
        """Keeps this process to the slot's cores."""
        os.sched_setaffinity(0, self._cores)


def share(things: Sequence[Any], number: int, count: int) -> list[Any]:
    """Returns the part `number` of things that are divided into `count` equal parts."""
    size = len(things) // count
    return list(things[number * size : (number + 1) * size])


def start_run(
    arguments: Sequence[str], directory: RunPath, slot: Slot, *, shown: bool
) -> subprocess.Popen[bytes]:
    """Starts launch.train with these arguments. Without `shown`, a file gets what it prints."""
    command = [sys.executable, "-m", "launch.train", *arguments]
    with _open_output(directory, command, shown) as output:
        return subprocess.Popen(
            command,
            env=slot.environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A terminal's Ctrl-C reaches this process alone, which passes it on once.
            process_group=0,
            preexec_fn=functools.partial(_prepare, ending_with_parent(), slot),
        )


def _prepare(end_with_parent: Callable[[], None] | None, slot: Slot) -> None:
    """Keeps a new process to its slot, and lets the system kill it once its parent has ended."""
    slot.enter()
    if end_with_parent:
        end_with_parent()


@contextlib.contextmanager
def _open_output(
    directory: RunPath, command: Sequence[str], shown: bool
) -> Iterator[IO[bytes] | None]:
    """Yields the file for what a run prints, or None if that goes where this process prints.

    Its first line is the command, with which the run can be repeated by hand.
    """
    if shown or not isinstance(directory, Path):
        yield None
        return
    with (directory / OUTPUT_FILE).open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        yield file


def status_of(code: int) -> str:
    """Returns the status of a run whose process ended with this code."""
    return _STATUS.get(code, "failed")


def reason_of(code: int, directory: RunPath, *, shown: bool = False) -> str | None:
    """Returns why a run has not finished: its last words, or the signal that killed it.

    With `shown` its words are not in its file, which may have those of an earlier start.
    """
    if code == 0:
        return None
    # A library may end a process with a code above 128, such as exit(-1).
    if status_of(code) == "failed" and (name := signal_name(code - 128)):
        return f"killed by {name}" + (", as if memory was full" if name == "SIGKILL" else "")
    path = directory / OUTPUT_FILE
    text = ""
    if not shown and isinstance(path, Path) and path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
    words = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    # The first line of a start is its command.
    if not words or (words[-1].startswith("$ ") and " launch.train " in words[-1]):
        return f"exit code {code}"
    return words[-1].removeprefix(f"{status_of(code)}: ")[:300]
