"""Checks the devices and the network of a job before a long run, and names what is slow.

Examples:
    python -m launch.preflight
    srun python -m launch.preflight
    python -m launch.local --processes=4 -- launch.preflight

Every device multiplies two matrices. Then the processes sum an array in pairs, each with both of
its neighbours by number, and last all together. A device is slow if its matmul takes 1.5 times the
median device's. A process is slow in the network if even the faster one of its two pairs takes 1.5
times the median pair, so that the healthy partner of a slow process is not blamed. Two processes
make one pair, which cannot tell which of them is slow.

The bandwidth of a sum over n devices is 2 (n - 1) / n times an array's bytes over the seconds, as
in NVIDIA's nccl-tests, so that it can be compared with the speed of a link.

Exit codes: 0 nothing is slow; 2 bad input, told in one line; 4 something is slow, and is named; 69
not all processes of the job came, or they see the wrong devices.
"""

import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from launch import command_line
from moe.exit_codes import SLOW
from moe.parallel.cluster import process_name
from moe.parallel.distributed import barrier, gather

if TYPE_CHECKING:
    import jax

_SLOW_FACTOR = 1.5
_WAIT_SECONDS = 300.0
_TRIALS = 10


class Times(NamedTuple):
    """What one process has measured, in seconds."""

    host: str
    matmul: tuple[float, ...]  # of each of its devices
    pairs: tuple[float, ...]  # of its sums with a neighbour


def pairs(num_processes: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of pairs of processes, in which each process meets both of its neighbours.

    In a round nobody has two partners, so its pairs can run at the same time.
    """
    if num_processes < 3:
        return [[(0, 1)]] if num_processes == 2 else []
    even = [(n, n + 1) for n in range(0, num_processes - 1, 2)]
    odd = [(n, n + 1) for n in range(1, num_processes - 1, 2)]
    last = (num_processes - 1, 0)
    return [even, odd, [last]] if num_processes % 2 else [even, [*odd, last]]


def slow_lines(all_times: Sequence[Times]) -> Iterator[str]:
    """Yields a line for each device and each process that is much slower than the median."""
    median = statistics.median(seconds for times in all_times for seconds in times.matmul)
    names = [process_name(n, len(all_times), times.host) for n, times in enumerate(all_times)]
    for name, times in zip(names, all_times, strict=True):
        for number, seconds in enumerate(times.matmul):
            if seconds > _SLOW_FACTOR * median:
                yield (
                    f"device {number} of {name} is slow: its matmul takes {seconds / median:.1f} "
                    "times the median"
                )
    if len(all_times) < 3:
        return
    best = [min(times.pairs) for times in all_times]
    median = statistics.median(seconds for times in all_times for seconds in times.pairs)
    for name, seconds in zip(names, best, strict=True):
        if seconds > _SLOW_FACTOR * median:
            yield (
                f"{name} is slow in the network: its sums with both neighbours take at least "
                f"{seconds / median:.1f} times the median"
            )


def time_matmuls() -> tuple[float, ...]:
    """Returns the seconds that each device of this process takes for a matmul."""
    import jax

    from moe.scaling.hardware import matmul_flops

    # A GPU needs a large one to be busy longer than it takes to start it.
    is_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, "float32") if is_cpu else (8192, "bfloat16")
    return tuple(
        2 * size**3 / matmul_flops(device, dtype, size, _TRIALS) for device in jax.local_devices()
    )


def time_sum(devices: "Sequence[jax.Device]", num_bytes: int) -> float:  # pyright: ignore[reportInvalidTypeForm]
    """Returns the seconds of the fastest of some sums of one array over all these devices.

    All processes that own one of the devices must call it.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    whole = jax.make_array_from_callback(
        (len(devices), num_bytes // 4),
        NamedSharding(mesh, PartitionSpec("all")),
        lambda index: np.ones((1, num_bytes // 4), np.float32),
    )
    add_up = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec(),
        )
    )
    jax.block_until_ready(add_up(whole))  # which compiles it and connects the devices
    seconds = []
    for _ in range(_TRIALS):
        begin = time.perf_counter()
        jax.block_until_ready(add_up(whole))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def time_pairs(num_bytes: int) -> tuple[float, ...]:
    """Returns the seconds of this process's sums with its neighbours."""
    import jax

    seconds = []
    for number, pairs_at_once in enumerate(pairs(jax.process_count())):
        barrier(f"round {number} of the pairs", _WAIT_SECONDS)
        for pair in pairs_at_once:
            if jax.process_index() in pair:
                devices = [device for device in jax.devices() if device.process_index in pair]
                seconds.append(time_sum(devices, num_bytes))
    return tuple(seconds)


def table(all_times: Sequence[Times]) -> str:
    """Returns what all processes have measured, as a table."""
    rows = ["process  host                  slowest matmul (ms)  sums with neighbours (ms)"]
    for number, times in enumerate(all_times):
        sums = ", ".join(f"{1000 * seconds:.1f}" for seconds in times.pairs) or "-"
        rows.append(f"{number:>7}  {times.host:<20}  {1000 * max(times.matmul):>19.1f}  {sums}")
    return "\n".join(rows)


def main(values: flags.FlagValues) -> int:
    import jax

    num_bytes = values.megabytes * 2**20
    barrier("the matmuls", _WAIT_SECONDS)
    own = Times(socket.gethostname(), time_matmuls(), time_pairs(num_bytes))
    all_times = [_read(text) for text in gather("the times", json.dumps(own), _WAIT_SECONDS)]
    print(table(all_times))
    devices = jax.devices()
    if len(devices) > 1:
        seconds = time_sum(devices, num_bytes)
        rate = 2 * (len(devices) - 1) / len(devices) * num_bytes / seconds / 1e9
        print(
            f"sum over all {len(devices)} devices: {1000 * seconds:.1f} ms for "
            f"{values.megabytes} MiB, {rate:.2f} GB/s"
        )
    slow = list(slow_lines(all_times))
    if jax.process_index() == 0:
        print("\n".join(slow) or "nothing is slow", file=sys.stderr)
    return SLOW if slow else 0


def _read(text: str) -> Times:
    host, matmul, sums = json.loads(text)
    return Times(host, tuple(matmul), tuple(sums))


if __name__ == "__main__":
    flags.DEFINE_integer(
        "megabytes", 64, "Size of the array that is summed, in MiB.", lower_bound=1
    )
    command_line.run(main, __doc__, devices=True)
