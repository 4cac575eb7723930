"""The one process that writes a run: locks, leases, waiting for them, and losing them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.files import NoLocks, try_lock
from moe.storage import owner
from moe.storage.owner import LostRun, check_lease, file_system, own_run
from tests.jobs import announce_at_once

ME = f"process {os.getpid()} on {socket.gethostname()}"
OTHER = {"holder": "process 7 on node-1", "token": "x", "renewals": 0, "is_released": False}


class Clock:
    """Stands for the time: sleeping moves it, and what happens at a time happens then."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for at in sorted(at for at in self.events if at <= self.now):
            self.events.pop(at)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(owner, "time", clock)
    return clock


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a directory that counts as one on NFS."""
    monkeypatch.setattr(owner, "file_system", lambda path: "nfs4")
    return tmp_path / "run"


def write_lease(workdir: Path, number: int, **fields: object) -> Path:
    path = workdir / "lease" / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(OTHER | fields) + "\n")
    return path


def leases(workdir: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (workdir / "lease").iterdir()}


def test_a_local_disk_has_a_lock_and_a_mount_has_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, names in (("ext4", {"run.lock"}), (None, {"run.lock"}), ("lustre", {"lease"})):
        monkeypatch.setattr(owner, "file_system", lambda path, kind=kind: kind)
        with own_run(tmp_path / str(kind)) as (check, _):
            check()
            assert {path.name for path in (tmp_path / str(kind)).iterdir()} == names


def test_a_disk_without_locks_has_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise NoLocks(f"{path} cannot be locked")

    monkeypatch.setattr(owner, "try_lock", refuse)
    with own_run(tmp_path):
        assert list(leases(tmp_path)) == ["1"]


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /home rw - nfs4 server:/home rw,vers=4.2\n"
        "31 30 0:41 / /home/me/fast\\040disk rw shared:2 master:1 - xfs /dev/sdb rw\n"
        "32 22 0:42 / /scratch rw - autofs systemd-1 rw\n"
        "33 32 0:43 / /scratch rw - lustre 10.0.0.1@tcp:/fs rw\n"
    )
    expected = {
        "/x/run": "ext4",
        "/home/me/run": "nfs4",
        "/homework/run": "ext4",
        "/home/me/fast disk/run": "xfs",
        "/scratch/run": "lustre",
    }
    assert {path: file_system(Path(path), mounts) for path in expected} == expected
    assert file_system(Path("/x"), tmp_path / "nothing") is None


def test_a_lease_names_its_holder_and_is_given_back(mount: Path, clock: Clock) -> None:
    with own_run(mount) as (check, _):
        check()
        (lease,) = leases(mount).values()
        assert lease["holder"] == ME and not lease["is_released"]
    assert [lease["is_released"] for lease in leases(mount).values()] == [True]
    with own_run(mount):
        assert list(leases(mount)) == ["2"]
    assert clock.now == 0  # nobody waited


def test_a_lease_that_is_renewed_is_refused_at_once(mount: Path, clock: Clock) -> None:
    write_lease(mount, 4)
    clock.events[12] = lambda: write_lease(mount, 4, renewals=1)
    with (
        pytest.raises(ConfigError, match=r"is being written by process 7 on node-1: wait until"),
        own_run(mount),
    ):
        pass
    assert clock.now == 12 and list(leases(mount)) == ["4"]


def test_a_lease_that_is_not_renewed_is_taken_after_a_minute(mount: Path, clock: Clock) -> None:
    write_lease(mount, 4)
    with own_run(mount) as (check, _):
        check()
        assert clock.now == 60 and list(leases(mount)) == ["5"]


def test_half_a_lease_is_waited_for(mount: Path, clock: Clock) -> None:
    write_lease(mount, 4).write_text('{"holder": "pro')
    with own_run(mount):
        assert clock.now == 60 and list(leases(mount)) == ["5"]


def test_a_lease_that_is_given_back_meanwhile_is_taken(mount: Path, clock: Clock) -> None:
    write_lease(mount, 4)
    clock.events[5] = lambda: write_lease(mount, 4, is_released=True)
    with own_run(mount):
        assert clock.now == 5 and list(leases(mount)) == ["5"]


def test_of_two_that_wait_one_is_refused(mount: Path, clock: Clock) -> None:
    write_lease(mount, 4)
    clock.events[60] = lambda: write_lease(mount, 5, holder="process 9 on node-2")
    with (
        pytest.raises(ConfigError, match="is being written by process 9 on node-2"),
        own_run(mount),
    ):
        pass


def test_a_lease_is_created_by_one_process_alone(
    mount: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = owner.create

    def be_slow(path: Path, content: str) -> bool:
        """Lets another process create the same lease first, and renew it."""
        monkeypatch.setattr(owner, "create", create)
        write_lease(mount, 1)
        clock.events[clock.now + 3] = lambda: write_lease(mount, 1, renewals=1)
        return create(path, content)

    monkeypatch.setattr(owner, "create", be_slow)
    with pytest.raises(ConfigError, match="process 7 on node-1"), own_run(mount):
        pass
    assert leases(mount)["1"]["token"] == "x"


def renew_each(clock: Clock, seconds: int, mount: Path, until: float = 1e9) -> None:
    """Lets another process renew lease 4 again and again."""
    write_lease(mount, 4, renewals=clock.now)
    if clock.now + seconds <= until:
        clock.events[clock.now + seconds] = lambda: renew_each(clock, seconds, mount, until)
    else:
        clock.events[until] = lambda: write_lease(mount, 4, is_released=True)


def test_a_repeated_start_waits_for_a_lease_that_is_renewed_and_then_refuses(
    mount: Path, clock: Clock
) -> None:
    renew_each(clock, 12, mount)
    with pytest.raises(ConfigError, match="is being written by process 7"), own_run(mount, 300):
        pass
    assert 300 <= clock.now <= 312 and list(leases(mount)) == ["4"]


def test_a_repeated_start_takes_a_lease_that_is_given_back(mount: Path, clock: Clock) -> None:
    renew_each(clock, 12, mount, until=100)
    with own_run(mount, 300):
        assert clock.now == 100 and list(leases(mount)) == ["5"]


def test_a_lease_that_is_no_longer_renewed_is_taken_a_minute_later(
    mount: Path, clock: Clock
) -> None:
    write_lease(mount, 4)
    clock.events[12] = lambda: write_lease(mount, 4, renewals=1)
    with own_run(mount, 300):
        assert clock.now == 72 and list(leases(mount)) == ["5"]


@pytest.mark.parametrize(("seconds", "ends", "waited"), [(0, 5, 0), (300, 5, 5), (300, 400, 300)])
def test_a_repeated_start_waits_for_a_lock(
    tmp_path: Path, clock: Clock, seconds: int, ends: int, waited: int
) -> None:
    with contextlib.ExitStack() as other:
        other.enter_context(try_lock(tmp_path / owner.LOCK_FILE))
        clock.events[ends] = other.close
        if ends <= seconds:
            with own_run(tmp_path, seconds) as (check, lease):
                assert clock.now == waited and lease is None
                check()
        else:
            with pytest.raises(ConfigError, match=f"written by {ME}"), own_run(tmp_path, seconds):
                pass
            assert clock.now == waited


def test_a_signal_ends_the_wait(mount: Path, clock: Clock) -> None:
    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= 3:
            raise KeyboardInterrupt

    write_lease(mount, 4)
    with pytest.raises(KeyboardInterrupt), own_run(mount, 300, sleep):
        pass
    assert clock.now == 3


def test_the_other_processes_of_a_job_see_that_its_lease_was_taken(mount: Path) -> None:
    check_lease(mount, 1)  # their hosts may see it late
    with own_run(mount) as (_, number):
        assert number == 1
        check_lease(mount, number)
        write_lease(mount, 2)
        with pytest.raises(LostRun, match="taken over by process 7 on node-1"):
            check_lease(mount, number)


def test_an_owner_that_was_paused_stops_at_its_next_write(mount: Path) -> None:
    with own_run(mount) as (check, _):
        check()
        write_lease(mount, 2)
        with pytest.raises(LostRun, match=r"taken over by process 7 on node-1, because its lease"):
            check()
    # It leaves the lease of the new owner alone.
    assert leases(mount)["2"] == OTHER


def test_an_owner_of_an_older_lease_stops_though_its_lease_is_still_there(mount: Path) -> None:
    with own_run(mount) as (check, _):
        mine = leases(mount)["1"]
        write_lease(mount, 2, token=mine["token"])  # as if the two had drawn the same number
        with pytest.raises(LostRun):
            check()


def test_an_owner_whose_lease_was_deleted_stops(mount: Path) -> None:
    with own_run(mount) as (check, _):
        (mount / "lease" / "1").unlink()
        with pytest.raises(LostRun):
            check()


def test_an_owner_renews_its_lease_and_its_own_renewals_do_not_disturb_it(
    mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "RENEW_SECONDS", 0.001)
    with own_run(mount) as (check, _):
        deadline = time.monotonic() + 60
        while leases_or_none(mount) < 30 and time.monotonic() < deadline:
            check()
        assert threading.active_count() > 1
    assert leases(mount)["1"]["renewals"] >= 30


def leases_or_none(workdir: Path) -> int:
    """Returns how often the lease was renewed, or 0 while it is being written."""
    try:
        return leases(workdir)["1"]["renewals"]
    except ValueError:
        return 0


@pytest.fixture
def wait(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Returns a sleep that lasts until the wait has been announced, which is at once."""
    is_announced = threading.Event()
    announce_at_once(monkeypatch, then=is_announced.set)

    def sleep(seconds: float) -> None:
        assert is_announced.wait(100)
        clock.sleep(seconds)

    return sleep


def test_a_wait_says_what_it_waits_for(
    mount: Path, wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lease(mount, 1)
    with own_run(mount, 0.0, wait):
        pass
    assert capsys.readouterr().err == (
        f"waiting up to 60 s to see whether process 7 on node-1 still writes {mount}\n"
    )


def test_a_repeated_start_says_for_whom_it_waits_in_one_line(
    tmp_path: Path, wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with try_lock(tmp_path / owner.LOCK_FILE):
        with pytest.raises(ConfigError), own_run(tmp_path, 2.5, wait):
            pass
        assert capsys.readouterr().err == (
            f"waiting up to 2 s until {ME} no longer writes {tmp_path}\n"
        )


def test_paths_load_neither_jax_nor_an_object_store() -> None:
    code = (
        "import sys, moe.storage.paths, moe.storage.owner, moe.storage.lines\n"
        "print({'jax', 'tensorflow', 'fsspec', 'gcsfs', 'etils'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
