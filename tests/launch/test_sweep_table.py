"""Tests what the row of a run says, on metrics and configs whose values are worked out by hand."""

import dataclasses
from pathlib import Path

import pytest

from launch import sweep_table
from launch.sweep_file import plan
from launch.sweep_table import COLUMNS, planned_row, read_result, write_result
from moe.config import MoEConfig
from moe.scaling.experiments.sweep import Point, expand
from moe.workdir.tracking import MetricWriter
from tests.launch.compared_runs import TINY, Rows, write_run


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_table, "open_split", lambda config, split: Rows())


def test_a_row_has_medians_and_means_of_the_last_steps(tmp_path: Path) -> None:
    (one,) = plan("e.py", TINY, [Point("a", {})], [])
    # The first step's 50 is not among the last ten logged ones.
    router = [(50.0, 0.5)] + [(1.0, 0.0)] * 5 + [(2.0, 0.1)] * 5
    write_run(one, tmp_path, [9.0, 1.0], router=router, speeds=[64.0, 256.0, 1024.0])
    row = read_result(tmp_path, one.run)
    assert row and list(row) == list(COLUMNS)
    assert row["loss"] == 1.0 and row["worst_max_vio"] == 1.5
    assert row["dropped_fraction"] == pytest.approx(0.05)
    assert row["step_seconds"] == 2.0  # 512 tokens at the median of 256 per second


def test_only_the_validation_of_the_last_step_is_the_loss(tmp_path: Path) -> None:
    (one,) = plan("e.py", TINY, [Point("a", {})], [])
    (tmp_path / "a").mkdir()
    with MetricWriter(tmp_path / "a", TINY.tracking, step=0) as writer:
        writer.write(2, {"validation/loss": 3.5})
    assert write_result(one.run, tmp_path, "interrupted", "code")["loss"] is None
    with MetricWriter(tmp_path / "a", TINY.tracking, step=2) as writer:
        writer.write(4, {"validation/loss": 2.5})
    assert write_result(one.run, tmp_path, "finished", "code")["loss"] == 2.5


def test_a_mixture_is_described_beside_its_dense_twin() -> None:
    moe = MoEConfig(num_experts=16, experts_per_token=4, expert_dim=6)
    model = dataclasses.replace(TINY.model, moe=moe)
    rows = [
        planned_row(run)
        for base in (TINY, dataclasses.replace(TINY, model=model))
        for run in expand(base, [Point("a", {})])
    ]
    names = ("experts", "experts_per_token", "expert_dim", "granularity", "sparsity")
    # The feed-forward width of the dense model is 24.
    assert [[row[name] for name in names] for row in rows] == [
        [1, 1, 24, 1.0, 0.0],
        [16, 4, 6, 4.0, 0.75],
    ]
    # Sixteen experts of three matrices of 16 x 6 in place of three of 16 x 24, and a router.
    assert rows[1]["parameters"] - rows[0]["parameters"] == 15 * 3 * 16 * 6 - 3 * 16 * 18 + 16 * 16
    # Float32: parameter, gradient and two moments. A few words more count steps.
    assert 0 < rows[0]["memory_bytes"] - 16 * rows[0]["parameters"] < 100
