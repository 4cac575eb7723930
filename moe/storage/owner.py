"""Keeps a run directory to one writer, its owner.

On a local disk the owner holds a lock of the operating system, which ends with its process. On a
mount or in an object store the hosts share no such lock. There the owner holds a lease: the file
`lease/N`, for the N-th owner, which it renews. A lease that was not renewed for a minute is free.
The next owner creates `lease/N+1`, which succeeds for one process alone, and deletes the older one.
An owner that was paused meanwhile finds that out before its next write, and stops. The clocks of
hosts differ, so a lease counts as renewed if its content is seen to change.

A start by a person is refused as soon as it sees that another process writes the run. A start that
a scheduler has repeated waits some minutes first: the host of the start before may be slow to end
its process.
"""

import contextlib
import errno
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import ConfigError
from moe.files import NoLocks, announce_wait, this_process, try_lock
from moe.storage.paths import (
    RunPath,
    cloud_errors,
    create,
    is_lost,
    make_directory,
    write_whole,
)

LOCK_FILE = "run.lock"  # is locked by the process that writes the run, and names it
LEASE_DIRECTORY = "lease"

RESTART_WAIT_SECONDS = 300.0  # how long a job that was started again waits for its directory
RENEW_SECONDS = 15.0  # how often an owner renews its lease
LEASE_SECONDS = 60.0  # a lease that was not renewed for so long is free
POLL_SECONDS = 1.0  # how often a process that waits for a lease looks at it

Check = Callable[[], None]
# The file systems whose locks hold for all processes that see them, since one host alone does.
_LOCAL_FILE_SYSTEMS = (
    *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "msdos"),
    *("ntfs3", "overlay", "ramfs", "reiserfs", "rootfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
)


def unchecked() -> None:
    """Is the check of a writer that no other process can replace."""


class LostRun(ConfigError):
    """Says that another process took the run over, because this one did not renew its lease."""


class Ownership(NamedTuple):
    """Says how the owner of a run finds out that it still is the owner."""

    check: Check  # raises LostRun if another process has taken the run: to call before each write
    lease: int | None = None  # the number of the lease, or None where a lock holds until the end


@contextlib.contextmanager
def own_run(
    workdir: RunPath, wait_seconds: float = 0.0, sleep: Callable[[float], None] | None = None
) -> Iterator[Ownership]:
    """Makes this process the only one that writes the run.

    If another process writes it, that one is given `wait_seconds` to end, and then this raises
    ConfigError. `sleep` is what waits between two looks, and may raise an error of its own.
    """
    wait = _Wait(workdir, wait_seconds, sleep or time.sleep)
    with contextlib.ExitStack() as stack:
        if isinstance(workdir, Path) and file_system(workdir) in (None, *_LOCAL_FILE_SYSTEMS):
            try:
                stack.push(_lock_file(wait, workdir / LOCK_FILE))
                owned = Ownership(unchecked)
            except NoLocks:
                owned = stack.enter_context(_hold_lease(wait))
        else:
            owned = stack.enter_context(_hold_lease(wait))
        yield owned


def check_lease(workdir: RunPath, number: int) -> None:
    """Raises LostRun if there is a newer lease than that of this number.

    The processes of a job that do not hold its lease themselves check it so. Their hosts may see
    the lease later than its owner does, so a lease that is not there says nothing.
    """
    seen = _look(workdir / LEASE_DIRECTORY)
    if seen.number > number:
        raise _lost_error(workdir, seen)


class _Wait:
    """Lets this process wait, for some time, until another one no longer writes the run."""

    def __init__(self, workdir: RunPath, seconds: float, sleep: Callable[[float], None]):
        self.workdir, self._seconds, self._sleep = workdir, seconds, sleep
        self._end = time.monotonic() + seconds

    def refuse_if_over(self, holder: str) -> None:
        """Raises ConfigError if this process has waited for long enough."""
        if time.monotonic() >= self._end:
            raise ConfigError(
                f"{self.workdir} is being written by {holder}: "
                "wait until it ends, or set another workdir"
            )

    def sleep(self) -> None:
        """Waits until it is time to look again."""
        self._sleep(POLL_SECONDS)

    def announce(self, holder: str) -> contextlib.AbstractContextManager[None]:
        """Says for whom this process waits, if that takes more than a second."""
        if self._seconds:
            text = f"waiting up to {self._seconds:.0f} s until {holder} no longer writes"
        else:
            text = f"waiting up to {LEASE_SECONDS:.0f} s to see whether {holder} still writes"
        return announce_wait(f"{text} {self.workdir}")


def _lock_file(wait: _Wait, path: Path) -> contextlib.ExitStack:
    """Returns what holds the lock file. Raises ConfigError if another process holds it for long."""
    with contextlib.ExitStack() as announced:
        is_announced = False
        while True:
            with contextlib.ExitStack() as attempt:
                holder = attempt.enter_context(try_lock(path))
                if holder is None:
                    return attempt.pop_all()
            wait.refuse_if_over(holder)
            if not is_announced:
                announced.enter_context(wait.announce(holder))
                is_announced = True
            wait.sleep()


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Returns the type of the file system in which a path lies, or None if the system hides it."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found, longest = None, -1
    for line in lines:
        # See https://docs.kernel.org/filesystems/proc.html. The fifth field is where it is mounted,
        # with spaces as \040, and the first one behind the dash is the type.
        mount, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount.split(" ")[4])
        # The later of two mounts at one place hides the other.
        if len(point) >= longest and Path(os.path.realpath(path)).is_relative_to(point):
            found, longest = rest.split(" ")[0], len(point)
    return found


@contextlib.contextmanager
def _hold_lease(wait: _Wait) -> Iterator[Ownership]:
    """Holds and renews the lease of a run, as `own_run` says."""
    lease = _take_lease(wait)
    is_over = threading.Event()
    renewer = threading.Thread(target=lease.renew_until, args=(is_over,), daemon=True)
    renewer.start()
    is_reachable = True
    try:
        yield Ownership(lease.check, lease.number)
    except (OSError, *cloud_errors()) as error:
        is_reachable = not is_lost(wait.workdir, error)
        raise
    finally:
        is_over.set()
        if is_reachable:
            renewer.join()
            lease.release()


class _Seen(NamedTuple):
    """Holds the number and the content of the newest lease, at one time. Number 0 is none."""

    number: int
    text: str

    def field(self, name: str) -> Any:
        """Returns a field of the content, or None if it is not there, or only half written."""
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            return json.loads(self.text).get(name)
        return None

    @property
    def holder(self) -> str:
        return self.field("holder") or "another process"

    @property
    def is_free(self) -> bool:
        return not self.number or self.field("is_released") is True


class _Lease:
    """Is the right of this process to write a run, until another process takes it."""

    def __init__(self, workdir: RunPath, number: int):
        self.number = number
        self._workdir, self._path = workdir, workdir / LEASE_DIRECTORY / str(number)
        self._token, self._renewals = uuid.uuid4().hex, 0
        self._lock = threading.Lock()  # keeps this process from reading what it has half written

    def create(self) -> bool:
        """Writes the new lease, or returns False if another process was faster."""
        if not create(self._path, self._content()) or not self._is_held():
            return False
        for name in _numbers(self._path.parent):
            if name < self.number:
                with contextlib.suppress(FileNotFoundError):
                    self._path.with_name(str(name)).unlink()
        return True

    def check(self) -> None:
        """Raises LostRun if another process has taken the lease."""
        if not self._is_held():
            raise _lost_error(self._workdir, _look(self._path.parent))

    def renew_until(self, is_over: threading.Event) -> None:
        """Renews the lease again and again. An error is left to the next time, or to `check`."""
        while not is_over.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError, *cloud_errors()):
                if not self._is_held():
                    return
                self._renewals += 1
                self._write(self._content())

    def release(self) -> None:
        """Lets another process take the lease at once. After an error, it must wait."""
        with contextlib.suppress(OSError, *cloud_errors()):
            if self._is_held():
                self._write(self._content(is_released=True))

    def _is_held(self) -> bool:
        with self._lock:
            seen = _look(self._path.parent)
        return seen.number == self.number and seen.field("token") == self._token

    def _content(self, is_released: bool = False) -> str:
        content = {"holder": this_process(), "token": self._token, "renewals": self._renewals}
        return json.dumps(content | {"is_released": is_released}) + "\n"

    def _write(self, content: str) -> None:
        """Writes the lease, if it still exists: another owner deletes it."""
        with self._lock:
            if isinstance(self._path, Path):
                with self._path.open("r+", encoding="utf-8") as file:
                    file.write(content)
                    file.truncate()
            else:
                write_whole(self._path, content)


def _take_lease(wait: _Wait) -> _Lease:
    """Returns a new lease, once the last one is free. Raises ConfigError if it is renewed."""
    make_directory(wait.workdir / LEASE_DIRECTORY)
    while True:
        lease = _Lease(wait.workdir, _wait_until_free(wait) + 1)
        if lease.create():
            return lease


def _wait_until_free(wait: _Wait) -> int:
    """Returns the last lease's number, once it is free.

    Raises ConfigError if it is still renewed when the wait is over.
    """
    directory = wait.workdir / LEASE_DIRECTORY
    seen, since = _look(directory), time.monotonic()
    with wait.announce(seen.holder):
        while not seen.is_free and time.monotonic() - since < LEASE_SECONDS:
            wait.sleep()
            now = _look(directory)
            if now != seen and not now.is_free:
                wait.refuse_if_over(now.holder if now.text else seen.holder)
                since = time.monotonic()
            seen = now
    return seen.number


def _lost_error(workdir: RunPath, seen: _Seen) -> LostRun:
    return LostRun(
        f"{workdir} was taken over by {seen.holder}, because its lease was not renewed "
        f"for {LEASE_SECONDS:.0f} s, as if its owner was paused: "
        "this process ends, and begins no further write"
    )


def _look(directory: RunPath) -> _Seen:
    """Returns the newest lease."""
    number = max(_numbers(directory), default=0)
    try:
        path = directory / str(number)
        return _Seen(number, path.read_text(encoding="utf-8") if number else "")
    except OSError as error:
        # ESTALE is NFS's word for a file that was deleted by another host.
        if isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE:
            return _Seen(number, "")
        raise


def _numbers(directory: RunPath) -> list[int]:
    """Returns the numbers of the leases that are there."""
    try:
        return [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        return []
