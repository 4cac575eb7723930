"""Files that several processes may write at once, or be killed while writing."""

import contextlib
import fcntl
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_SECONDS = 1.0  # after which a person asks what is going on


@contextlib.contextmanager
def saying(text: str) -> Iterator[None]:
    """Prints what is being waited for, if it takes more than a second."""
    timer = threading.Timer(_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Holds the lock file `path`, waiting for the process that has it. Yields False where the file
    system has no locks.

    A wait of more than a second is told, with the holder. The lock ends with its process, however
    that ends. Raises OSError where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise OSError(
            f"{path.parent} cannot be written ({reason}): set data.directory to a directory that can"
        ) from None
    with file:
        yield _lock(file)


def _lock(file: IO[str]) -> bool:
    """Locks the file, and writes into it which process holds it. Returns False where the file
    system has no locks.
    """
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with saying(
                f"waiting for {file.name}, which {file.read().strip() or 'another process'} holds"
            ):
                fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    _write_holder(file)
    return True


def _write_holder(file: IO[str]) -> None:
    """Writes into a locked file which process holds it."""
    with contextlib.suppress(OSError):  # a full disk takes nothing from the lock
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


@contextlib.contextmanager
def sole(path: Path) -> Iterator[str | None]:
    """Holds the lock file `path` without waiting, and yields None; where another process holds it,
    yields that one's name.

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
            logging.warning(
                "%s cannot be locked (%s): make sure that no other process writes there",
                path,
                error.strerror,
            )
        else:
            _write_holder(file)
        yield holder


def flush(path: Path) -> None:
    """Returns once the file or directory is on disk: what is renamed after it can't be seen without
    it, even after a power cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, or leaves the one that is there as it is. A kill leaves at most a hidden
    .partial file beside it.

    The content is on disk before the file has its name, so that a power cut shows no empty one. A
    link or a device, such as /dev/stdout, is written to as it stands: another file must not take
    its place.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    # The process's number keeps two commands that write the same file out of each other's half.
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(
            missing_ok=True
        )  # after an error or Ctrl-C; os.replace has moved it otherwise
