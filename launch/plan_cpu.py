"""Describes this machine's CPU as a chip, by measuring it."""

import dataclasses
import math
import os
from typing import Any

from launch.benchmark import benchmark
from moe.config import MeshConfig, RunConfig
from moe.parallel.devices import check_platforms
from moe.scaling.flops import run_training_flops
from moe.scaling.hardware import Chip, machine_memory
from moe.scaling.roofline import memory_traffic

TRIALS = 5


def measure_cpu() -> Chip:
    """Returns this machine as a chip, from the rate of a matmul and a step of `dense_tiny`."""
    from configs import dense_tiny

    config = RunConfig.from_config_dict(dense_tiny.get_config())
    config = dataclasses.replace(config, mesh=MeshConfig())
    check_platforms(os.environ)
    return cpu_chip(config, benchmark(config, TRIALS))


def cpu_chip(config: RunConfig, measured: dict[str, Any]) -> Chip:
    """Returns the chip that explains what `launch.benchmark` measured of a config.

    Its peak is the rate of the matmul. What the step took beside its FLOPs at this rate is put down
    to the bytes that it moves, so the bandwidth is the one number that is fitted.
    """
    tokens = config.train.batch_size * config.data.sequence_length
    flops, peak = tokens * run_training_flops(config), measured["matmul_flops_per_second"]
    # The ratio is a median of pairs, which a busy machine disturbs less than it does the times.
    computing = flops / peak
    moving = computing * max(1 / measured["ratio_to_matmul"] - 1, 0.01)
    traffic = memory_traffic(config, MeshConfig(data=1), "cpu")
    return Chip(
        name="cpu",
        device_kind="cpu",
        peak_flops=peak,
        memory_bytes=machine_memory(),
        memory_bandwidth=traffic / moving,
        link_bandwidth=math.inf,  # virtual devices share the machine's memory
        network_bandwidth=math.inf,
        devices_per_host=1,
        devices_per_slice=1,
        overlaps=False,
    )
