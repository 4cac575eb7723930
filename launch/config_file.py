"""Reports a mistake in a user's config file by the file's path, the line and the message.

The frames of this project and of the libraries that read the file are left out.
"""

import os
import stat
import traceback
from pathlib import Path
from types import TracebackType

from absl import flags

from moe.config import ConfigError

ROOT = Path(__file__).parents[1]
# config_flags raises a copy of a TypeError or ValueError with these words before its message.
_WRAPPED = "Error whilst parsing config file"


def check_config_file(path: str, flag: str = "config") -> None:
    """Raises ConfigError for a path that is no regular file, or cannot be read.

    Reading a FIFO or a device would wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            open(path, "rb").close()
    except OSError as error:
        elsewhere = ROOT / path
        where = f"{elsewhere}, which is there" if os.path.isfile(elsewhere) else "a config file"
        raise ConfigError(f"--{flag}={path}: {error.strerror}: set --{flag} to {where}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"--{flag}={path} is a FIFO, a socket or a device: set --{flag} to a config file"
        )


class ConfigFileErrors:
    """A context in which all that a config file raises becomes a ConfigError with path and line.

    A config file may raise anything, even SystemExit and KeyboardInterrupt, so no `except` could
    list it. An error counts as the file's if the file is among the frames of its traceback.
    Errors of absl's flags stay as they are, and so does an exit that the file did not ask for. So
    does a ConfigError that is not the file's.

    A function of the file may return an iterator, whose errors come when the file is no longer
    among the frames. Then `line` is named, where that function begins.
    """

    def __init__(self, path: str, line: int | None = None):
        self._path, self._first_line = path, line
        self._files = {path, os.path.abspath(path)}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if error is None:
            return
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        for raised in chain:
            if line := self._line(raised):
                raise ConfigError(f"{self._path}, line {line}: {_message(raised)}") from error
        if self._first_line:
            text = f"{self._path}, line {self._first_line}: {_message(error)}"
            raise ConfigError(text) from error
        if isinstance(error, ConfigError):
            return
        wrapped = [raised.__context__ for raised in chain if str(raised).startswith(_WRAPPED)]
        raised = wrapped[-1] if wrapped and wrapped[-1] else error
        if "get_config" in str(raised) and isinstance(raised, AttributeError):
            raise ConfigError(
                f"{self._path} has no get_config(): "
                "write one that returns RunConfig.config_dict() with your changes"
            ) from error
        if not isinstance(raised, flags.Error | SystemExit | KeyboardInterrupt):
            raise ConfigError(f"{self._path}: {_message(raised)}") from error

    def _line(self, error: BaseException) -> int | None:
        """Returns the innermost line of the file in the traceback, or the line of a syntax error.

        Returns None if the file is not in the traceback.
        """
        if isinstance(error, SyntaxError) and error.filename in self._files:
            return error.lineno
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename in self._files
        ]
        return lines[-1] if lines else None


def _message(error: BaseException) -> str:
    """Returns the error's type and message, on one line. A ConfigError needs no type."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, SystemExit):
        return (
            f"SystemExit: {error.code}: a config file must return its config, not end the program"
        )
    lines = traceback.format_exception_only(error)
    return " ".join((lines[-1] if isinstance(error, SyntaxError) else lines[0]).split("\n")).strip()
