"""Writes the figures of a page, and removes those that an earlier call has written beside it.

The file figures.json in the directory names the figures that commands have written there. Nothing
else is ever removed: a user may keep files of their own among them.
"""

import json
from collections.abc import Sequence
from pathlib import PurePath

from tqdm import tqdm

from launch.plotting import THEMES, Drawing, file_name, pdf_name, write_drawing
from moe.storage.paths import RunPath, write_whole

LIST_FILE = "figures.json"


def write_drawings(
    drawings: Sequence[Drawing], directory: RunPath, *, keep_others: bool = False
) -> None:
    """Writes figures as PNG and PDF files, and removes those that are not drawn any more.

    With `keep_others` the figures of earlier calls stay, until a later call removes them.
    """
    names = [name for drawing in drawings for name in file_names(drawing)]
    others = [name for name in read_names(directory) if name not in names]
    # The names come first: after a kill, the next call still knows every figure.
    _write_names(directory, [*others, *names])
    for drawing in tqdm(drawings, desc="drawing", unit="plot", disable=None, leave=False):
        write_drawing(drawing, directory)
    if not keep_others:
        for name in others:
            (directory / name).unlink(missing_ok=True)
        _write_names(directory, names)


def file_names(drawing: Drawing) -> list[str]:
    """Returns the names of all files of a figure."""
    return [*(file_name(drawing, theme) for theme in THEMES), pdf_name(drawing)]


def read_names(directory: RunPath) -> list[str]:
    """Returns the names of the figures that were written into a directory.

    A file that says something else names none: then figures of earlier calls stay.
    """
    try:
        names = json.loads((directory / LIST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    return [name for name in names if _is_figure(name)] if isinstance(names, list) else []


def _is_figure(name: object) -> bool:
    """Returns whether something names a file that can be a figure, in the directory itself."""
    if not isinstance(name, str) or not name.endswith((".png", ".pdf")):
        return False
    return PurePath(name).name == name and "\0" not in name


def _write_names(directory: RunPath, names: Sequence[str]) -> None:
    write_whole(directory / LIST_FILE, json.dumps(sorted(names), indent=1) + "\n")
