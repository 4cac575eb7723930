"""Says what a run runs on and where it writes, for the first lines of its output."""

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from moe.config import RunConfig
from moe.storage.paths import RunPath, absolute

_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint")


def first_lines(config: RunConfig, workdir: RunPath, mesh: jax.sharding.Mesh) -> str:
    """Returns the versions, the devices, the mesh and the places of a run, one a line."""
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
            f"run:      {absolute(workdir)}",
            f"rows:     {config.data.path}",
            f"compiled programs: {cache if is_cached else 'not cached'}",
        ]
    )


def source_line(source: Mapping[str, Any]) -> str:
    """Returns what a run reads of a source in one line, from a dict of `describe_sources`."""
    name = f"{source['name']}: " if source["name"] else ""
    limit = f" of at most {source['max_epochs']:g}" if source["max_epochs"] else ""
    line = (
        f"{name}{source['source']}, {source['split']}: {source['share']:.1%} of the examples, "
        f"{source['epochs']:.3g} epochs{limit} of {source['num_rows']:,} rows"
    )
    if source["fullness"] is not None:
        line += f" ({source['fullness']:.1%} full, {source['num_cut']:,} documents cut)"
    return line
