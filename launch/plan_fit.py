"""Checks before a run compiles anything that its step can fit the devices."""

import dataclasses

import jax

from launch.plan_text import GIB, fix_line
from moe.config import ConfigError, RunConfig
from moe.scaling.hardware import CHIPS, device_platform, memory_bytes
from moe.scaling.layouts import cheapest_fit
from moe.scaling.memory import MARGIN, step_bytes


def check_fit(config: RunConfig) -> None:
    """Raises ConfigError if the step of a run cannot fit the memory of the attached devices.

    What the count may be wrong by is left to the step. On a CPU virtual devices share the memory of
    the machine.
    """
    device = jax.local_devices()[0]
    sharers = jax.local_device_count() if device.platform == "cpu" else 1
    room = memory_bytes(device) / sharers
    mesh = config.mesh.resolve(jax.device_count())
    memory = step_bytes(config, mesh, device_platform(device.device_kind))
    if (1 - MARGIN) * memory.total <= room:
        return
    kinds = {chip.device_kind: chip for chip in CHIPS.values()}
    chip = kinds.get(device.device_kind, CHIPS["h200"])  # it only orders the changes by their time
    known = dataclasses.replace(chip, device_kind=device.device_kind, memory_bytes=room)
    change = cheapest_fit(config, mesh, known)
    raise ConfigError(
        f"config takes about {memory.total / GIB:.1f} GiB on each device, which has "
        f"{room / GIB:.1f} GiB; {fix_line(memory, change)} (--force starts it all the same)"
    )
