"""What all figures share: the one file that calls matplotlib, and the axes and legends it makes."""

import ast
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from launch.plotting import Drawing, picture_html, set_values, shorten, write_drawing

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-dark.png", "x-light.png"]
    assert 'alt="&lt;b&gt;&quot;"' in picture_html(drawing)


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
