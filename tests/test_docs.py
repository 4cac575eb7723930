"""What the pages of this repository link to and name exists: pages, files, commands and flags."""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.help_text import config_fields
from moe.config import RunConfig
from moe.config.layout import AXES
from tests.test_architecture import FLOOR

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}#{anchor}"


def test_every_page_of_docs_can_be_reached() -> None:
    """From the README, by links alone."""
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\((?!\w+:)([^)#\s]+\.md)", page.read_text())
        new += {(page.parent / link).resolve() for link in links} - reached
    assert {page for page in PAGES if page.parent != ROOT} <= reached


# Commands that a page shows, in code of either kind. A \ continues a line.
CODE = re.compile(r"^```.*?\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
FILES = re.compile(r"(?<![\w/$])(?:configs|docs|kernels|launch|moe|tests)/[\w./-]*\.\w+")
# What stands for a file of the reader.
EXAMPLES = {
    "configs/NAME.py",
    "configs/best.py",
    "configs/shared_expert.py",
    "configs/x.py",
    "kernels/grouped_matmul/NAME.py",
}


def code_of(page: Path) -> Iterator[str]:
    """Yields the lines of code of a page, and its code between words."""
    for match in CODE.finditer(page.read_text()):
        yield from (match[1] or match[2]).replace("\\\n", " ").splitlines()


@functools.cache
def flags_of(command: str) -> set[str]:
    """Returns the flags that the help of a command lists."""
    words = [sys.executable, "-m", f"launch.{command}", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"help", *re.findall(r"^  --([\w.]+)", done.stdout, re.MULTILINE)}


def commands_in(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each launch.NAME of a line of code, and the names of the flags behind it."""
    for part in re.split(r" -- |[;&|]", line):
        if match := re.search(r"(?:^|\s)launch\.(\w+)(?: (.*))?$", part.strip()):
            words = (match[2] or "").split(" #")[0]
            yield match[1], re.findall(r"(?:^|\s)\"?--([\w.-]+)", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_their_flags_exist(page: Path) -> None:
    fields = {name for name, _ in config_fields(RunConfig())}
    for line in code_of(page):
        for command, flags in commands_in(line):
            if command == "COMMAND":
                continue
            unknown = [flag for flag in flags if flag not in flags_of(command) | fields]
            assert not unknown, f"{page.name}: {line}"


def test_the_table_of_rooms_has_every_floor_folder_and_file() -> None:
    page = (ROOT / "docs/design.md").read_text()
    floors = {}
    for floor, names, text in re.findall(r"^\| (\d|ground) \| (.+?) \| (.+) \|$", page, re.M):
        for room in re.findall(r"`(\w+)(?:/|\.py)`", names):
            floors[room] = -1 if floor == "ground" else int(floor)
            folder = ROOT / "moe" / room
            if folder.is_dir():
                named = set(re.findall(r"`(\w+(?:/|\.py))`", text))
                assert modules_in(folder, deep=False) <= named <= modules_in(folder, deep=True)
    assert floors == FLOOR


def modules_in(folder: Path, deep: bool) -> set[str]:
    """Returns the names of the folders (with a /) and modules in a folder; `deep` goes further."""
    paths = [path for path in folder.iterdir() if not path.name.startswith("__")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in paths}
    names = {name for name in names if name.endswith(("/", ".py"))}
    inner = [modules_in(path, deep) for path in paths if deep and path.is_dir()]
    return names.union(*inner)


def test_the_sample_of_a_start_names_every_axis_of_the_mesh() -> None:
    sizes = re.search(r"^devices: .*; mesh (.*)$", (ROOT / "docs/launching.md").read_text(), re.M)
    assert sizes and re.findall(r"(\w+)=\d+", sizes[1]) == list(AXES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page: Path) -> None:
    for line in code_of(page):
        named = set(FILES.findall(line)) - EXAMPLES
        missing = [path for path in named if not (ROOT / path).exists()]
        assert not missing, f"{page.name}: {line}"
