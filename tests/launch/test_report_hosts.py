"""The step times of a run's processes in its report, and the name of a straggler."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.plotting import THEMES
from launch.report import report
from launch.report_hosts import hosts_section, read_host_lines, straggler_note
from moe.config import ConfigError
from tests.launch.report_runs import colours, images, make_run, text


def write_hosts(workdir: Path, lines: list[tuple[int, list[float], list[float]]]) -> Path:
    texts = [
        json.dumps({"step": step, "step_seconds": steps, "host_seconds": hosts}) + "\n"
        for step, steps, hosts in lines
    ]
    (workdir / "hosts.jsonl").write_text("".join(texts))
    return workdir


def test_a_run_over_processes_has_their_curves_and_its_straggler_named(tmp_path: Path) -> None:
    make_run(tmp_path, [(10, {"train/loss": 2.5}), (20, {"train/loss": 2.5})])
    write_hosts(tmp_path, [(step, [0.5] * 4, [0.1, 0.1, 0.4, 0.12]) for step in (10, 20, 30, 40)])
    seen = text(report(tmp_path))
    assert (
        "Processes Process 2 is a straggler. From step 10 to 40, a step took 0.5 s. In it the host "
        "of process 2 worked 0.4 s, the longest of 4, and the median of the others is 0.1 s."
        in seen
    )
    stems = {name.rpartition("-")[0] for name in images(tmp_path)}
    assert {"hosts_step", "hosts_work", "hosts_map"} <= stems
    for theme, roles in THEMES.items():
        found = colours(tmp_path / "report" / f"hosts_work-{theme}.png")
        assert {roles["first"], roles["second"]} <= found
        assert roles["second"] in colours(tmp_path / "report" / f"hosts_map-{theme}.png")


@pytest.mark.parametrize(
    ("hosts", "straggler"),
    [
        ([0.1, 0.1, 0.1, 0.11], None),
        ([0.001, 0.001, 0.01, 0.001], None),  # ten times the others, and 2 % of a step
        ([0.1, 0.13], None),
        ([0.1, 0.2], 1),
        ([0.2, 0.1], 0),
        ([0.0, 0.0, 0.4], 2),
    ],
)
def test_a_straggler_delays_the_others(
    tmp_path: Path, hosts: list[float], straggler: int | None
) -> None:
    steps = [0.5] * len(hosts)
    note = straggler_note(read_host_lines(write_hosts(tmp_path, [(10, steps, hosts)])))
    if straggler is None:
        assert note.endswith("No process is a straggler.")
    else:
        assert note.startswith(f"Process {straggler} is a straggler.")


def test_a_straggler_is_looked_for_in_the_last_lines(tmp_path: Path) -> None:
    lines = [(step, [0.5, 0.5], [0.4 if step < 30 else 0.1, 0.1]) for step in range(60)]
    section = hosts_section(write_hosts(tmp_path, lines))
    assert section and section.note.startswith("From step 40 to 59")


def test_one_process_has_no_section(tmp_path: Path) -> None:
    assert hosts_section(tmp_path) is None
    assert hosts_section(write_hosts(tmp_path, [(10, [0.5], [0.1])])) is None


def test_a_job_that_went_on_with_more_processes_shows_these(tmp_path: Path) -> None:
    lines = [(10, [0.5], [0.1]), (20, [0.5] * 2, [0.1] * 2), (30, [0.25] * 4, [0.1] * 4)]
    section = hosts_section(write_hosts(tmp_path, lines))
    assert section and "a step took 0.25 s" in section.note and "longest of 4" in section.note


def test_the_last_line_of_a_step_counts_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    write_hosts(tmp_path, [(10, [1, 1], [1, 1]), (20, [2, 2], [2, 2]), (10, [3, 3], [3, 3])])
    with (tmp_path / "hosts.jsonl").open("a") as file:
        file.write('{"step": 30, "step_sec')
    lines = read_host_lines(tmp_path)
    assert [line.step for line in lines] == [10, 20]
    np.testing.assert_array_equal([line.step_seconds for line in lines], [[3, 3], [2, 2]])


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 10, "step_seconds": [1, 1]}',
        '{"step": 10, "step_seconds": [1, 1], "host_seconds": [1]}',
        '{"step": 10, "step_seconds": 1, "host_seconds": 1}',
        '{"step": 10, "step_seconds": [1, "x"], "host_seconds": [1, 1]}',
        "nonsense",
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"hosts\.jsonl.*: delete that line"):
        read_host_lines(tmp_path)
