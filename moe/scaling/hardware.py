"""Says what chips can do, by their data sheets, and measures what the attached device does.

JAX is imported only where a device is measured, so that a plan for chips that are not here needs
none.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from moe.config import ConfigError

if TYPE_CHECKING:  # jax.Device is a variable at run time, which is no type for a checker
    from jaxlib._jax import Device


Platform = Literal["cpu", "gpu", "tpu"]


def device_platform(device_kind: str) -> Platform:
    """Returns the platform of devices of a kind."""
    if device_kind.startswith("TPU"):
        return "tpu"
    return "cpu" if device_kind == "cpu" else "gpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describes one device of a kind, as JAX counts devices: half a chip on TPU7x.

    Bandwidths are bytes per second in one direction, of all links of a device together.
    """

    name: str  # as --chip takes it
    device_kind: str  # the name that jax.Device.device_kind has for it
    peak_flops: float  # FLOP/s of dense bfloat16 matmuls, without sparsity
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # to the other devices of a slice: of a host of GPUs, of a TPU's pod
    network_bandwidth: float  # to devices of other slices
    devices_per_host: int
    devices_per_slice: int  # the most devices that the fast links connect
    # True lets computing, memory and network work at the same time, which bounds what a step can
    # reach. A CPU is described by measuring it, and there they follow one another.
    overlaps: bool = True

    @property
    def platform(self) -> Platform:
        """Returns what JAX calls the platform of the chip."""
        return device_platform(self.device_kind)


# NVIDIA: the data sheets of H100 SXM and H200 SXM (NVLink: 900 GB/s in both directions together),
# and of the DGX systems that hold eight of them, which have a port of 400 Gb/s for each GPU.
# Google: the pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of the Cloud TPU documentation
# (interconnect: half of the bidirectional figure; network: the data center network of a chip, for
# v5e two ports of 100 Gb/s for the 8 chips of a host). JAX sees each of a TPU7x's two chiplets as a
# device, so its numbers are half of a chip's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h200", "NVIDIA H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8, 8),
        Chip("h100", "NVIDIA H100 80GB HBM3", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8, 8),
        Chip("v5e", "TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, 4, 256),
        Chip("v5p", "TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, 4, 8960),
        Chip("v6e", "TPU v6 lite", 918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9, 4, 256),
        Chip("tpu7x", "TPU7x", 1153.5e12, 96 * 2**30, 3690e9, 300e9, 6.25e9, 8, 18432),
    )
}

# The FLOP/s of one device, by its kind. No plan is made for those that stand here alone.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    **{chip.device_kind: chip.peak_flops for chip in CHIPS.values()},
}


def find_chip(name: str) -> Chip:
    """Returns the chip of a name. Raises ConfigError for one that the table does not have."""
    if name not in CHIPS:
        raise ConfigError(f"--chip={name} is no chip of the table: set it to {', '.join(CHIPS)}")
    return CHIPS[name]


def peak_flops(devices: "Sequence[Device]") -> float | None:
    """Returns the FLOP/s of which MFU is a fraction: the sum of the data sheets' bfloat16 rates.

    It is None if a device has no such rate, as a CPU. A measured rate would be no peak: if anything
    slowed the measurement down, a step could be faster.
    """
    if not all(device.device_kind in PEAK_FLOPS for device in devices):
        return None
    return sum(PEAK_FLOPS[device.device_kind] for device in devices)


def machine_memory() -> int:
    """Returns the memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_bytes(device: "Device") -> int:
    """Returns the memory of a device that JAX may use.

    For a CPU this is the memory of the whole machine, which its virtual devices share.
    """
    stats = device.memory_stats() or {}  # a CPU has no statistics
    return stats.get("bytes_limit", machine_memory())


def matmul_flops(device: "Device", dtype: str, size: int, trials: int) -> float:
    """Measures the FLOP/s of a size³ matmul on one device, as the median of `trials`."""
    import jax
    import jax.numpy as jnp

    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
