"""Tests that a path that cannot be written is told in one line, before anything is computed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.output_paths import check_current_directory, check_directory, output_file
from moe.config import ConfigError
from moe.storage.paths import make_directory, run_path

ROOT = Path(__file__).parents[2]
RUN = "--config=configs/dense_tiny.py"
COMMANDS = {
    "launch.train": (RUN, "--workdir=DIR"),
    "launch.sweep": ("--sweep=configs/sweeps/tokens_tiny.py", "--workdir=DIR"),
    "launch.compare": ("--configs=configs/dense_tiny.py,configs/moe_tiny.py", "--workdir=DIR"),
    "launch.slurm": ("--nodes=1", RUN, "--workdir=DIR"),
    "launch.upcycle": ("--from=RUN", "--config=configs/moe_tiny.py", "--workdir=DIR"),
    "launch.evaluate": ("--workdir=DIR",),
    "launch.gpu": ("--out=DIR",),
    "launch.benchmark": (RUN, "--json=DIR/x"),
    "launch.data": (RUN, "--html=DIR/x"),
    "launch.plan_check": ("--json=DIR/x",),
    "launch.plan_step_time": ("--json=DIR/x",),
    "launch.tokenizer": ("--data=stdlib", "--vocab_size=300", "--out=DIR/x"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_a_directory_is_told_in_one_line(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "afile").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")  # launch.slurm looks whether it is installed
    (tmp_path / "sbatch").chmod(0o755)
    names = {"DIR": str(tmp_path / "afile"), "RUN": str(tmp_path / "run")}
    words = list(COMMANDS[command])
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", command, *words],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith("error: ") and "[Errno" not in done.stderr, done.stderr
    name = words[-1].partition("=")[0].removeprefix("--")
    assert re.search(rf"--{name}=|set (--)?{name} to", done.stderr), done.stderr
    assert str(tmp_path / "afile") in done.stderr


def test_a_directory_is_checked_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "afile").touch()
    check_directory("--workdir", tmp_path)
    check_directory("--workdir", tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir(tmp_path)
    check_directory("--workdir", Path("new/run"))
    for path in ("afile", "afile/x/y"):
        with pytest.raises(ConfigError) as caught:
            check_directory("--workdir", tmp_path / path)
        assert str(caught.value) == (
            f"--workdir={tmp_path / path} cannot be written ({tmp_path / 'afile'} is no "
            "directory): set --workdir to a directory that can"
        )
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(ConfigError, match="link is no directory"):
        check_directory("--workdir", tmp_path / "link")
    # Root may write everywhere but on a file system that is mounted read-only.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=f"nothing can be written in {tmp_path}.: set --output"):
        check_directory("--output", tmp_path / "new" / "run")


def test_a_file_is_checked_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_file("--json", str(tmp_path / "x.json")) == tmp_path / "x.json"
    assert not (tmp_path / "x.json").exists()
    assert output_file("--json", "/dev/stdout") == Path("/dev/stdout")
    with pytest.raises(ConfigError, match=f"^--json={tmp_path} is a directory: set --json to a f"):
        output_file("--json", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/no is no directory: create it first"):
        output_file("--json", str(tmp_path / "no" / "x.json"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"x.json cannot be written: set --json to a file that"):
        output_file("--json", str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("afile", "something else is there"), ("afile/x", "Not a directory"), ("/proc/x", "No such")],
)
def test_what_the_system_refuses_to_make_is_told_in_words(
    path: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(OSError, match=reason) as caught:
        make_directory(run_path(tmp_path / path))
    assert caught.value.errno is None  # so commands take it for a mistake, without a traceback
    assert str(caught.value).startswith(f"{tmp_path / path} cannot be made a directory (")
    assert str(caught.value).endswith("): set workdir to one that can be written")


def test_a_current_directory_that_was_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_current_directory()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the current directory was deleted: cd to one that is"):
        check_current_directory()
    monkeypatch.chdir(tmp_path)
