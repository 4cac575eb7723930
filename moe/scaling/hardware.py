"""What a chip can do, to hold a program's FLOPs per second against, and how much it has room for."""

import os
import statistics
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one chip as jax.Device.device_kind names it, from the vendors' data
# sheets (without sparsity).
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


def peak_flops(devices: list[jax.Device]) -> float | None:
    """The FLOP/s that MFU is a fraction of: the data sheets' bfloat16 rates added up, or None where
    a device has none.

    A rate that is measured, as a CPU's would have to be, is no peak: whatever slowed the
    measurement can let a step exceed it.
    """
    if not all(device.device_kind in PEAK_FLOPS for device in devices):
        return None
    return sum(PEAK_FLOPS[device.device_kind] for device in devices)


def memory_bytes(device: jax.Device) -> int:
    """The memory that JAX may take of a device; for a CPU all of the machine's, which its virtual
    devices share.
    """
    stats = device.memory_stats() or {}  # a CPU has none
    return stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def matmul_flops(device: jax.Device, dtype: str, size: int = 2048, trials: int = 5) -> float:
    """The FLOP/s of a size³ matmul on one device, in this process: the median of `trials`."""
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    multiply = jax.jit(jnp.dot)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
