"""Checks the paths that a command is to write to, before it computes anything. Makes nothing."""

import os
from pathlib import Path

from moe.config import ConfigError
from moe.config.checks import expand_path
from moe.storage.paths import RunPath


def check_current_directory() -> None:
    """Raises ConfigError in a directory that was deleted, where nothing says which one it was."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current directory was deleted: cd to one that is there") from None


def check_directory(flag: str, path: RunPath) -> None:
    """Raises ConfigError if no directory can be made at a path, or nothing written into it.

    That of an object store is not looked at: it needs no directories.
    """
    if not isinstance(path, Path):
        return
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        reason = f"{there} is no directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = f"nothing can be written in {there}"
    else:
        return
    raise ConfigError(
        f"{flag}={path} cannot be written ({reason}): set {flag} to a directory that can"
    )


def output_file(flag: str, text: str) -> Path:
    """Returns the path of a file to write, with its ~ expanded. Raises ConfigError if it cannot."""
    path = Path(expand_path(flag, text))
    if path.is_dir():
        raise ConfigError(f"{flag}={text} is a directory: set {flag} to a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}={text}: {path.parent} is no directory: create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag}={text} cannot be written: set {flag} to a file that can")
    return path
