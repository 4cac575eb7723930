"""The log file of a process at gs://, on an emulator: real processes write it, however they end."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.logs import last_lines, log_directory, log_path
from moe.storage.paths import run_path

ROOT = Path(__file__).parents[2]
START = """
import os, sys
from launch import logs
from moe.storage.paths import run_path
path = logs.log_path(logs.log_directory("train", run_path(sys.argv[1])), 0)
logs.start(path, 0, 4)
print(sys.argv[2])
"""

pytestmark = pytest.mark.slow


def run(workdir: str, text: str, end: str = "") -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", START + end, workdir, text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.stdout, done.returncode


def test_each_start_appends_and_the_last_lines_survive(workdir: str) -> None:
    assert run(workdir, "first") == ("first\n", 0)
    assert run(workdir, "second", "os._exit(76)") == ("second\n", 76)
    path = log_path(log_directory("train", run_path(workdir)), 0)
    texts = [line.split(" 0 | ")[1] for line in path.read_text().splitlines()]
    assert [text for text in texts if "starts: " not in text] == ["first", "second"]
    assert len(texts) == 4
    assert [line.split(" 0 | ")[1] for line in last_lines(path)] == ["second"]
    assert last_lines(log_path(path.parent, 1)) == []
