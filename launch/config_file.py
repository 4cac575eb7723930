"""Reading somebody's config file, whose mistakes are told as the file's: its path, the line and the
message, without frames of ours.
"""

import os
import stat
import traceback
from pathlib import Path
from types import TracebackType

from absl import flags

from moe.config import ConfigError

ROOT = Path(__file__).parents[1]
# what config_flags puts before a copy of a TypeError or ValueError
_WRAPPED = "Error whilst parsing config file"


def check_config_file(path: str) -> None:
    """Raises ConfigError for a path that is no regular file: reading a FIFO or a device would wait
    for ever.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            open(path).close()
    except OSError as error:
        elsewhere = ROOT / path
        where = f"{elsewhere}, which is there" if elsewhere.is_file() else "a config file"
        raise ConfigError(f"--config={path}: {error.strerror}: set --config to {where}") from None
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"--config={path} is a FIFO, a socket or a device: set --config to a config file"
        )


class Blaming:
    """A context in which whatever a config file raises becomes a ConfigError with the file's path
    and line.

    It may raise anything, SystemExit and KeyboardInterrupt too, so this is no `except`: an error is
    the file's if a frame of the file is among its frames. Errors of absl's flags are left as they
    are, and so is an exit that the file did not ask for.
    """

    def __init__(self, path: str):
        self._path = path
        self._files = {path, os.path.abspath(path)}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, ConfigError):
            return
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        for raised in chain:
            if line := self._line(raised):
                raise ConfigError(f"{self._path}, line {line}: {_message(raised)}") from error
        wrapped = [raised.__context__ for raised in chain if str(raised).startswith(_WRAPPED)]
        raised = wrapped[-1] if wrapped and wrapped[-1] else error
        if "get_config" in str(raised) and isinstance(raised, AttributeError):
            raise ConfigError(
                f"{self._path} has no get_config(): write one that returns RunConfig.config_dict() with your changes"
            ) from error
        if not isinstance(raised, flags.Error | SystemExit | KeyboardInterrupt):
            raise ConfigError(f"{self._path}: {_message(raised)}") from error

    def _line(self, error: BaseException) -> int | None:
        """The last line of the file that the error passed, or that cannot be parsed."""
        if isinstance(error, SyntaxError) and error.filename in self._files:
            return error.lineno
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename in self._files
        ]
        return lines[-1] if lines else None


def _message(error: BaseException) -> str:
    """The error's type and message, on one line."""
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}: a config file returns its config, and ends no program"
    lines = traceback.format_exception_only(error)
    return " ".join((lines[-1] if isinstance(error, SyntaxError) else lines[0]).split("\n")).strip()
