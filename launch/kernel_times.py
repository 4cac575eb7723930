"""Sums up the time of each kernel of a step, from a trace of JAX's profiler."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS = 2  # that are traced

# Operations of a CPU's program that run others, whose times stand in the trace as well.
_CALLERS = ("while", "call", "conditional")


def kernel_times(run: Callable[[], None]) -> list[dict[str, Any]]:
    """Returns the name, milliseconds and calls of each kernel of a step, the longest first.

    `run` takes a step and waits for its end. Times are those of one device, the average of all.
    Kernels that run at the same time are each counted whole.
    """
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                run()
        [path] = Path(directory).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    return sum_events(planes)


def sum_events(planes: list[Any]) -> list[dict[str, Any]]:
    """Returns what `kernel_times` does, from the planes of a trace."""
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    times: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    found = 0
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        events = list(_kernels(plane))
        found += bool(events)
        for name, nanoseconds in events:
            times[name] += nanoseconds
            calls[name] += 1
    traced = STEPS * max(1, found)
    return [
        {"name": name, "ms": time / 1e6 / traced, "calls": calls[name] / traced}
        for name, time in times.most_common()
    ]


def _kernels(plane: Any) -> Iterator[tuple[str, float]]:
    """Yields the name and the nanoseconds of each kernel that ran on a device.

    A GPU has a line for each of its streams, and a TPU one for its operations. Of a CPU's threads,
    those events are kernels that name an operation of a program.
    """
    on_device = plane.name.startswith("/device:")
    for line in plane.lines:
        if on_device and not line.name.startswith(("Stream", "XLA Ops")):
            continue
        for event in line.events:
            is_caller = event.name.startswith(_CALLERS)
            if on_device or ("hlo_op" in dict(event.stats) and not is_caller):
                yield event.name, event.duration_ns
