"""Times calls on the device at hand."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Key = TypeVar("Key")

# A call is started again and again for about so many seconds before the clock is read. A GPU takes
# half a millisecond to say that it has ended, which is as long as some calls take.
SECONDS_OF_TURN, MOST_CALLS = 0.03, 200


def median_seconds(calls: dict[Key, Callable[[], Any]], repeats: int) -> dict[Key, float]:
    """Returns the median time of each call, which has been compiled; they are taken in turns."""
    launches = {key: _launches(call) for key, call in calls.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(seconds(call, launches[key]))
    return {key: statistics.median(values) for key, values in times.items()}


def _launches(call: Callable[[], Any]) -> int:
    """Returns how often a call is started in a turn."""
    return max(1, min(MOST_CALLS, math.ceil(SECONDS_OF_TURN / seconds(call, 3))))


def seconds(call: Callable[[], Any], launches: int) -> float:
    """Returns the time of one call, of several that are started one after the other."""
    start = time.perf_counter()
    for _ in range(launches - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - start) / launches
