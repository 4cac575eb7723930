"""What all figures share: the one file that calls matplotlib, and the axes and legends it makes."""

import ast
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from launch.plotting import (
    THEMES,
    Colours,
    Drawing,
    picture_html,
    set_values,
    shorten,
    write_drawing,
)
from launch.report_plots import group_plots, plot_drawing
from launch.series import Series

LAUNCH = Path(__file__).parents[2] / "launch"


def matplotlib_imports(tree: ast.AST) -> list[str]:
    """The modules of matplotlib that code imports when it runs, not for its types alone."""
    typed = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    names = []
    for node in ast.walk(tree):
        if node not in typed and isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif node not in typed and isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return [name for name in names if name.split(".")[0] == "matplotlib"]


def test_commands_share_the_files_that_call_matplotlib() -> None:
    trees = {path.name: ast.parse(path.read_text()) for path in LAUNCH.glob("*.py")}
    found = {name for name, tree in trees.items() if matplotlib_imports(tree)}
    assert found == {"plotting.py", "comparison_plots.py"}


def test_matplotlib_is_not_loaded_before_something_is_drawn() -> None:
    tree = ast.parse((LAUNCH / "plotting.py").read_text())
    loaded = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert matplotlib_imports(ast.Module(loaded, [])) == []


def test_a_figure_is_a_file_for_each_theme_and_its_title_is_escaped(tmp_path: Path) -> None:
    drawing = Drawing("x", '<b>"', lambda axes, colours: None)
    write_drawing(drawing, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x-dark.png", "x-light.png", "x.pdf"]
    assert 'alt="&lt;b&gt;&quot;"' in picture_html(drawing)


def test_a_figure_for_a_paper_is_the_same_bytes_at_any_time(tmp_path: Path) -> None:
    """It holds no date, and its fonts are TrueType, which journals ask for."""

    def paint(axes: Axes, colours: Colours) -> None:
        axes.plot([1, 2], [3, 4], label="a line")
        axes.legend()

    drawn = []
    for _ in range(2):
        write_drawing(Drawing("x", "A title", paint), tmp_path)
        drawn.append((tmp_path / "x.pdf").read_bytes())
    first, second = drawn
    assert first == second and first.startswith(b"%PDF")
    assert b"Date" not in first and b"/Type3" not in first and b"/CIDFontType2" in first


def test_a_long_name_loses_its_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcde…hijk"


@pytest.mark.parametrize(
    ("values", "log", "scale"),
    [
        ([1.0, 100.0], True, "log"),
        ([1.0, 100.0], False, "linear"),
        ([2.0, 2.0], True, "linear"),  # a logarithmic axis would show decades around one value
        ([-1.0, -2.0], True, "linear"),
        ([], True, "linear"),
    ],
)
def test_the_axis_is_logarithmic_where_that_shows_something(
    values: list[float], log: bool, scale: str
) -> None:
    axes = Figure().subplots()
    set_values(axes, np.array(values), log=log)
    assert axes.get_yscale() == scale


def lines_of(name: str, steps: np.ndarray, values: np.ndarray) -> list[Line2D]:
    """Returns the lines of the report's figure of one metric."""
    metrics = {name: Series(steps, values)}
    (plot,) = group_plots(metrics)["Training"]
    axes = Figure().subplots()
    plot_drawing(plot, metrics, int(steps[-1])).paint(axes, THEMES["light"])
    return list(axes.lines)


def test_the_learning_rate_is_drawn_as_it_was_logged() -> None:
    """A run that is resumed with more steps jumps back to a higher rate, and medians blur that."""
    steps = np.arange(5, 405, 5)
    rate = np.where(steps <= 120, 0.003 * (1 - steps / 125), 0.003 * (1 - steps / 405))
    (line,) = lines_of("train/learning_rate", steps, rate)
    np.testing.assert_array_equal(line.get_xdata(), steps)
    np.testing.assert_array_equal(line.get_ydata(), rate)
    faint, medians = lines_of("train/gradient_norm", steps, rate)
    assert faint.get_alpha() == 0.35 and len(np.asarray(medians.get_xdata())) < len(steps)


def test_a_single_value_is_a_dot_that_can_be_seen() -> None:
    """No line leads to it, and it may lie at the edge of the axes, as before the first step."""
    (dot,) = lines_of("validation/bits_per_byte", np.array([0]), np.array([4.2]))
    assert dot.get_marker() == "o" and dot.get_markersize() >= 6 and not dot.get_clip_on()
