"""A JSON file of which only some bytes are what was written is told in one line, or passed over.

JSON that is nested too deeply makes Python raise a RecursionError, which is no ValueError.
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import gpu, plan_check, report, report_card, sweep_progress, sweep_table
from launch.kernel_record import Record
from launch.recorded_evaluations import DIRECTORY, read_evaluations
from launch.routing_figures import read_results
from moe.config import ConfigError, DataConfig, RunConfig
from moe.storage.owner import _Seen
from moe.storage.tokenizer import read_stored
from moe.workdir.source import ORIGIN_FILE, read_origin
from moe.workdir.tracking import ENVIRONMENT_FILE

DEEP = "[" * 100_000
DAMAGES = {"deep": DEEP, "cut": '{"a": ', "empty": "", "another": '{"a": 1}', "no object": "[3]"}


def refused(read: Callable[[], Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read()
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_command_needs_is_refused(tmp_path: Path, damage: str) -> None:
    content = DAMAGES[damage]
    run = types.SimpleNamespace(name="a", identity="x", config=RunConfig())
    for name, read in {
        "routing.json": lambda: read_results(tmp_path / "routing.json"),
        f"{DIRECTORY}/a.json": lambda: read_evaluations(tmp_path),
        ORIGIN_FILE: lambda: read_origin(tmp_path),
        "tokenizer/about.json": lambda: read_stored(tmp_path),
        f"{sweep_table.RESULTS}/x.json": lambda: sweep_table.read_result(tmp_path, run),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        refused(read, path.name)
    (tmp_path / "plan.json").write_text(content)
    if damage != "another":
        refused(lambda: plan_check.read_results(tmp_path / "plan.json"), "plan.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_command_can_do_without_is_passed_over(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = DAMAGES[damage]
    (tmp_path / ENVIRONMENT_FILE).write_text(f'{content}\n{{"jax": "1"}}\n')
    assert list(report._read_environments(tmp_path))[-1] == {"jax": "1"}
    record = Record(tmp_path)
    record.path("a").write_text(content)
    assert record.recall("a") is None
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "metadata.json").write_text(content)
    config = RunConfig(data=DataConfig(directory=str(tmp_path)))
    assert report_card._find_rows(config, "a") == {}
    assert "train/loss" not in sweep_progress._parse(content)
    assert _Seen(1, content).holder == "another process"
    monkeypatch.setattr(gpu, "STEPS", {"step": None})
    (tmp_path / "step.json").write_text(content)
    (line,) = gpu.summary(tmp_path)
    assert line.endswith(
        "step.json is no result of this step: delete it, and run the command again"
    )
