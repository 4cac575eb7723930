"""The command lines, one small file for each: python -m launch.train --help."""

import importlib.util
import sys
from pathlib import Path


def _check_packages() -> None:
    """Ends a command whose packages are not there with one line, where an import would end it with its frames."""
    missing = [name for name in ("absl", "ml_collections", "jax", "flax") if not importlib.util.find_spec(name)]
    if missing:
        python = Path(__file__).parents[1] / ".venv" / "bin" / "python"
        there = python.exists() and not sys.executable.startswith(str(python.parent))
        fix = f"run {python} -m launch.COMMAND" if there else "run make train once, or install requirements.txt"
        print(f"error: {sys.executable} has no package {missing[0]!r}: {fix}", file=sys.stderr)
        sys.exit(2)


if sys.argv[:1] == ["-m"]:  # Python is about to run one of the files as a command, and will put its path here
    _check_packages()
