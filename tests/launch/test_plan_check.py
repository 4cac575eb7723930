"""Holds what is counted against what programs were measured to take, for every config."""

import json
from pathlib import Path

import pytest

from launch import plan_check, plan_step_time
from launch.plan_check import CASES
from moe.scaling.memory import MARGIN, step_bytes

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"
PROGRAMS = json.loads((BENCHMARKS / "plan_memory.json").read_text())
MEASURED = {
    case.name: PROGRAMS[case.name]["bytes"]
    for case in CASES
    if "bytes" in PROGRAMS.get(case.name, {})
}


def counted(case):
    config = case.read()
    return step_bytes(config, config.mesh, case.platform).total


def test_every_config_has_a_case_on_every_chip_that_it_names():
    for path in (ROOT / "configs").glob("*.py"):
        hardware = path.read_text().split("Hardware:")[-1].split("\nTime")[0]
        if path.stem in ("__init__", "benchmark_moe"):  # the latter is one layer, and no run
            continue
        chips = {case.chip for case in CASES if case.config == path.stem}
        named = {"H200": "h200", "v5p": "v5p", "CPU": "cpu"}
        assert chips >= {chip for name, chip in named.items() if name in hardware}, path.stem


def test_the_program_of_every_config_was_compiled():
    """Other layouts may be missing, until the command is run again."""
    assert PROGRAMS.keys() <= {case.name for case in CASES}
    assert {case.name for case in CASES if not case.changes} <= MEASURED.keys()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in MEASURED], ids=str)
def test_what_is_counted_is_what_a_program_takes(case):
    assert counted(case) / MEASURED[case.name] == pytest.approx(1, abs=MARGIN)


def test_the_table_has_a_row_for_each_program():
    rows = plan_check.table(PROGRAMS).splitlines()[2:]
    assert len(rows) == len(MEASURED)
    assert any(row.startswith("| `moe_671b` | 1,024 v5p |") for row in rows)


def test_a_case_whose_compiler_is_missing_is_left_for_another_machine(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = next(case for case in CASES if case.chip == "v5p")
    assert plan_check.program_bytes(case) == {}


def test_steps_on_a_cpu_take_what_dense_tiny_predicts():
    """One number, fitted on `dense_tiny`, is within 25 % for four other shapes."""
    measured = json.loads((BENCHMARKS / "plan_step_time.json").read_text())
    rows = plan_step_time.table(measured).splitlines()[2:]
    ratios = [float(row.split("|")[-2]) for row in rows]
    assert len(ratios) == 4 and all(abs(ratio - 1) <= 0.25 for ratio in ratios), ratios
