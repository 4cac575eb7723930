"""Shows at a run's start what it runs on, and where it writes."""

import importlib.metadata
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from moe.config import RunConfig
from moe.training.progress import Stream

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint")


def show_first_lines(config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh) -> None:
    """Prints the versions, the devices, the mesh and the places of a run, on process 0 alone."""
    if jax.process_index() == 0:
        print(first_lines(config, workdir, mesh), file=Stream(sys.stderr), flush=True)


def first_lines(config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh) -> str:
    """Returns the text that `show_first_lines` prints."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    devices = list(mesh.devices.flat)
    kinds = Counter(device.device_kind for device in devices)
    counted = " and ".join(f"{number} x {kind}" for kind, number in kinds.items())
    num_processes = len({device.process_index for device in devices})
    where = f" of {num_processes} processes" if num_processes > 1 else ""
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    settings: Any = jax.config
    cache = settings.jax_compilation_cache_dir
    is_cached = cache and settings.jax_enable_compilation_cache
    return "\n".join(
        [
            f"versions: {', '.join([*versions, f'Python {platform.python_version()}'])}",
            f"devices:  {counted}{where}; mesh {sizes}",
            f"run:      {workdir if '://' in str(workdir) else workdir.absolute()}",
            f"rows:     {config.data.path}",
            f"compiled programs: {cache if is_cached else 'not cached'}",
        ]
    )
