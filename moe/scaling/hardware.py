"""Says how many FLOPs per second a chip can do, and how much memory a device has."""

import os
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # jax.Device is a variable at run time, which is no type for a checker
    from jaxlib._jax import Device

# Dense bfloat16 FLOP/s of one chip, under the name that jax.Device.device_kind has for it. The
# numbers are those of the vendors' data sheets, without sparsity.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(devices: "Sequence[Device]") -> float | None:
    """Returns the FLOP/s of which MFU is a fraction: the sum of the data sheets' bfloat16 rates.

    It is None if a device has no such rate, as a CPU. A measured rate would be no peak: if anything
    slowed the measurement down, a step could be faster.
    """
    if not all(device.device_kind in PEAK_FLOPS for device in devices):
        return None
    return sum(PEAK_FLOPS[device.device_kind] for device in devices)


def memory_bytes(device: "Device") -> int:
    """Returns the memory of a device that JAX may use.

    For a CPU this is the memory of the whole machine, which its virtual devices share.
    """
    stats = device.memory_stats() or {}  # a CPU has no statistics
    return stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def matmul_flops(device: "Device", dtype: str, size: int = 2048, trials: int = 5) -> float:
    """Measures the FLOP/s of a size³ matmul on one device, as the median of `trials`."""
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
