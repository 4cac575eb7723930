"""Naming what is slow before a run begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.preflight import Times, pairs, slow_lines, table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 7, 8])
def test_each_process_meets_both_of_its_neighbours(num_processes: int) -> None:
    rounds = pairs(num_processes)
    for at_once in rounds:
        members = [process for pair in at_once for process in pair]
        assert len(members) == len(set(members))
    met = {frozenset(pair) for at_once in rounds for pair in at_once}
    ring = {frozenset((n, (n + 1) % num_processes)) for n in range(num_processes)}
    assert met == {pair for pair in ring if len(pair) == 2}


def times(*pairs_of_each: tuple[float, ...]) -> list[Times]:
    return [
        Times(f"node-{number}", (1.0, 1.1), seconds) for number, seconds in enumerate(pairs_of_each)
    ]


def test_equal_processes_are_not_slow() -> None:
    assert list(slow_lines(times((1.0, 1.1), (1.1, 1.2), (1.2, 1.0)))) == []


def test_a_slow_device_is_named() -> None:
    measured = times((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    measured[2] = Times("node-2", (1.0, 2.1), (1.0, 1.0))
    [line] = slow_lines(measured)
    assert line.startswith("device 1 of process 2 of 3 on node-2 is slow: its matmul takes 2.0 ")


def test_a_process_with_a_slow_link_is_named_and_its_neighbours_are_not() -> None:
    """Process 2 of a ring of 5 takes long with both process 1 and process 3."""
    measured = times((1.0, 1.0), (1.0, 5.0), (5.0, 5.2), (5.2, 1.0), (1.0, 1.0))
    [line] = slow_lines(measured)
    assert line.startswith("process 2 of 5 on node-2 is slow in the network: ")
    assert "at least 5.0 times" in line


def test_two_processes_cannot_tell_which_is_slow() -> None:
    assert list(slow_lines(times((5.0,), (5.0,)))) == []
    assert "5000.0" in table(times((5.0,), (5.0,)))


@pytest.mark.slow
def test_it_measures_a_real_job(tmp_path: Path) -> None:
    job = [sys.executable, "-m", "launch.local", "--processes=3", "--devices=2", "--"]
    done = subprocess.run(
        [*job, "launch.preflight", "--megabytes=1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode in (0, 4), done  # a busy machine may be slow
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["process", "0", "1", "2"]
    assert "\nsum over all 6 devices: " in done.stdout
    assert "slow" in done.stderr
