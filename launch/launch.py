"""What `import launch` finds where a command was started by its path, python launch/train.py: the
folder itself, and not its parent.
"""

import sys
from pathlib import Path

if __name__ == "launch":
    command, root = Path(sys.argv[0]).stem, Path(__file__).parents[1]
    print(
        f"error: {sys.argv[0]} is part of a package: run python -m launch.{command} in {root}",
        file=sys.stderr,
    )
    sys.exit(2)
