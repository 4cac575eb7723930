"""Reads and writes files that several processes may use at once, or die while writing."""

import contextlib
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_ANNOUNCE_AFTER = 1.0  # the seconds after which a person wonders what is going on


@contextlib.contextmanager
def announce_wait(text: str) -> Iterator[None]:
    """Prints `text`, which says what is being waited for, if the wait exceeds a second."""
    timer = threading.Timer(_ANNOUNCE_AFTER, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Holds the lock file `path`, and waits first while another process holds it.

    It yields True if it has the lock, and False if the file system has no locks. A wait of more
    than a second prints who holds the lock. The lock ends with its process, even if that is
    killed. Raises OSError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise OSError(
            f"{path.parent} cannot be written ({reason}): "
            "set data.directory to a directory that can"
        ) from None
    with file:
        yield _lock(file)


def _lock(file: IO[str]) -> bool:
    """Locks the file and writes its holder into it. Returns False if there are no locks."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with announce_wait(f"waiting for {file.name}, which {_read_holder(file)} holds"):
                fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    _write_holder(file)
    return True


def _read_holder(file: IO[str]) -> str:
    """Returns the name of the process that holds a locked file."""
    file.seek(0)
    return file.read().strip() or "another process"


def _write_holder(file: IO[str]) -> None:
    """Writes the name of this process into a file that it has locked."""
    with contextlib.suppress(OSError):  # the lock holds without the name, as on a full disk
        os.ftruncate(file.fileno(), 0)
        # What a buffer still held after an error would be written, and fail, when the file closes.
        os.write(file.fileno(), f"{this_process()}\n".encode())


def this_process() -> str:
    """Returns the name of this process for people who look for it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class NoLocks(OSError):
    """Says that a file system has no locks."""


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[str | None]:
    """Tries to hold the lock file `path`, and yields the name of another process that holds it.

    It yields None if this process now holds the lock, and does not wait. The lock ends with its
    process, even if that is killed. Raises NoLocks on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        holder = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
        except OSError as error:
            raise NoLocks(f"{path} cannot be locked ({error.strerror})") from None
        else:
            _write_holder(file)
        yield holder


def flush(path: Path) -> None:
    """Waits until a file or directory is on disk.

    A file that is flushed before it is renamed has its content even after a power cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Names the file in an error of writing it, as on a full disk.

    The system names a file only where it opens one. Commands tell an error with a name in one line.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def close_named(file: IO[str]) -> None:
    """Closes a file, and names it in an error of writing what is left of it.

    Errors of what is done while the file is open, such as reading another one, keep their names.
    """
    with naming_file(Path(file.name)):
        file.close()


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` once it is written whole.

    Until then, and after an error, `path` stays as it is. A kill leaves at most a hidden .partial
    file beside it. The content is on disk before the file has its name, so a power cut cannot leave
    an empty file. A link or a device, such as /dev/stdout, is written to directly, because another
    file must not take its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with naming_file(path), path.open("wb") as file:
            yield file
        return
    # Host and process keep two commands apart that write the same file. In containers every process
    # may have the number 1.
    writer = f"{socket.gethostname()}.{os.getpid()}"
    begin = os.fsdecode(os.fsencode(path.name)[:150])  # a file's name has at most 255 bytes
    partial = path.with_name(f".{begin}.{writer}.partial")
    try:
        with naming_file(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename == str(partial):
            error.filename = str(path)  # the name that a user knows
        raise
    finally:
        # The file is still there after an error or Ctrl-C; os.replace has moved it otherwise.
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or, after an error, not at all, as `open_whole` does."""
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
