"""What `launch.compare` makes of finished runs: statistics over seeds, a table, and a plot."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from launch.compare import Run, compare, mean_and_error, plan_runs, result, table
from moe.config import MoEConfig
from tests.launch.compared_runs import TINY, finish, write_run
from tests.launch.report_runs import colours


def test_mean_and_standard_error() -> None:
    # Squared distances from 4 sum to 8; over n - 1 = 2 that is 4, whose root over the root of 3 is
    # the error.
    mean, error = mean_and_error([2.0, 4.0, 6.0])
    assert (mean, error) == (4.0, pytest.approx(2 / 3**0.5, rel=1e-12))
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0, rel=1e-12))
    assert mean_and_error([1.5]) == (1.5, None)


def test_a_variant_is_summed_up_over_its_finished_seeds(tmp_path: Path) -> None:
    runs = [
        write_run(
            Run("v", TINY, tmp_path / "0"),
            [9.0, 1.0],
            router=[(50.0, 0.5)] + [(1.0, 0.0)] * 10,
            speeds=[10.0, 90.0],
        ),
        write_run(
            Run("v", dataclasses.replace(TINY, seed=3), tmp_path / "3"),
            [3.0],
            router=[(2.0, 0.1)] * 10,
            speeds=[30.0],
        ),
        Run("v", dataclasses.replace(TINY, seed=4), tmp_path / "4"),
    ]
    values = result(runs)
    assert values["validation_loss"] == {
        "mean": 2.0,
        "standard_error": pytest.approx(1.0),
        "of_seeds": {0: 1.0, 3: 3.0},
    }
    assert values["worst_max_vio"] == pytest.approx(
        1.5
    )  # the last ten logged steps: the first step's 50 is not among them
    assert values["dropped_fraction"] == pytest.approx(0.05)
    assert values["tokens_per_second"] == 30.0


def test_the_table_has_a_dash_where_nothing_is_known(tmp_path: Path) -> None:
    sparse = dataclasses.replace(
        TINY.model, moe=MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8)
    )
    results = {
        "dense": result([write_run(Run("dense", TINY, tmp_path / "0"), [1.25], speeds=[12345.6])]),
        "sparse": result([Run("sparse", dataclasses.replace(TINY, model=sparse), tmp_path / "1")]),
        "both": {
            "active_parameters": 1000,
            "total_parameters": 20000,
            "training_flops_per_token": 3e6,
            "validation_loss": {
                "mean": 1.5,
                "standard_error": 0.01234,
                "of_seeds": {0: 1.48766, 1: 1.51234},
            },
            "worst_max_vio": 0.123,
            "dropped_fraction": 0.0456,
            "tokens_per_second": 1e3,
        },
    }
    lines = table(results).splitlines()
    assert lines[0] == (
        "| variant | active parameters | total parameters | training FLOPs per token | validation "
        "loss (nats per token) | seeds "
        "| worst MaxVio | dropped | tokens/s |"
    )
    # Embeddings 2 x 256 x 16, attention 16 x (2 + 2) x 8 + 2 x 8 x 16, feed-forward 3 x 16 x 24,
    # three norms of 16; no router.
    assert lines[2].startswith("| dense | 10,160 | 10,160 | ") and lines[2].endswith(
        " | 1.2500 | 1 | – | – | 12,346 |"
    )
    # Four experts of 3 x 16 x 8, two of them active, and a router of 16 x 4.
    assert lines[3].startswith("| sparse | 9,840 | 10,608 | ") and lines[3].endswith(
        " | – | 0 | – | – | – |"
    )
    assert (
        lines[4]
        == "| both | 1,000 | 20,000 | 3,000,000 | 1.5000 ± 0.0123 | 2 | 0.12 | 4.6% | 1,000 |"
    )


def test_a_comparison_needs_a_run_that_has_begun(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="holds none of the experiment's runs: leave out --report_only"
    ):
        compare(plan_runs({"dense": TINY}, (0,), tmp_path), tmp_path)


def test_an_unfinished_experiment_is_written_and_drawn(tmp_path: Path) -> None:
    runs = plan_runs({"one": TINY, "two": TINY, "three": TINY}, (0, 7), tmp_path)
    write_run(runs[0], [2.0], speeds=[10.0, 20.0])
    write_run(runs[3], [4.0], speeds=[10.0])
    write_run(runs[1], [], speeds=[10.0])
    (
        runs[1].workdir / "checkpoints" / "4" / "about.json"
    ).unlink()  # killed while it saved, and not finished
    text = compare(runs, tmp_path)
    assert [line.split(" | ")[4:6] for line in text.splitlines()[2:]] == [
        ["3.0000 ± 1.0000", "2"],
        ["–", "0"],
        ["–", "0"],
    ]
    written = (tmp_path / "comparison.md").read_text()
    assert written.startswith(text) and written.endswith(
        "![Losses by variant, and over steps](comparison.png)\n"
    )
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["one"]["validation_loss"] == {
        "mean": 3.0,
        "standard_error": 1.0,
        "of_seeds": {"0": 2.0, "7": 4.0},
    }
    assert values["three"]["validation_loss"] == {
        "mean": None,
        "standard_error": None,
        "of_seeds": {},
    }
    with Image.open(tmp_path / "comparison.png") as image:
        assert image.size == (1650, 600)
    seen = colours(tmp_path / "comparison.png")
    assert "#1f77b4" in seen and "#2ca02c" not in seen  # the third variant has not begun


def test_a_run_whose_loss_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """It is finished, and not trained again. The other runs are compared, without a NaN in JSON."""
    runs = plan_runs({"dense": TINY}, (0, 1), tmp_path)
    for run, loss in zip(runs, (math.nan, 2.0), strict=True):
        finish(run)
        lines = [
            {"step": 4, "train/loss": 2.5, "train/skipped_steps": 0.0},
            {"step": 4, "validation/loss": loss},
        ]
        (run.workdir / "metrics.jsonl").write_text(
            "".join(json.dumps(line).replace("NaN", '"NaN"') + "\n" for line in lines)
        )
    assert [(run.finished, run.diverged) for run in runs] == [(True, True), (True, False)]
    compare(runs, tmp_path)
    results = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert results["dense"]["validation_loss"] == {
        "mean": 2.0,
        "standard_error": None,
        "of_seeds": {"1": 2.0},
    }
