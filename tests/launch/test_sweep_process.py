"""Tests what a run of a sweep has of the machine, and how its end is told."""

import os
from pathlib import Path
from typing import Any

import pytest

from launch.sweep_process import Slot, reason_of, share, status_of


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share([0, 1, 2, 3, 4], 1, 2) == [2, 3] and share([0], 1, 2) == []
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "HOME": "b"}
    own = {"CUDA_VISIBLE_DEVICES": "6,7", "HOME": "b"}
    assert Slot(1, 2).environment(environment) == own
    assert Slot(0, 1).environment({}) == {}
    assert Slot(0, 1).environment(environment) == environment
    assert Slot(3, 8).environment(environment) == environment  # there are not enough for each
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6})
    chosen: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: chosen.append(cores))
    Slot(1, 2).enter()
    Slot(5, 8).enter()
    assert chosen == [[4, 6], [0, 2, 4, 6]]


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (0, "finished", None),
        (2, "failed", "error: it is being written by process 7"),
        (3, "diverged", "step 5: nothing is finite"),
        (75, "interrupted", "/runs/a stopped at step 4"),
        (143, "interrupted", "stopped"),
        (139, "failed", "killed by SIGSEGV"),
        (255, "failed", "error: a library gave up"),
    ],
)
def test_an_exit_code_says_how_a_run_ended(
    tmp_path: Path, code: int, status: str, reason: str | None
) -> None:
    words = reason if reason and reason.startswith("error") else f"{status}: {reason}"
    (tmp_path / "output.log").write_text(f"$ python\nloss 5\rloss 4\n{words}\n\n")
    assert status_of(code) == status and reason_of(code, tmp_path) == reason


def test_an_exit_code_is_the_reason_where_a_run_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("error: old\n$ python -m launch.train --config=c.py\n")
    assert reason_of(1, tmp_path) == "exit code 1"
    (tmp_path / "output.log").write_text("error: old\n")
    assert reason_of(1, tmp_path, shown=True) == "exit code 1"
