"""Says which version of the code runs, so that results tell what computed them."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from moe.workdir.tracking import git_state

_MOE = Path(__file__).resolve().parents[1]


@functools.cache
def code_version() -> str:
    """Returns the git commit of this library, or its version where no checkout tracks it.

    A hash of the sources follows unless the commit says everything, as with no changes since then.
    """
    state = git_state(Path(__file__).resolve())
    if state and not state["dirty"]:
        return state["commit"][:12]
    return f"{state['commit'][:12] if state else _package_version()}+{_hash_sources()}"


def _package_version() -> str:
    try:
        return importlib.metadata.version("moe-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _hash_sources() -> str:
    """Returns a hash of the files of moe/, those of its linked kernels included."""
    digest = hashlib.sha256()
    folders = (_MOE, (_MOE / "kernels").resolve())
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]
