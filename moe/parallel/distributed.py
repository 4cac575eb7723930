"""Joins the processes of a job into one JAX, and lets them wait for one another.

Nothing here imports JAX before the processes have met, so that a mistake is answered at once. With
one process, `barrier` and `from_first` have nothing to wait for.
"""

import collections
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moe.config import ConfigError, MeshConfig
from moe.files import announce_wait
from moe.parallel import watch
from moe.parallel.cluster import Cluster, find_cluster, process_name, why_alone
from moe.parallel.devices import (
    check_devices,
    check_gpus,
    check_platforms,
    counted,
    visible_gpus,
)
from moe.parallel.rendezvous import Arrival, NotJoined, bind_host, meet

__all__ = [
    "Cluster",
    "Late",
    "NotJoined",
    "barrier",
    "find_cluster",
    "from_first",
    "gather",
    "join",
    "on_tpu",
    "why_alone",
]

ARRIVAL_SECONDS = 300.0  # how long all wait for the last process, whose container may be loading
_CONNECT_SECONDS = 120  # for JAX, once all processes have come
_POLL_MILLISECONDS = 60_000
_CACHE_SECONDS = 120.0
_PCI = Path("/sys/bus/pci/devices")
T = TypeVar("T")
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus, and of network cards too

# How often this process has used each name of a barrier or of a value. All processes use them in
# the same order, so the number tells the second use of a name from the first.
_uses: collections.Counter[str] = collections.Counter()


class Late(RuntimeError):
    """Names the processes that did not come to a barrier in time."""


def join(
    cluster: Cluster,
    mesh: MeshConfig | None = None,
    timeout_s: float = ARRIVAL_SECONDS,
    prepare: Callable[[], Any] = lambda: None,
) -> Any:
    """Starts JAX over all processes of the job, and checks what each of them sees.

    From then on the watch ends this process if another one dies or is stuck. `mesh` is the run's,
    where the command has a config. Returns what `prepare` returns, which is called once the
    processes can exchange messages, and before they touch their devices. Raises NotJoined with one
    line that names the processes that did not come within `timeout_s`, or see the wrong devices.
    """
    arrivals = meet(cluster, visible_gpus(os.environ), timeout_s)
    check_gpus(arrivals)
    import jax

    _start_jax(cluster)
    _delay_abort()
    own, host = arrivals[cluster.process_id], cluster.coordinator.rpartition(":")[0].strip("[]")
    try:
        watch.start(cluster.process_id, cluster.num_processes, host, from_first)
    except OSError as error:
        raise NotJoined(
            f"{own.name} does not reach the watch of process 0 on {host} ({error}): "
            "open the ports between the hosts"
        ) from None
    _client().key_value_set(_host_key(cluster.process_id), own.host)
    prepared = prepare()
    check_platforms(os.environ)
    counts = collections.Counter(device.process_index for device in jax.devices())
    check_devices(arrivals, [counts[n] for n in range(cluster.num_processes)], mesh)
    share_cache(arrivals)
    print(
        f"{own.name}, {counted(jax.local_device_count(), 'device')}, "
        f"coordinator {cluster.coordinator}, found by {cluster.found_by}",
        file=sys.stderr,
        flush=True,
    )
    return prepared


def _start_jax(cluster: Cluster) -> None:
    """Starts JAX over all processes. Raises NotJoined if it cannot listen at the address."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would swallow SIGTERM. Here the processes themselves agree on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    port = cluster.coordinator.rpartition(":")[2]
    bound = bind_host(cluster.coordinator.rpartition(":")[0])
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            # Otherwise JAX asks the scheduler too, and gives each task of SLURM a single GPU.
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            coordinator_bind_address=f"{bound}:{port}" if bound else None,
        )
    except jax.errors.JaxRuntimeError as error:
        raise NotJoined(
            f"JAX did not start at {cluster.coordinator} ({' '.join(str(error).split())}): "
            "set --coordinator_address to another port"
        ) from None


def _delay_abort() -> None:
    """Delays an abort of this process by 6 seconds, in which the watch can end it with one line.

    JAX aborts a process whose connection to process 0 breaks. The watch notices the same break, and
    it alone names the process that died and exits with PEER_DIED. The handler is C's own sleep(),
    since Python's handlers never run during an abort. Its argument is the number of the signal, so
    for SIGABRT it sleeps 6 seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)


def on_tpu(environment: Mapping[str, str]) -> bool:
    """Returns whether this machine may have TPUs that JAX is to use. Imports no JAX."""
    platforms = environment.get("JAX_PLATFORMS") or "tpu"
    if platforms.split(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    vendors = _PCI.glob("*/vendor")
    return any(vendor.read_text(encoding="utf-8").strip() == _GOOGLE for vendor in vendors)


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


def share_cache(arrivals: Sequence[Arrival]) -> None:
    """Switches the compilation cache off if not all processes see the same directory.

    JAX writes it in process 0 alone. From a directory of its own, process 0 would load a program at
    the next start, while the others compile it and wait for what they do together with process 0.
    """
    import jax

    settings: Any = jax.config
    directory = settings.jax_compilation_cache_dir
    is_local = directory and "://" not in directory  # a bucket is the same everywhere
    folder = Path(directory) if is_local else None
    name = from_first("the cache's marker", lambda: _write_marker(folder) if folder else "")
    is_seen = not name or (folder is not None and (folder / name).exists())
    seen = gather("the compilation cache", "yes" if is_seen else "no", _CACHE_SECONDS)
    is_first = _place()[0] == 0
    if is_first and folder and name:
        (folder / name).unlink(missing_ok=True)
    if "no" in seen:
        jax.config.update("jax_enable_compilation_cache", False)
    if "no" in seen and is_first:
        print(
            f"{arrivals[seen.index('no')].name} does not see the compilation cache {directory} of "
            "process 0, so nothing is cached: "
            "set JAX_COMPILATION_CACHE_DIR to a directory that all share",
            file=sys.stderr,
            flush=True,
        )


def _write_marker(folder: Path) -> str:
    """Writes a file into process 0's cache, and returns its name, which no other job's has."""
    name = f".seen-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    with contextlib.suppress(OSError):  # then no process sees it
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return name


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
        # A process that comes after the others have given up gets this error at once.
        late = [n for n in range(num_processes) if n not in present] or [process_id]
        names = ", ".join(
            process_name(number, num_processes, client.key_value_try_get(_host_key(number)))
            for number in late[:8]
        )
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        raise Late(f"{names}{more} did not come to {name} within {timeout_s:g} s") from None


def from_first(name: str, make: Callable[[], T]) -> T:
    """Returns in every process what `make` returns in process 0, a value that JSON can hold.

    If `make` raises ConfigError there, it is raised in
    every process. Other errors end process 0, and the watch ends the others.
    """
    client = _client()
    if client is None:
        return make()
    key = _key("value", name)
    if _place()[0] == 0:
        try:
            value = make()
        except ConfigError as error:
            client.key_value_set(key, json.dumps({"error": str(error)}))
            raise
        client.key_value_set(key, json.dumps({"value": value}))
        return value
    with announce_wait(f"waiting for process 0: {name}"):
        answer = json.loads(_wait_for(client, key))
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["value"]


def gather(name: str, text: str, timeout_s: float) -> list[str]:
    """Returns the texts of all processes, in the order of their numbers, in every process.

    Raises Late, as `barrier` does.
    """
    client = _client()
    if client is None:
        return [text]
    process_id, num_processes = _place()
    key = _key("texts", name)
    client.key_value_set(f"{key}/{process_id}", text)
    barrier(name, timeout_s)
    return [client.key_value_try_get(f"{key}/{number}") for number in range(num_processes)]


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
