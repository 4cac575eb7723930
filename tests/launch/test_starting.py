"""A command that is started in the wrong way says in one line how to start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*arguments: str, cwd: Path = ROOT) -> tuple[str, str, int]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize(
    "command",
    sorted(
        path.stem
        for path in (ROOT / "launch").glob("*.py")
        if "command_line.run(" in path.read_text()
    ),
)
def test_a_command_without_its_packages_says_where_they_are(command: str) -> None:
    output, error, code = run("-S", "-m", f"launch.{command}")
    assert (output, code) == ("", 2)
    assert error == (
        f"error: {sys.executable} has no package 'absl': "
        "run make train once, or install requirements.txt\n"
    )


def test_a_wrong_python_is_pointed_to_the_one_of_make(tmp_path: Path) -> None:
    package = tmp_path / "launch"
    package.mkdir()
    for name in ("__init__.py", "large_pages.py"):
        (package / name).write_text((ROOT / "launch" / name).read_text())
    (package / "train.py").write_text("import absl\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    _, error, code = run("-S", "-m", "launch.train", cwd=tmp_path)
    assert (error, code) == (
        f"error: {sys.executable} has no package 'absl': run {python} -m launch.COMMAND\n",
        2,
    )


@pytest.mark.parametrize("cwd", ["/", str(ROOT)])
def test_a_command_started_by_its_path_says_how_to_start_it(cwd: str) -> None:
    output, error, code = run(str(ROOT / "launch" / "train.py"), "--help", cwd=Path(cwd))
    assert (output, code) == ("", 2)
    assert error == (
        f"error: {ROOT}/launch/train.py is part of a package: "
        f"run python -m launch.train in {ROOT}\n"
    )


def test_importing_launch_checks_nothing() -> None:
    assert run("-S", "-c", "import launch, launch.launch") == ("", "", 0)
