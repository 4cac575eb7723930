"""The command lines, one small file for each: python -m launch.train --help."""

import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def _check_packages() -> None:
    """Ends a command whose packages are not there with one line, where an import would end it with
    its frames.
    """
    missing = [
        name
        for name in ("absl", "ml_collections", "jax", "flax")
        if not importlib.util.find_spec(name)
    ]
    if missing:
        python = Path(__file__).parents[1] / ".venv" / "bin" / "python"
        there = python.exists() and not sys.executable.startswith(str(python.parent))
        fix = (
            f"run {python} -m launch.COMMAND"
            if there
            else "run make train once, or install requirements.txt"
        )
        print(f"error: {sys.executable} has no package {missing[0]!r}: {fix}", file=sys.stderr)
        sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but ends a command that is importing at once.

    Within an import it would show the frames of somebody's module, or become another error: jaxlib
    makes an ImportError of it.
    """
    caller = frame
    while caller:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _report(unraisable: Any) -> None:
    """Ends the command where a KeyboardInterrupt came in a callback, such as a finalizer, whose
    errors Python ignores.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, b"interrupted: before there was anything to save\n")
    os._exit(75)  # command_line.INTERRUPTED, which may not be imported yet


if sys.argv[:1] == [
    "-m"
]:  # Python is about to run one of the files as a command, and will put its path here
    _check_packages()
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _report
