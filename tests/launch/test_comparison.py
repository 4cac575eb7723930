"""Tests the statistics of a comparison on numbers worked out by hand, and its tables."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from launch import comparison_plots
from launch.comparison import (
    comparison,
    markdown,
    mean_and_error,
    paired_difference,
    pareto_front,
    seeds_needed,
    summarize,
)
from launch.sweep_table import Row, planned_row
from moe.config import TrackingConfig
from moe.scaling.experiments.sweep import Point, expand
from moe.workdir.tracking import MetricWriter
from tests.launch.compared_runs import TINY

PLANNED = planned_row(expand(TINY, [Point("a", {})])[0])


def rows(losses: dict[int, float], **values: float) -> dict[int, Row]:
    """Returns the row of a finished run with each seed's loss."""
    return {seed: PLANNED | {"loss": loss} | values for seed, loss in losses.items()}


def test_mean_and_standard_error() -> None:
    # Squared distances from 4 sum to 8; over n - 1 = 2 that is 4, whose root over the root of 3 is
    # the error.
    mean, error = mean_and_error([2.0, 4.0, 6.0])
    assert (mean, error) == (4.0, pytest.approx(2 / 3**0.5, rel=1e-12))
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0, rel=1e-12))
    assert mean_and_error([1.5]) == (1.5, None)


def test_differences_are_paired_by_seed() -> None:
    first = rows({0: 1.0, 1: 2.0, 2: 3.0, 9: 50.0})
    second = rows({2: 3.3, 0: 1.1, 1: 2.2})
    found = paired_difference(first, second)
    # The differences 0.1, 0.2 and 0.3 have the mean 0.2 and the standard deviation 0.1.
    assert found and found["mean"] == pytest.approx(0.2)
    assert found["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert found["num_seeds"] == 3
    # With two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t^2), and t^2 is 12.
    assert found["p_value"] == pytest.approx(1 - math.sqrt(12 / 14))
    losses = [[row["loss"] for _, row in sorted(both.items())][:3] for both in (first, second)]
    assert found["p_value"] == pytest.approx(stats.ttest_rel(losses[1], losses[0]).pvalue)


def test_few_or_no_seeds_leave_gaps() -> None:
    assert paired_difference(rows({0: 1.0}), rows({1: 1.0})) is None
    found = paired_difference(rows({0: 1.0}), rows({0: 1.5}))
    assert found == {
        "mean": 0.5,
        "standard_error": None,
        "num_seeds": 1,
        "p_value": None,
        "seeds_for_half": None,
    }
    equal = paired_difference(rows({0: 1.0, 1: 1.0}), rows({0: 1.5, 1: 1.5}))
    assert equal and equal["standard_error"] == 0 and equal["p_value"] is None


def test_the_seeds_that_a_difference_needs() -> None:
    # Tables of power for a paired t-test at 5 % and 80 % have 34 pairs for half a standard
    # deviation, and 10 for a whole one (Cohen 1988).
    assert seeds_needed(0.5, 1.0) == 34 and seeds_needed(0.1, 0.1) == 10
    assert seeds_needed(1.0, 1e-9) == 2
    assert seeds_needed(1e-6, 1.0) is None and seeds_needed(0.0, 1.0) is None


@pytest.mark.slow
def test_so_many_seeds_show_the_difference_in_four_of_five_experiments() -> None:
    draws = np.random.default_rng(0).normal(0.5, 1.0, (20_000, 34))
    p_values = stats.ttest_1samp(draws, 0.0, axis=1).pvalue
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.02)


def test_a_variant_is_summed_up_over_its_seeds() -> None:
    found = summarize(
        rows({0: 1.0}, worst_max_vio=1.0, step_seconds=2.0)
        | rows({3: 3.0}, worst_max_vio=2.0, step_seconds=4.0),
        PLANNED,
    )
    assert found["loss"] == {"mean": 2.0, "standard_error": 1.0, "of_seeds": {0: 1.0, 3: 3.0}}
    assert found["worst_max_vio"] == 1.5 and found["step_seconds"] == 3.0
    assert found["dropped_fraction"] is None and found["flops"] == PLANNED["flops"]
    assert summarize({}, PLANNED)["loss"]["mean"] is None


def test_a_pareto_front() -> None:
    points = {"a": (1, 3.0), "b": (2, 2.0), "c": (2, 2.5), "d": (4, 1.0), "e": (5, 1.0)}
    results = {
        name: {"flops": cost, "loss": {"mean": loss}} for name, (cost, loss) in points.items()
    }
    results |= {"unknown": {"flops": 0, "loss": {"mean": None}}}
    results |= {"twin": {"flops": 2, "loss": {"mean": 2.0}}}
    results |= {"untimed": {"flops": None, "loss": {"mean": 0.5}}}
    assert pareto_front(results, "flops") == ["a", "b", "twin", "d"]


def test_the_tables_have_a_dash_where_nothing_is_known() -> None:
    both = {
        "base": rows({0: 1.25, 1: 1.35}, step_seconds=512 / 12345.6),
        "other": rows({0: 1.35, 1: 1.47}, worst_max_vio=0.123, dropped_fraction=0.0456),
        "waiting": rows({}),
    }
    results = {name: summarize(found, PLANNED) for name, found in both.items()}
    text = markdown(comparison(results, both))
    # Embeddings 2 x 256 x 16, attention 16 x (2 + 2) x 8 + 2 x 8 x 16, feed-forward 3 x 16 x 24,
    # three norms of 16; no router.
    assert "| base | 10,160 | 10,160 | 42,336 | 1.3000 ± 0.0500 | 2 | – | – | 12,346 |" in text
    assert "| other | 10,160 | 10,160 | 42,336 | 1.4100 ± 0.0600 | 2 | 0.12 | 4.6% | – |" in text
    assert "| waiting | 10,160 | 10,160 | 42,336 | – | 0 | – | – | – |" in text
    # Differences of 0.10 and 0.12: t = 0.11 / 0.01, and P(|T| > 11) = 1 - 2 atan(11) / pi.
    p_value = 1 - 2 * math.atan(11) / math.pi
    assert f"| other | +0.1100 ± 0.0100 | 2 | {p_value:.2g} | " in text
    assert "| waiting | – | 0 | – | – |" in text
    assert "| training FLOPs | base |" in text and "| time per step | base |" in text


@pytest.mark.parametrize(("steps", "marker"), [((10,), "o"), ((10, 20), "None")])
def test_a_run_of_one_logged_loss_is_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], marker: str
) -> None:
    with MetricWriter(tmp_path, TrackingConfig(tensorboard=False), step=0) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 3.0})
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plots, "write_whole", lambda path, content: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    results = {"one": summarize(rows({0: 1.0}), PLANNED)}
    comparison_plots.write_losses(results, {"one": [tmp_path]}, Path("comparison.png"))
    (line,) = drawn[0].axes[1].lines
    assert line.get_marker() == marker


def test_several_runs_are_drawn_faintly_beside_their_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"seed_0": {10: 3.0, 20: 2.0, 30: 1.0}, "seed_1": {10: 5.0, 20: 3.0}}
    for name, values in losses.items():
        (tmp_path / name).mkdir()
        with MetricWriter(tmp_path / name, TrackingConfig(tensorboard=False), step=0) as writer:
            for step, loss in values.items():
                writer.write(step, {"train/loss": loss})
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plots, "write_whole", lambda path, content: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    results = {"one": summarize(rows({0: 1.0}), PLANNED)}
    workdirs = {"one": [tmp_path / name for name in (*losses, "not_begun")]}
    comparison_plots.write_losses(results, workdirs, Path("comparison.png"))
    *faint, mean = drawn[0].axes[1].lines
    assert [list(line.get_ydata()) for line in faint] == [[3.0, 2.0, 1.0], [5.0, 3.0]]
    assert list(mean.get_xdata()) == [10, 20] and list(mean.get_ydata()) == [4.0, 2.5]
    (label,) = drawn[0].axes[1].get_legend().get_texts()
    assert label.get_text() == "one"
    assert mean.get_alpha() is None and all(line.get_alpha() < 0.5 for line in faint)


def drawn_panels(
    monkeypatch: pytest.MonkeyPatch, results: Mapping[str, dict[str, Any]]
) -> dict[str, Axes]:
    """Returns the panels of the figure of fronts by the names of their costs."""
    drawn: list[Figure] = []
    monkeypatch.setattr(comparison_plots, "write_whole", lambda path, content: None)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    compared = comparison(results, {name: {} for name in results})
    comparison_plots.write_fronts(compared, Path("fronts.png"))
    return {axes.get_xlabel(): axes for axes in drawn[0].axes}


def test_times_of_a_step_are_written_with_their_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs have prefixes alone, and 3.3 m would read as minutes."""
    results = {
        "one": summarize(rows({0: 1.0}, step_seconds=0.0033), PLANNED),
        "two": summarize(rows({0: 2.0}, step_seconds=0.0038), PLANNED),
    }
    panels = drawn_panels(monkeypatch, results)
    for name, end in (("time per step", " ms"), ("parameters", " k")):
        panels[name].figure.draw_without_rendering()
        texts = [label.get_text() for label in panels[name].get_xticklabels()]
        assert texts and all(text.endswith(end) for text in texts)


def test_a_panel_of_costs_that_are_not_known_has_no_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The two runs were too short to have a time of a step."""
    results = {"one": summarize(rows({0: 1.0}), PLANNED), "two": summarize(rows({0: 2.0}), PLANNED)}
    panels = drawn_panels(monkeypatch, results)
    unknown = panels["time per step"]
    assert list(unknown.get_xticks()) == list(unknown.get_yticks()) == []
    assert [text.get_text() for text in unknown.texts] == ["not known yet"]
    assert len(panels["parameters"].get_xticks()) and not panels["parameters"].texts
