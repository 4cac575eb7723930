"""Lets all processes of a job stop after the same step, whichever of them was asked to stop."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe.config import ConfigError

# A run stops at least this many seconds before the end of its job. A short job cannot spare that
# much, so there it is this fraction of the job's time.
_SPARE_SECONDS = 120.0
_SPARE_FRACTION = 0.1


class Vote:
    """Asks all processes, once after each step, whether one of them was asked to stop.

    The devices add up the votes. The sum is read one step later, as the step's metrics are, so that
    the devices never wait for the host. A run of one process needs no sum, and stops at once.
    """

    def __init__(self, mesh: Mesh, asked: Callable[[], bool]):
        self._asked = asked
        devices = list(mesh.devices.flat)
        self._is_alone = len({device.process_index for device in devices}) == 1
        self._is_cpu = devices[0].platform == "cpu"
        self._pending: jax.Array | None = None
        if not self._is_alone:
            axes = PartitionSpec(mesh.axis_names)
            split, whole = NamedSharding(mesh, axes), NamedSharding(mesh, PartitionSpec())
            self._no, self._yes = (
                jax.make_array_from_callback(
                    (len(devices),),
                    split,
                    lambda index, number=number: np.full(len(devices), number, np.int32)[index],
                )
                for number in (0, 1)
            )
            self._sum = jax.jit(jnp.sum, out_shardings=whole)

    def stops(self, after: Any) -> bool:
        """Votes, and returns whether a process had voted to stop the time before.

        All processes call this at the same points. `after` is what the newest program returns.
        """
        if self._is_alone:
            return self._asked()
        if self._is_cpu:
            # A CPU runs programs at the same time, and Gloo would mix up their messages.
            jax.block_until_ready(after)
        before, self._pending = self._pending, self._sum(self._yes if self._asked() else self._no)
        if self._is_cpu:
            jax.block_until_ready(self._pending)
        return before is not None and int(before) > 0

    def has_stopped(self, after: Any) -> bool:
        """Returns whether any process was asked to stop until now, and waits for the answer."""
        return self.stops(after) | self.stops(after)


def asks_to_stop(
    interrupted: Callable[[], bool],
    environment: Mapping[str, str],
    save_seconds: Callable[[], float],
) -> Callable[[], bool]:
    """Returns a function that tells whether a signal, or SLURM's time limit, asks a run to stop.

    `save_seconds` says how long the longest save has taken until now.
    """
    if time_to_stop(environment) is None:
        return interrupted
    has_warned = False

    def asked() -> bool:
        nonlocal has_warned
        end = time_to_stop(environment, save_seconds())
        if end is not None and time.time() > end and not has_warned:
            logging.warning("SLURM's time limit is near: stopping, and this step is saved first")
            has_warned = True
        return has_warned or interrupted()

    return asked


def time_to_stop(environment: Mapping[str, str], save_seconds: float = 0.0) -> float | None:
    """Returns when a run must stop so that it is saved before SLURM ends its job.

    The result is in seconds since 1970. It leaves twice the time of the longest save, but not more
    than half of the job's time, without which the run would never get further. The result is None
    where the job has no end.
    """
    times = []
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        value = environment.get(name, "")
        if value and not value.isdecimal():
            raise ConfigError(f"{name}={value} is not a number of seconds since 1970: unset it")
        times.append(int(value or 0))
    start, end = times
    if not end:
        return None
    length = end - start if start else math.inf
    spare = max(min(_SPARE_SECONDS, _SPARE_FRACTION * length), 2 * save_seconds)
    return end - min(spare, length / 2)
