"""Turns the errors of Orbax into one line that says what is wrong with a checkpoint's files."""

import errno
import gc
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from moe.config import ConfigError
from moe.storage.paths import RunPath, Unreachable, is_lost
from moe.workdir.identity import ABOUT_FILE, damage_error

# Orbax raises plain Exceptions where an array cannot be read, so no narrower class is enough around
# its calls.
_ORBAX_ERRORS = (Exception,)
_LOGGERS = ("absl", "asyncio")  # the loggers to which Orbax and its event loops write
T = TypeVar("T")


class RemovedWhileRead(ConfigError):
    """Says that a checkpoint was deleted after its reading began, as a live run may do."""

    def __init__(self, path: RunPath):
        super().__init__(
            f"{path} was removed while it was read: choose another step, or set train.keep_last "
            "of the run to more"
        )


class SilencedLog(logging.Filter):
    """Drops what Orbax prints about an error, until `end` is called.

    Orbax and its event loops print an error in each thread that it passes through. The error is
    raised as well, and the command prints it once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._previous_hook = sys.unraisablehook
        self._hook = self._drop_unraisable  # one object, which `end` can recognise
        sys.unraisablehook = self._hook
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is logged. Records by Orbax or about Orbax are not."""
        return "orbax" not in record.pathname and "orbax" not in record.getMessage()

    def end(self) -> None:
        """Lets everything be printed again."""
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self)
        if sys.unraisablehook is self._hook:
            sys.unraisablehook = self._previous_hook

    def _drop_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Drops the complaints of tasks that were still reading when the first one failed."""
        code = getattr(unraisable.object, "cr_code", None)
        is_from_orbax = code is not None and "orbax" in code.co_filename
        if not is_from_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self._previous_hook(unraisable)


def call_orbax(call: Callable[[], T], explain: Callable[[Exception], Exception]) -> T:
    """Returns the result of `call`, or raises what `explain` returns for its error."""
    try:
        return call()
    except _ORBAX_ERRORS as error:
        explained = explain(error)
    # Tasks that were still running for this call complain when they end and are collected. That
    # happens here, while `SilencedLog` still drops what they print.
    time.sleep(0.05)
    gc.collect()
    raise explained


def save_error(path: RunPath, error: Exception) -> OSError:
    """Returns the error to raise for a checkpoint that could not be written."""
    if is_lost(path, error):
        return Unreachable(f"{path} cannot be saved: {_first_cause(error)}")
    return OSError(f"{path} cannot be saved: {_system_reason(error) or _first_cause(error)}")


def restore_error(path: RunPath, error: Exception) -> Exception:
    """Returns the error to raise for a checkpoint that could not be read."""
    if is_lost(path, error):
        return Unreachable(f"{path} cannot be read: {_first_cause(error)}")
    if not (path / ABOUT_FILE).exists():
        return RemovedWhileRead(path)
    if "Out of memory" in str(error) or isinstance(error, MemoryError):
        return error
    if reason := _system_reason(error):
        return OSError(f"{path} cannot be read: {reason}")
    return damage_error(path, _first_cause(error))


def _first_cause(error: BaseException) -> str:
    """Returns the first line of the error at the start of a chain of errors."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _system_reason(error: BaseException | None) -> str:
    """Returns what the operating system said in an error or in one of its causes.

    The text is empty if the system said nothing, or only that a file does not exist: a checkpoint
    that lacks a file is damaged.
    """
    while error is not None:
        if isinstance(error, OSError) and error.strerror and error.errno != errno.ENOENT:
            return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        # TensorStore writes the number of the system's error into its message.
        match = re.search(r"os_error_code='(\d+)'", str(error))
        if match and int(match[1]) != errno.ENOENT:
            return os.strerror(int(match[1]))
        error = error.__cause__ or error.__context__
    return ""
