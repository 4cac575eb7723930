"""Holds what compiled steps send against the least that their layouts must send."""

import json
from pathlib import Path

import pytest

from launch.plan_check import Case, program_bytes
from launch.plan_sent import CASES, fits, ratio, table

RESULTS = json.loads(
    (Path(__file__).parents[2] / "docs" / "benchmarks" / "plan_sent.json").read_text()
)
COMPILED = [case for case in CASES if "sent_bytes" in RESULTS.get(case.name, {})]


def most(case: Case) -> float:
    """Returns the ratio that a case may have.

    On a cube of 8 TPUs scatters of dense layers are left to the compiler, which overlaps them.
    """
    if case.chip == "v5p":
        return 1.25 if case.config.startswith("dense") and case.devices == 8 else 1.1
    return 1.01


def case_id(case: Case) -> str:
    way = case.changes["model.remat"], case.changes["train.accumulation"]
    return " ".join(map(str, (case.config, case.chip, case.devices, *way)))


@pytest.mark.parametrize("case", COMPILED, ids=case_id)
def test_a_step_sends_hardly_more_than_it_must(case: Case) -> None:
    assert fits(case)
    assert 0.9 < ratio(case, RESULTS[case.name]["sent_bytes"]) <= most(case)


def test_the_file_has_cases_that_there_are() -> None:
    assert RESULTS.keys() <= {case.name for case in CASES}
    text = table(RESULTS)
    assert text.count("\n") == 21 and text.count("GiB") == len(COMPILED) > 0


@pytest.mark.aot
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if (case.chip, case.devices) == ("h200", 8)
        and (case.changes["model.remat"], case.changes["train.accumulation"]) == ("full", 4)
    ],
    ids=case_id,
)
def test_a_program_compiled_now_sends_hardly_more_than_it_must(case: Case) -> None:
    found = program_bytes(case)
    if not found:
        pytest.skip("needs pip install '.[aot]'")
    assert ratio(case, found["sent_bytes"]) <= most(case)
