"""Tells somebody who has started a command by its path, python launch/train.py, how to start it.

Python then searches the folder launch/ itself for modules, instead of the folder above it, so that
`import launch` finds this file and not the package. Hence its name and its place.
"""

import sys
from pathlib import Path

if __name__ == "launch":  # imported within the package it is launch.launch, and does nothing
    command, root = Path(sys.argv[0]).stem, Path(__file__).parents[1]
    print(
        f"error: {sys.argv[0]} is part of a package: run python -m launch.{command} in {root}",
        file=sys.stderr,
    )
    sys.exit(2)
