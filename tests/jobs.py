"""What tests share that start commands, or jobs of several processes."""

import atexit
import contextlib
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.local import reserve_port
from moe import files

# The fields of a model whose training takes a command seconds.
SMALL_MODEL = {
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.feed_forward_dim": 24,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
}


_reserved = contextlib.ExitStack()
atexit.register(_reserved.close)


def free_port() -> int:
    """Returns a port that no other program is given until the tests end.

    A server can listen there if it allows others to use its address, as those of jobs do.
    """
    return _reserved.enter_context(reserve_port())


def wait_until(is_true: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Waits until something is true. Fails if one of these processes ends before.

    Nothing limits the time but that of the test, which a busy machine may need.
    """
    while True:
        ended = [process for process in processes if process.poll() is not None]
        if is_true():  # also where a process has come so far, and ended
            return
        assert not ended, [last_words(process) for process in processes]
        time.sleep(0.01)


def last_words(process: subprocess.Popen) -> tuple[int, str, str]:
    """Returns the exit code and the output of a process of a job in which one has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)  # the watch of a job ends it
    process.kill()
    output, errors = process.communicate()
    return process.returncode, output, errors


def wait_for_step(workdir: Path, step: int, *processes: subprocess.Popen) -> None:
    """Waits until a run that logs each step has logged this one."""
    path = workdir / "metrics.jsonl"
    wait_until(lambda: path.exists() and f'"step": {step},' in path.read_text(), *processes)


def let_it_stop(process: subprocess.Popen, run: Path, gate: Path) -> None:
    """Opens the gate in which a command's run waits, once the run has heard that it is to stop."""
    said = "stopping: this step is finished"
    wait_until(lambda: said in (run / "output.log").read_text(), process)
    gate.touch()


def announce_at_once(patch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Lets every wait be announced at once (`moe.files`), and calls a function after that."""

    def announce(text: str, **options: Any) -> None:
        print(text, **options)
        then()

    patch.setattr(files, "_ANNOUNCE_AFTER", 0.0)
    patch.setattr(files, "print", announce, raising=False)


def answers_within(seconds: float, command: Callable[[], object]) -> bool:
    """Returns whether one of three calls keeps the processes that it runs busy for less time.

    What counts is the processors' time, since a clock's would be that of a busy machine.
    """

    def busy_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return any(busy_seconds() < seconds for _ in range(3))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes. It stands for a full disk: EFBIG instead of ENOSPC."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
