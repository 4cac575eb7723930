"""Files that several processes may write at once, or be killed while writing."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Holds the lock file `path`, waiting for whoever has it. Yields False where the file system has no locks.

    The lock ends with its process, however that ends. Raises OSError where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise OSError(f"{path.parent} cannot be written ({reason}): set data.directory to a directory that can") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        else:
            locked = True
        yield locked


def flush(path: Path) -> None:
    """Returns once the file or directory is on disk: what is renamed after it can't be seen without it, even after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
