"""Sums up the time of each kernel of a step, from a trace of JAX's profiler."""

import collections
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 2  # that are traced

# Operations that run others, whose times stand in the trace as well.
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
    times: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    devices = set()
    for kernel in itertools.chain.from_iterable(map(_kernels, planes)):
        devices.add(kernel.device)
        times[kernel.name] += kernel.nanoseconds
        calls[kernel.name] += 1
    traced = STEPS * max(1, len(devices))
    return [
        {"name": name, "ms": time / 1e6 / traced, "calls": calls[name] / traced}
        for name, time in sorted(times.items(), key=lambda item: -item[1])
    ]


class _Kernel(NamedTuple):
    """Holds a run of a kernel."""

    device: Any
    name: str
    nanoseconds: float


def _kernels(plane: Any) -> Iterator[_Kernel]:
    """Yields what ran on a plane's devices.

    A GPU has a line for each of its streams, and a TPU one for its operations. Of a CPU's threads,
    those events are kernels that name an operation of a program.
    """
    is_device = plane.name.startswith(("/device:GPU", "/device:TPU"))
    if not is_device and plane.name != "/host:CPU":
        return
    for line in plane.lines:
        if is_device and not line.name.startswith(("Stream", "XLA Ops")):
            continue
        for event in line.events:
            stats = {} if is_device else dict(event.stats)
            if (is_device or "hlo_op" in stats) and not event.name.startswith(_CALLERS):
                device = plane.name, stats.get("device_ordinal")
                yield _Kernel(device, event.name, event.duration_ns)
