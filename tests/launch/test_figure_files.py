"""Figures that a command no longer draws go, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import figure_files
from launch.figure_files import LIST_FILE, write_drawings
from launch.plotting import Drawing
from launch.report import report
from tests.launch.report_runs import images, make_run

A, B, C = (Drawing(stem, stem, lambda axes, colours: None) for stem in "abc")


def stems(directory: Path) -> str:
    """Returns the stems of the figures in a directory, of which each has all its files."""
    found = {path.name for path in directory.iterdir()} - {LIST_FILE}
    figures = sorted({name.removesuffix(".pdf") for name in found if name.endswith(".pdf")})
    wanted = {f"{stem}{end}" for stem in figures for end in ("-light.png", "-dark.png", ".pdf")}
    assert found == wanted
    return "".join(figures)


def test_a_figure_of_an_earlier_call_is_removed(tmp_path: Path) -> None:
    write_drawings([A, B], tmp_path)
    write_drawings([B, C], tmp_path)
    assert stems(tmp_path) == "bc"
    write_drawings([A], tmp_path, keep_others=True)
    assert stems(tmp_path) == "abc"
    write_drawings([], tmp_path)
    assert stems(tmp_path) == ""


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    for name in ("mine-light.png", "paper.pdf", "notes.md"):
        (tmp_path / name).write_text("mine")
    write_drawings([A], tmp_path)
    write_drawings([B], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"mine-light.png", "paper.pdf", "notes.md", "b.pdf"} and "a.pdf" not in names


def test_after_a_kill_the_next_call_removes_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_drawings([A], tmp_path)

    class Killed(BaseException):
        pass

    def write_one(drawing: Drawing, directory: Path) -> None:
        write(drawing, directory)
        raise Killed

    write = figure_files.write_drawing
    monkeypatch.setattr(figure_files, "write_drawing", write_one)
    with pytest.raises(Killed):
        write_drawings([B, C], tmp_path)
    monkeypatch.undo()
    write_drawings([C], tmp_path)
    assert stems(tmp_path) == "c"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "{}",
        "null",
        '["../mine.png", "..", "x/../../mine.png", "notes.md", 3, "\\u0000.png"]',
    ],
)
def test_a_list_that_says_something_else_removes_nothing(tmp_path: Path, content: str) -> None:
    directory = tmp_path / "page"
    directory.mkdir()
    for path in (tmp_path / "mine.png", directory / "notes.md"):
        path.write_text("mine")
    (directory / LIST_FILE).write_text(content)
    write_drawings([A], directory)
    assert (tmp_path / "mine.png").exists() and (directory / "notes.md").exists()
    assert len(json.loads((directory / LIST_FILE).read_text())) == 3


def test_a_page_of_a_run_has_no_figures_of_an_earlier_one(tmp_path: Path) -> None:
    before: dict[str, Any] = {"train/loss": 2.5, "train/other": 1.0}
    report(make_run(tmp_path, [(10, before)]))
    assert len(images(tmp_path)) == 4
    report(make_run(tmp_path, [(10, {"train/loss": 2.5})]))
    assert images(tmp_path) == {"loss-dark.png", "loss-light.png"}
    assert {path.name for path in (tmp_path / "report").glob("*.pdf")} == {"loss.pdf"}
