"""The command lines, one small file for each: python -m launch.train --help."""

import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launch.large_pages import use_large_pages

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def _check_packages() -> None:
    """Ends a command with one line if a package is missing, before an import raises an error."""
    packages = ("absl", "ml_collections", "jax", "flax")
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if not missing:
        return
    python = Path(__file__).parents[1] / ".venv" / "bin" / "python"
    if python.exists() and not sys.executable.startswith(str(python.parent)):
        fix = f"run {python} -m launch.COMMAND"
    else:
        fix = "run make train once, or install requirements.txt"
    print(f"error: {sys.executable} has no package {missing[0]!r}: {fix}", file=sys.stderr)
    sys.exit(2)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT: raises KeyboardInterrupt, but ends a command at once while it imports.

    An exception within an import would show the frames of other people's modules. It may even
    become another error: jaxlib turns it into an ImportError.
    """
    caller = frame
    while caller:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            _leave()
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _end_if_interrupted(unraisable: "UnraisableHookArgs") -> None:
    """Ends the command if Python is about to ignore a KeyboardInterrupt.

    It ignores all errors that are raised in callbacks, such as finalizers.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, b"interrupted: before there was anything to save\n")
    os._exit(75)  # exit_codes.INTERRUPTED, which may not be imported yet


# While Python imports this package to run `python -m launch.COMMAND`, sys.argv[0] is "-m"; the
# command's path takes its place later. A plain import of the package changes nothing.
if sys.argv[:1] == ["-m"]:
    use_large_pages(os.environ)
    _check_packages()
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _end_if_interrupted
