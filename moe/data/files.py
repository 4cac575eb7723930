"""Files that several processes may write at once, or be killed while writing."""

import contextlib
import fcntl
import logging
import os
import socket
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


@contextlib.contextmanager
def sole(path: Path) -> Iterator[str | None]:
    """Holds the lock file `path` without waiting, and yields None; where another process holds it, yields that one's name.

    The lock ends with its process, however that ends. A file system without locks lets everyone in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        holder = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
        except OSError as error:
            logging.warning("%s cannot be locked (%s): make sure that no other process writes there", path, error.strerror)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield holder


def flush(path: Path) -> None:
    """Returns once the file or directory is on disk: what is renamed after it can't be seen without it, even after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
