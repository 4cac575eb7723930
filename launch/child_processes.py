"""What launchers share that start processes of this machine: their GPUs, their end, their codes."""

import ctypes
import functools
import itertools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def gpu_names(environment: Mapping[str, str]) -> list[str]:
    """Returns the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = len(list(Path("/dev").glob("nvidia[0-9]*")))
        visible = ",".join(map(str, range(count)))
    # As CUDA does, this ends at the first name that is none: -1 hides all GPUs.
    names = itertools.takewhile(lambda name: not name.startswith("-"), visible.split(","))
    return [name for name in names if name]


def ending_with_parent() -> Callable[[], None] | None:
    """Returns what a new process calls so that the system kills it once this one has ended.

    It is None where the system has no such call: Linux alone has it. To call it, Python forks,
    which it must not where JAX runs threads: a program of ours calls `end_with` itself instead.
    """
    prctl = _find_prctl()
    return functools.partial(_end_with_parent, prctl, os.getpid()) if prctl else None


def end_with(parent: int) -> None:
    """Lets the system kill this process once its parent, of this number, has ended."""
    if prctl := _find_prctl():
        _end_with_parent(prctl, parent)


def _find_prctl() -> Any:
    return getattr(ctypes.CDLL(None), "prctl", None)


def _end_with_parent(prctl: Any, parent: int) -> None:
    """Lets the system kill this new process once its parent has ended, however that happens."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def shell_code(code: int) -> int:
    """Returns the exit code that a shell gives to a process: 128 + the number of its signal."""
    return 128 - code if code < 0 else code
