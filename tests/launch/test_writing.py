"""Commands write each file whole: whoever reads it while they run, or after a kill, finds one."""

import ast
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from launch.report import report
from moe.files import hold_lock, try_lock, write_whole
from moe.storage.lines import LineWriter
from tests.jobs import file_size_limit
from tests.launch.report_runs import make_run

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Ends a command as a signal does, at a place that a test chooses."""


def test_a_report_that_is_killed_leaves_the_earlier_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(make_run(tmp_path, [(10, {"train/loss": 2.5})]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(before) == {
        "index.html",
        "figures.json",
        "loss-dark.png",
        "loss-light.png",
        "loss.pdf",
    }

    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, 10)
        raise Killed

    make_run(tmp_path, [(20, {"train/loss": 1.5})])
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        report(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    """The hidden name under which it is written first says nothing to a user."""
    for path in (tmp_path / "no" / "a.md", Path("/proc/a.md")):
        with pytest.raises(FileNotFoundError) as caught:
            write_whole(path, "a")
        assert caught.value.filename == str(path)


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands tell an error with a file's name in one line, and any other with a traceback."""
    (tmp_path / "link").symlink_to("/dev/full")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("link", "file"):
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_whole(tmp_path / name, "text")
        assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(OSError, match="No space left on device") as caught:
        LineWriter(tmp_path / "link").append("line\n")
    assert caught.value.filename == str(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("lock", [hold_lock, try_lock])
def test_a_lock_holds_on_a_full_disk(tmp_path: Path, lock: Any) -> None:
    """The name of the holder cannot be written then, neither at once nor at the end."""
    with file_size_limit(0), lock(tmp_path / "lock") as held:
        assert held is (True if lock is hold_lock else None)
        assert (tmp_path / "lock").read_bytes() == b""


def test_a_file_is_written_whole_and_readable_as_others_are(tmp_path: Path) -> None:
    path, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("ä")
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode() and path.stat().st_mode == other.stat().st_mode
    write_whole(path, b"\x00")
    assert path.read_bytes() == b"\x00" and {item.name for item in tmp_path.iterdir()} == {
        "a.md",
        "b.md",
    }


def test_a_name_of_characters_of_many_bytes_may_be_as_long_as_any(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_whole(path, "text")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "text"


def test_a_link_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "fifo", "text")
    assert (tmp_path / "fifo").is_fifo() and os.read(reader, 9) == b"text"
    os.close(reader)


def test_commands_write_files_by_write_whole_alone() -> None:
    direct = {"write_text", "write_bytes", "savefig", "dump"}
    wrong = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"
        for path in (ROOT / "launch").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in direct
        # `image` is a picture in memory, which write_whole then writes.
        if not (node.func.attr == "savefig" and ast.unparse(node.args[0]) == "image")
    ]
    assert not wrong, "\n".join(wrong)


# Functions called open that give bytes, or a descriptor.
BYTES = ("os.open", "listing.open", "self.file_system.open")


def has_encoding(call: ast.Call) -> bool:
    """Returns whether a call that reads or writes text says how, so that no locale decides it."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    constants = [str(given.value) for given in call.args if isinstance(given, ast.Constant)]
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    is_bytes = any("b" in mode for mode in constants) or ast.unparse(call.func) in BYTES
    is_text = (
        name in ("read_text", "write_text")
        or (name == "open" and not is_bytes)
        or keywords.get("text") == "True"  # of a subprocess
    )
    # What is passed on as **names has the key None.
    return not is_text or not {"encoding", None}.isdisjoint(keywords) or "utf-8" in constants


@pytest.mark.parametrize("folder", ["moe", "kernels", "launch"])
def test_text_is_utf_8_whatever_the_locale_is(folder: str) -> None:
    """With LC_ALL=C and without Python's UTF-8 mode, the default is ASCII."""
    wrong = [
        f"{path}:{node.lineno}: {ast.unparse(node)[:60]}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not has_encoding(node)
    ]
    assert not wrong, "\n".join(wrong)
