"""Names the slices of chips that programs are compiled for, without any of these chips.

JAX is not imported here.
"""

import importlib.util
from typing import NamedTuple

from moe.config import ConfigError
from moe.scaling.hardware import Chip

_FLAT = ("v5e", "v6e")  # the TPUs whose slices are tori of two dimensions instead of three
_MODULES = {"gpu": "jax_cuda13_plugin", "tpu": "libtpu"}
_LOWERING = {"gpu": "cuda", "tpu": "tpu"}  # the platforms' names when a program is lowered


class Target(NamedTuple):
    """Says what a program is compiled for."""

    platform: str  # as JAX's lowering names it: "cuda", "tpu" or "cpu"
    topology: str  # the slice, such as v5p:4x4x4; on CPUs the number of virtual devices
    label: str  # one line for people


def find_target(chip: Chip, num_devices: int) -> Target:
    """Returns the target for so many chips, or virtual CPU devices without the chips' compiler.

    Raises ConfigError for a number of chips that no slice has.
    """
    make_topology = _gpu_topology if chip.platform == "gpu" else _tpu_topology
    topology = make_topology(chip, num_devices)
    if importlib.util.find_spec(_MODULES[chip.platform]) is None:
        label = (
            f"compiled for CPU, as {num_devices} virtual devices: the compiler for {chip.name} is "
            "not installed (pip install '.[aot]')"
        )
        return Target("cpu", str(num_devices), label)
    label = f"compiled for {num_devices} {chip.name}, as {topology}"
    if chip.name == "h100":
        label += ", by the description of H200: only the memory differs"
    return Target(_LOWERING[chip.platform], topology, label)


def _gpu_topology(chip: Chip, num_devices: int) -> str:
    """Returns partitions x hosts x GPUs of a host, each of several hosts being full."""
    hosts, rest = divmod(num_devices, chip.devices_per_host)
    if hosts == 0:
        return f"1x1x{num_devices}"
    if rest:
        raise ConfigError(
            f"--devices={num_devices} is not a number of whole hosts: "
            f"set --devices to a multiple of {chip.devices_per_host}"
        )
    return f"1x{hosts}x{chip.devices_per_host}"


def _tpu_topology(chip: Chip, num_devices: int) -> str:
    """Returns the torus that is as near to a square or a cube as a power of two allows."""
    per_chip = 2 if chip.name == "tpu7x" else 1
    chips, most = num_devices // per_chip, chip.devices_per_slice // per_chip
    if num_devices % per_chip or not 4 <= chips <= most or chips & (chips - 1):
        raise ConfigError(
            f"--devices={num_devices} make no usual slice of {chip.name}: "
            f"set --devices to a power of two from {4 * per_chip} to {most * per_chip}"
        )
    num_dims = 2 if chip.name in _FLAT else 3
    doublings = chips.bit_length() - 1
    # The last dimensions are the longest, but a slice of 4 chips is written 2x2x1.
    sizes = [2 ** ((doublings + index) // num_dims) for index in range(num_dims)]
    sizes = sizes if chips > 4 else sorted(sizes, reverse=True)
    return f"{chip.name}:{'x'.join(map(str, sizes))}"
