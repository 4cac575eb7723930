"""Joins the processes of a job into one JAX, and lets them wait for one another.

Nothing here imports JAX before the processes have met, so that a mistake is answered at once. With
one process, `barrier` and `from_first` have nothing to wait for.
"""

import collections
import ctypes
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.config import ConfigError, MeshConfig
from moe.files import announce_wait
from moe.parallel import watch
from moe.parallel.cluster import Cluster, find_cluster, process_name, why_alone
from moe.parallel.rendezvous import Arrival, NotJoined, bind_host, listed, meet

__all__ = [
    "Cluster",
    "Late",
    "NotJoined",
    "barrier",
    "find_cluster",
    "from_first",
    "join",
    "on_tpu",
    "why_alone",
]

ARRIVAL_SECONDS = 300.0  # how long all wait for the last process, whose container may be loading
_CONNECT_SECONDS = 120  # for JAX, once all processes have come
_POLL_MILLISECONDS = 60_000
_GOOGLE = "0x1ae0"  # the vendor of a TPU on the PCI bus

# How often this process has used each name of a barrier or of a text. All processes use them in the
# same order, so the number tells the second use of a name from the first.
_uses: collections.Counter[str] = collections.Counter()


class Late(RuntimeError):
    """Names the processes that did not come to a barrier in time."""


def join(
    cluster: Cluster, mesh: MeshConfig | None = None, timeout_s: float = ARRIVAL_SECONDS
) -> None:
    """Starts JAX over all processes of the job, and checks what each of them sees.

    From then on the watch ends this process if another one dies or is stuck. `mesh` is the run's,
    where the command has a config. Raises NotJoined with one line that names
    the processes that did not come within `timeout_s`, or that see the wrong devices.
    """
    arrivals = meet(cluster, visible_gpus(os.environ), timeout_s)
    check_gpus(arrivals)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would swallow SIGTERM. Here the processes themselves agree on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    coordinator_host, _, port = cluster.coordinator.rpartition(":")
    bound = bind_host(cluster)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        # Otherwise JAX asks the scheduler too, and gives each task of SLURM a single GPU.
        cluster_detection_method="deactivate",
        initialization_timeout=_CONNECT_SECONDS,
        coordinator_bind_address=f"{bound}:{port}" if bound else None,
    )
    _delay_abort()
    watch.start(cluster.process_id, cluster.num_processes, coordinator_host, from_first)
    _client().key_value_set(_host_key(cluster.process_id), arrivals[cluster.process_id].host)
    counts = collections.Counter(device.process_index for device in jax.devices())
    check_devices(arrivals, [counts[n] for n in range(cluster.num_processes)], mesh)
    own = arrivals[cluster.process_id]
    print(
        f"{own.name}, {jax.local_device_count()} devices, coordinator {cluster.coordinator}, "
        f"found by {cluster.found_by}",
        file=sys.stderr,
        flush=True,
    )


def _delay_abort() -> None:
    """Lets an abort of this process take 6 seconds, in which the watch can end it with one line.

    JAX aborts a process whose connection to process 0 breaks. That is the moment at which the watch
    hears of it too, and only the watch names who died, with the exit code that says so. The handler
    is C's own sleep(), as Python's handlers never run during an abort. It gets the number of the
    signal, which is 6 for SIGABRT, and so sleeps as many seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)


def on_tpu(environment: Mapping[str, str]) -> bool:
    """Returns whether this machine has TPUs that JAX may use. Imports no JAX."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)


def find_tpu_cluster() -> Cluster | None:
    """Returns this process's place among the hosts of a TPU, which JAX reads off its metadata.

    It is None if there is one host, or no metadata at all, as in a notebook.
    """
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

    for kind in (GkeTpuCluster, GceTpuCluster):
        try:
            if kind.is_env_present():
                count = kind.get_process_count()
                if count == 1:
                    return None
                address = kind.get_coordinator_address(int(ARRIVAL_SECONDS), None)
                return Cluster("TPU metadata", address, count, kind.get_process_id())
        except OSError as error:  # there is no metadata server
            print(f"no TPU metadata ({error}): this process runs alone", file=sys.stderr)
    return None


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the unique identifiers of the NVIDIA GPUs that this process sees, without JAX.

    There are none where JAX is told to use another platform.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and platforms.split(",")[0] not in ("cuda", "gpu"):
        return []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    chosen = environment.get("JAX_LOCAL_DEVICE_IDS")
    numbers = map(int, chosen.split(",")) if chosen else range(count.value)
    identifiers = []
    for number in numbers:
        device, identifier = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceGetUuid_v2(
            identifier, device
        ):
            raise ConfigError(
                f"JAX_LOCAL_DEVICE_IDS={chosen} names GPU {number}, and there are {count.value}: "
                "set it to numbers below that"
            )
        identifiers.append(bytes(identifier).hex())
    return identifiers


def check_gpus(arrivals: Sequence[Arrival]) -> None:
    """Raises NotJoined if a process sees another number of GPUs, or a GPU that another one holds.

    Under SLURM the usual accidents are that a task sees only the first GPU of its node, and that
    all tasks of a node see all of its GPUs.
    """
    _check_equal(arrivals, [len(arrival.gpus) for arrival in arrivals], "GPUs")
    holders: dict[str, Arrival] = {}
    for arrival in arrivals:
        for gpu in arrival.gpus:
            if gpu in holders:
                raise NotJoined(
                    f"{holders[gpu].name} and {arrival.name} hold the same GPU, {gpu}: start one "
                    "process for each host, or give each its own GPUs (srun --gpus-per-task=1)"
                )
            holders[gpu] = arrival


def check_devices(
    arrivals: Sequence[Arrival], counts: Sequence[int], mesh: MeshConfig | None
) -> None:
    """Raises NotJoined if processes see different numbers of devices, or not those of the mesh.

    `counts` has the number of devices of each process.
    """
    _check_equal(arrivals, counts, "devices")
    if mesh is None or -1 in mesh.sizes:
        return
    wanted = math.prod(mesh.sizes)
    if wanted != sum(counts):
        raise NotJoined(
            f"each of the {len(counts)} processes sees {counts[0]} devices, which are "
            f"{sum(counts)}, and config.mesh wants {wanted}: start as many processes as make them, "
            "show each process all devices of its host, or set config.mesh"
        )


def _check_equal(arrivals: Sequence[Arrival], counts: Sequence[int], things: str) -> None:
    expected = max(set(counts), key=lambda count: (list(counts).count(count), count))
    wrong = [number for number, count in enumerate(counts) if count != expected]
    if wrong:
        first = wrong[0]
        rest = f" (and {listed(wrong[1:])} too)" if wrong[1:] else ""
        raise NotJoined(
            f"{arrivals[first].name} sees {counts[first]} {things}{rest}, and most processes see "
            f"{expected}: give all processes equally many"
        )


def barrier(name: str, timeout_s: float) -> None:
    """Waits until all processes are here. Raises Late, which names those that are not in time."""
    client = _client()
    if client is None:
        return
    process_id, num_processes = _place()
    key = _key("barrier", name)
    client.key_value_set(f"{key}/{process_id}", "")
    import jax

    try:
        client.wait_at_barrier(key, int(1000 * timeout_s))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        present = {int(found.rpartition("/")[2]) for found, _ in client.key_value_dir_get(key)}
        # A process that comes after the others have given up is told so at once.
        late = [n for n in range(num_processes) if n not in present] or [process_id]
        names = ", ".join(
            process_name(number, num_processes, client.key_value_try_get(_host_key(number)))
            for number in late[:8]
        )
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        raise Late(f"{names}{more} did not come to {name} within {timeout_s:g} s") from None


def from_first(name: str, make: Callable[[], str]) -> str:
    """Returns in every process the text that `make` returns in process 0.

    So what process 0 decides holds everywhere. If `make` raises ConfigError there, it is raised in
    every process. Other errors end process 0, and the watch ends the others.
    """
    client = _client()
    if client is None:
        return make()
    key = _key("text", name)
    if _place()[0] == 0:
        try:
            text = make()
        except ConfigError as error:
            client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        client.key_value_set(key, json.dumps({"text": text}))
        return text
    with announce_wait(f"waiting for process 0: {name}"):
        answer = json.loads(_wait_for(client, key))
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["text"]


def _wait_for(client: Any, key: str) -> str:
    """Returns the value of a key, once there is one. Process 0 may take hours for it."""
    import jax

    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _key(kind: str, name: str) -> str:
    """Returns a key that all processes use, and each of them once."""
    _uses[f"{kind}/{name}"] += 1
    return f"moe/{kind}/{name}/{_uses[f'{kind}/{name}']}"


def _host_key(process_id: int) -> str:
    return f"moe/host/{process_id}"


def _client() -> Any:
    """Returns the client of JAX's coordination service, or None in a process that runs alone.

    JAX has no public name for it. The service is alive as long as process 0 is, and no device takes
    part in what it does, so it also works while the devices are busy or stuck.
    """
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def _place() -> tuple[int, int]:
    """Returns this process's number, and the number of processes."""
    from jax._src import distributed

    return distributed.global_state.process_id, distributed.global_state.num_processes
