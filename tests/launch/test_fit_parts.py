"""The parts of launch.fit that need no fit: texts, ticks, groups of runs, emitted files."""

import dataclasses
import itertools
import json
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import dense_tiny, moe_30b_a3b, moe_tiny
from launch.fit.axes import (
    add_bar,
    count_text,
    log_ticks,
    padded,
    power_text,
    round_levels,
    set_counts,
    set_flops,
    set_rates,
    shade_by,
)
from launch.fit.emit import config_file
from launch.fit.experts import experts_drawing, size_groups
from launch.fit.figures import (
    Best,
    Points,
    Words,
    contour_drawing,
    isoflop_drawing,
)
from launch.fit.prediction import notes, size_name, table_configs
from launch.fit.results import (
    HeldOut,
    Results,
    align,
    as_json,
    as_text,
    held_out_text,
    left_out_lines,
    optimum_table,
)
from launch.plotting import THEMES, Colours, Drawing, paint_figure, place_legend, style
from moe.config import ConfigError, RunConfig
from moe.scaling.experiments.optimum import Optimum
from moe.scaling.experiments.runs import Runs, make_runs
from moe.scaling.laws import LAWS
from moe.scaling.laws.isoflop import Curve


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12"), (999.6, "1K"), (1500, "1.5K"), (999_999, "1M"), (7e9, "7B"), (2.5e13, "25T")],
)
def test_counts_are_written_as_people_say_them(value: float, text: str) -> None:
    assert count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e19, "10¹⁹"), (3e19, "3×10¹⁹"), (9.99e18, "10¹⁹"), (0.02, "2×10⁻²"), (1.5, "1.5×10⁰")],
)
def test_powers_of_ten_are_written_without_markup(value: float, text: str) -> None:
    assert power_text(value) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 11, [1, 2, 3, 5, 7, 10]),
        (1, 1000, [1, 3, 10, 30, 100, 300, 1000]),
        (1, 1e12, [1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12]),
    ],
)
def test_ticks_are_few_and_round(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("decades", [0.5, 0.9, 1.2, 1.4, 2, 3, 5, 12])
@pytest.mark.parametrize("start", [1.1, 4, 9])
@pytest.mark.parametrize(
    ("set_axis", "scale"), [(set_counts, 1e5), (set_flops, 1e12), (set_rates, 1e-5)]
)
def test_texts_of_horizontal_ticks_do_not_touch(
    set_axis: Any, scale: float, start: float, decades: float
) -> None:
    """Half a digit is between them, also in a figure whose bar of shades takes room."""
    low = start * scale
    ends = (low, low * 10**decades)

    def paint(axes: Axes, colours: Colours) -> None:
        set_counts(axes.yaxis, "tokens", 1e6, 1e9)
        add_bar(axes, shade_by(colours, np.array(ends)), "training FLOPs", power_text)
        set_axis(axes.xaxis, "size", *ends)

    axes, *_ = painted(Drawing("x", "x", paint)).axes
    texts = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(texts) >= 2
    boxes = sorted(label.get_window_extent().extents[[0, 2]].tolist() for label in texts)
    half_a_digit = 0.3 * 9.5 / 72 * axes.figure.dpi
    for (_, end), (begin, _) in itertools.pairwise(boxes):
        assert begin - end > half_a_digit


@pytest.mark.parametrize("name", sorted({size_name(law) for law in LAWS.values()}))
def test_a_name_of_sizes_is_no_longer_than_its_axis(name: str) -> None:
    """A longer one reaches the legend, or is cut."""

    def paint(axes: Axes, colours: Colours) -> None:
        set_counts(axes.yaxis, name, 1e6, 1e9)
        set_flops(axes.xaxis, "training FLOPs", 1e12, 1e15)
        axes.plot([], [], label="run")
        axes.plot([], [], label="the law")
        place_legend(axes)

    axes, *_ = painted(Drawing("x", "x", paint)).axes
    assert axes.yaxis.label.get_window_extent().height < axes.get_window_extent().height


def test_one_value_still_has_an_axis() -> None:
    low, high = padded(np.array([5.0, 5.0]))
    assert 0 < low < 5 < high


def test_levels_are_round_and_within_the_range() -> None:
    levels = round_levels(2.03, 7.4)
    assert levels == sorted(set(levels)) and 5 < len(levels) <= 12
    assert all(level == round(level, 1) for level in levels)


def test_runs_of_nearly_one_size_share_a_line() -> None:
    sizes = np.array([100.0, 103, 200, 106, 210])
    tokens = np.array([1e9, 1e9, 1e9, 2e9, 1e9])
    groups = [sorted(group.tolist()) for group in size_groups(sizes, tokens)]
    assert sorted(groups) == [[0, 1], [2, 4], [3]]


def points(**columns: Any) -> Points:
    values = {"tokens": 1e9, "flops": 1e18} | columns
    count = len(columns["parameters"])
    return Points(**{name: np.broadcast_to(value, count) + 0.0 for name, value in values.items()})


def painted(drawing: Drawing) -> Figure:
    with matplotlib.rc_context(style(THEMES["light"])):
        figure = paint_figure(drawing, THEMES["light"])
        figure.draw_without_rendering()
    return figure


def drawn_lines(drawing: Drawing) -> list[tuple[np.ndarray, np.ndarray]]:
    axes, *_ = painted(drawing).axes
    lines = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in lines]


def mixtures(**columns: Any) -> Runs:
    """Returns two sizes of models with 1, 4 and 16 experts, each of half of a dense model."""
    experts, dense = np.array([1, 4, 16] * 2), np.repeat([1e6, 8e6], 3)
    values = {"parameters": dense * (experts + 1) / 2, "active_parameters": dense}
    values |= {"tokens": np.full(6, 1e9), "loss": 4 * experts**-0.1, "experts": experts}
    return make_runs(**values | columns)


def test_the_law_over_experts_is_curved_between_the_runs() -> None:
    """It is a line for each size, and reads columns that depend on the number of experts."""
    law = lambda runs: 9 * runs.parameters**-0.1 + 1 - runs.sparsity
    runs = mixtures()
    drawing = experts_drawing(runs, runs.active_parameters, "active parameters", law, "loss")
    lines = drawn_lines(drawing)
    assert len(lines) == 2
    for (x, y), size in zip(lines, (1e6, 8e6), strict=True):
        np.testing.assert_allclose(y, 9 * (size * (x + 1) / 2) ** -0.1 + 1 / x)
        assert (x[0], x[-1]) == (1, 16) and np.max(np.diff(np.log(x))) < 0.1
    axes, *_ = painted(drawing).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]


def test_each_granularity_has_a_line_that_begins_at_the_dense_model() -> None:
    runs = mixtures(
        experts=[1, 4, 16, 1, 16, 64],
        experts_per_token=[1, 1, 1, 1, 4, 4],
        granularity=[1, 1, 1, 1, 4, 4],
        active_parameters=np.full(6, 1e6),
    )
    law = lambda runs: 9 * runs.experts**-0.1
    lines = drawn_lines(experts_drawing(runs, runs.active_parameters, "size", law, "loss"))
    assert [(x[0], x[-1]) for x, _ in lines] == [(1, 16), (1, 64)]


@pytest.mark.parametrize("loss", [lambda n, d: 0 * n + 3, lambda n, d: 2 + n**-0.3 + d**-0.3])
def test_lines_of_equal_loss_are_drawn_where_there_are_any(loss: Any) -> None:
    sizes, tokens = np.array([1e6, 1e7, 1e8]), np.array([1e9, 1e9, 1e10])
    predicted = loss(sizes, tokens)
    drawn = points(parameters=sizes, tokens=tokens, loss=predicted, predicted=predicted)
    nothing = Best(*np.zeros((1, 0)), *np.zeros((3, 0, 3)))
    axes, *_ = painted(contour_drawing(loss, drawn, nothing, nothing, Words())).axes
    assert axes.get_xlabel() == "parameters" and axes.get_ylabel() == "tokens"


def test_the_losses_on_the_lines_do_not_cover_each_other() -> None:
    """The law is that of the runs of Porian et al., whose lines are close where tokens are few."""
    loss = lambda n, d: 3.131 + 21_180 / n**0.6298 + 860_300 / d**0.7085
    sizes, tokens = (mesh.ravel() for mesh in np.meshgrid([5e6, 1e8, 9e8], [2e7, 1e9, 3e10]))
    predicted = loss(sizes, tokens)
    drawn = points(parameters=sizes, tokens=tokens, loss=predicted, predicted=predicted)
    nothing = Best(*np.zeros((1, 0)), *np.zeros((3, 0, 3)))
    axes, *_ = painted(contour_drawing(loss, drawn, nothing, nothing, Words())).axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= 8
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize(("worst", "above"), [(3.25, ""), (5.0, " (1 above)")])
def test_runs_above_the_parabolas_are_counted(worst: float, above: str) -> None:
    """They have no room there: the axis ends a little above the runs near the minima."""
    sizes, losses = np.array([1e6, 2e6, 4e6, 6e7, 9e7]), np.array([3.2, 3.0, 3.2, 3.25, worst])
    parabola = np.polyfit(np.log(sizes[:3]), losses[:3], 2)[::-1]
    curve = Curve(1e18, sizes, 1e9 + 0 * sizes, losses, losses <= 3.2, parabola, 2e6, 1e9, 3.0, "")
    axes, *_ = painted(isoflop_drawing([curve], Words())).axes
    shown = sum(loss <= axes.get_ylim()[1] for loss in losses)
    assert shown == (4 if above else 5)
    labels = [line.get_label() for line in axes.lines]
    assert f"run far from the minimum{above}" in labels


@pytest.mark.parametrize("module", [dense_tiny, moe_tiny, moe_30b_a3b])
def test_an_emitted_config_is_the_config(module: Any) -> None:
    config = RunConfig.from_config_dict(module.get_config())
    text = config_file(config, "Trains something.\n")
    names: dict[str, Any] = {}
    exec(text, names)
    assert RunConfig.from_config_dict(names["get_config"]()) == config
    assert "config.tracking" not in text  # the defaults are left out


def results(**fields: Any) -> Results:
    values: dict[str, Any] = {
        "law": "chinchilla",
        "formula": "L = E",
        "source": "somebody",
        "table": "runs.csv",
        "table_sha256": "00",
        "loss_unit": "nats",
        "num_runs": 3,
        "num_rows": 4,
        "coefficients": [],
        "not_identifiable": [],
        "facts": ["It went well."],
        "held_out": None,
        "warnings": [],
        "left_out": [],
        "optima": [],
        "notes": [],
    }
    return Results(**values | fields)


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    held_out = HeldOut(1e20, ["a"], [2.0], [2.5], [float("nan")])
    written = json.loads(as_json(results(held_out=held_out)), parse_constant=pytest.fail)
    assert written["held_out"]["repeated"] == [None]


def test_runs_that_were_left_out_are_listed_by_reason() -> None:
    left_out = [(f"run {number}", "it diverged") for number in range(10)] + [("x", "it failed")]
    assert left_out_lines(left_out, most=2) == [
        "run 0, run 1 and 8 more: it diverged",
        "x: it failed",
    ]
    assert "run 0" in as_text(results(left_out=left_out))


def test_why_coefficients_are_not_determined_stands_before_the_warnings() -> None:
    text = as_text(results(not_identifiable=["alpha may be 0"], warnings=["narrow"]))
    assert text.index("The runs do not determine") < text.index("alpha may be 0")
    assert text.index("alpha may be 0") < text.index("Warnings") < text.index("narrow")


def test_the_held_out_budget_is_told_in_a_sentence() -> None:
    held_out = HeldOut(1e20, ["a", "b"], [2.0, 4.0], [2.02, 3.96], [2.2, 4.2])
    text = held_out_text(held_out)
    assert "mean error of 1 % over its 2 runs, and of 1 % at most" in text
    assert "Repeating the loss of the next smaller budget is wrong by 7.5 %." in text


def test_the_table_of_best_models_shows_experts_only_where_there_are_any() -> None:
    dense = {"size": 1e6, "parameters": 1e6, "active_parameters": 1e6, "tokens": 2e7, "loss": 3.0}
    dense["experts"] = 1.0
    sparse = dense | {"experts": 8.0, "sparsity": 0.75, "parameters": 4e6}
    for best, has_experts in ((dense, False), (sparse, True)):
        optimum = Optimum(1e14, best, {name: (value, value) for name, value in best.items()}, 0.0)
        head, (row,) = optimum_table([optimum])
        assert ("experts" in head) == ("active" in head) == has_experts
        assert len(head) == len(row) and row[0] == "10¹⁴" and "3.0000" in row


def optimum(**best: float) -> Optimum:
    values = {"parameters": 1e6, "tokens": 2e7, "loss": 3.0} | best
    return Optimum(1e14, values, {name: (value, value) for name, value in values.items()}, 0.0)


def test_notes_say_what_is_doubtful_about_a_best_model() -> None:
    columns = {"parameters": [1e5, 1e6], "tokens": [1e6, 2e6], "flops": [1e12, 1.1e13]}
    runs = make_runs(**columns)
    said = lambda best, runs=runs, known=True: " ".join(notes([best], [None], runs, known))
    assert (
        said(optimum()) == "Models are dense, of any size, at 6 FLOPs for each parameter and token."
    )
    assert "Do not plan" in said(optimum(), known=False)
    far = dataclasses.replace(optimum(), budget=1.1e15)
    assert "costs 100 times the largest one" in said(far)
    assert "costs 2×10¹⁵ times the largest" in said(dataclasses.replace(far, budget=2.2e28))
    near, below = (dataclasses.replace(far, budget=budget) for budget in (2e11, 1e10))
    assert "costs" not in said(near) and "costs 1/100 of the smallest one" in said(below)
    assert "5% of the" in said(dataclasses.replace(optimum(), at_edge=0.05))
    assert "no best size" in said(dataclasses.replace(optimum(), at_edge=1.0))
    repeated = make_runs(**columns, repeats=[1.0, 2.0])  # of 1e6 tokens
    assert "repeated 20 times" in said(optimum(), repeated)
    assert "repeated" not in said(optimum(tokens=3e6), repeated)
    sparse = make_runs(**columns, experts=[1, 16], experts_per_token=[1, 2])
    assert "16, are best" in said(optimum(experts=16.0), sparse)
    assert "are best" not in said(optimum(experts=8.0), sparse)
    assert "dense model is best: the law expects no gain" in said(optimum(experts=1.0), sparse)
    assert "dense model is best" not in said(optimum(experts=1.0)) + said(
        optimum(experts=8.0), sparse
    )


def test_only_configs_of_this_project_are_read() -> None:
    ours = json.dumps(RunConfig().to_dict())
    values = {"parameters": [1e6] * 4, "tokens": [1e7] * 4, "loss": [3.0] * 4}
    status = ["finished", "finished", "failed", "finished"]
    runs = make_runs(**values, status=status, config=[ours, "d=64", ours, ours])
    assert table_configs(runs, is_strict=True) == [RunConfig()]
    runs = make_runs(**values, config=[ours, "", "", '{"depth": 4}'])
    with pytest.raises(ConfigError, match="row 4: column config holds no config"):
        table_configs(runs, is_strict=True)
    # A table of Weights & Biases can be fitted, though its configs are not ours.
    assert table_configs(runs, is_strict=False) == []


def test_columns_are_aligned() -> None:
    assert align([["name", "x"], ["a", "10"], ["bcdef", "1"]]) == [
        "name    x",
        "-----  --",
        "a      10",
        "bcdef   1",
    ]
