"""Finds out from a scheduler's variables which process of a job this one is. Imports no JAX.

Every function here is pure: it reads the environment that it is given, and nothing else.
"""

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from moe.config import ConfigError

# Linux gives the ports from 32768 to 60999 to programs that ask for any, so these are rarely taken.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
_JOBSET_PORT = 8476  # a pod has an address of its own, so all of its ports are free
# Batch scripts and the shells of salloc run in steps too, which have numbers from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class Cluster(NamedTuple):
    """The place of a process in its job."""

    found_by: str  # the scheduler, or what else said so
    coordinator: str  # HOST:PORT, where process 0 listens
    num_processes: int
    process_id: int

    @property
    def name(self) -> str:
        """Returns this process's name in messages, such as "process 3 of 8"."""
        return process_name(self.process_id, self.num_processes)


def process_name(process_id: int, num_processes: int, host: str | None = None) -> str:
    """Returns the name of a process in messages, such as "process 3 of 8 on node-1"."""
    return f"process {process_id} of {num_processes}{f' on {host}' if host else ''}"


def find_cluster(
    environment: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """Returns this process's place in its job, or None if it is the only process.

    What the arguments do not say, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say, and what these do not say, the scheduler does. Raises ConfigError where they
    contradict each other, and where the scheduler started more processes than are to be joined.
    """
    address = coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS") or None
    count = _first(num_processes, _optional_int(environment, "JAX_NUM_PROCESSES"))
    rank = _first(process_id, _optional_int(environment, "JAX_PROCESS_ID"))
    scheduled = _find_open_mpi(environment) or _find_slurm(environment) or _find_jobset(environment)
    if (address, count, rank) == (None, None, None):
        cluster = scheduled
    else:
        cluster = _merge(address, count, rank, scheduled)
    if cluster is None or cluster.num_processes == 1:
        _check_nobody_left(scheduled, 1)
        return None
    _check(cluster)
    _check_nobody_left(scheduled, cluster.num_processes)
    return cluster


def why_alone(environment: Mapping[str, str]) -> str | None:
    """Returns a line for a process that runs alone in a job with several tasks, or None.

    That is a command in the shell of salloc or in a batch script that srun did not start.
    """
    if "SLURM_JOB_ID" not in environment or _is_slurm_step(environment):
        return None
    nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
    tasks = environment.get("SLURM_NTASKS", "1")
    if (nodes, tasks) == ("1", "1"):
        return None
    return (
        f"SLURM job {environment['SLURM_JOB_ID']} has {tasks} tasks on {nodes} hosts, but srun "
        "did not start this process: it runs alone; put srun before the command to use all of them"
    )


def is_restarted(environment: Mapping[str, str]) -> bool:
    """Returns whether a scheduler, and no person, has started this job again.

    SLURM and JobSet count their restarts. launch.local, the batch script of launch.slurm and
    launch/tpu/host.sh count their own in MOE_RESTART_COUNT.
    """
    counts = ("SLURM_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT", "MOE_RESTART_COUNT")
    return any(_optional_int(environment, name) for name in counts)


def hidden_rank(environment: Mapping[str, str]) -> int | None:
    """Returns the number of a process that leaves it to process 0 to print a common mistake.

    srun and mpirun print what all their processes write, each of which makes the same mistake. It
    is None for process 0, and where each process has an output of its own.
    """
    text = environment.get("OMPI_COMM_WORLD_RANK") or environment.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() and int(text) else None


def expand_hosts(text: str) -> list[str]:
    """Returns the hosts of a SLURM node list: "a[08-10,12],b" is a08, a09, a10, a12, b.

    Raises ConfigError for a text that is no node list.
    """
    part = r"(?:[^\[\],\s]|\[[\d,-]+\])+"
    if not re.fullmatch(f"{part}(?:,{part})*", text):
        raise ConfigError(f"{text!r} is no SLURM node list: start the command by srun")
    return [host for match in re.finditer(part, text) for host in _expand_host(match[0])]


def _expand_host(text: str) -> list[str]:
    """Returns the hosts of one element of a node list, which may have several brackets."""
    found = re.search(r"\[([\d,-]+)\]", text)
    if not found:
        return [text]
    before, after = text[: found.start()], _expand_host(text[found.end() :])
    numbers: list[str] = []
    for numbered in found[1].split(","):
        first, _, last = numbered.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise ConfigError(f"{text!r} is no SLURM node list: start the command by srun")
        # The first number of a range shows how wide all of its numbers are.
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [f"{before}{number}{end}" for number in numbers for end in after]


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _optional_int(environment: Mapping[str, str], name: str) -> int | None:
    """Returns the whole number that a variable holds, or None if it is not set."""
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is no whole number: set {name} to one, or unset it")
    return int(text)


def _required(environment: Mapping[str, str], name: str, fix: str) -> str:
    value = environment.get(name)
    if not value:
        raise ConfigError(f"{name} is not set: {fix}")
    return value


def _required_int(environment: Mapping[str, str], name: str, fix: str) -> int:
    _required(environment, name, fix)
    value = _optional_int(environment, name)
    assert value is not None
    return value


def _port(number: int) -> int:
    return _FIRST_PORT + number % _NUM_PORTS


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Returns whether srun started this process, so that it is one task of a step."""
    step = _optional_int(environment, "SLURM_STEP_ID")
    return "SLURM_JOB_ID" in environment and step is not None and step < _FIRST_SPECIAL_STEP


def _find_slurm(environment: Mapping[str, str]) -> Cluster | None:
    if not _is_slurm_step(environment):
        return None
    fix = "start the command by srun, and pass on the variables that it sets"
    rank = _required_int(environment, "SLURM_PROCID", fix)
    count = _required_int(environment, "SLURM_STEP_NUM_TASKS", fix)
    hosts = expand_hosts(_required(environment, "SLURM_STEP_NODELIST", fix))
    num_nodes = _optional_int(environment, "SLURM_STEP_NUM_NODES")
    if num_nodes not in (None, len(hosts)):
        raise ConfigError(
            f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']!r} has {len(hosts)} nodes, "
            f"and SLURM_STEP_NUM_NODES={num_nodes}: start the command by srun"
        )
    # Two steps of one job may run at once, so the port differs from step to step.
    job = _required_int(environment, "SLURM_JOB_ID", fix)
    port = _port(31 * job + int(environment["SLURM_STEP_ID"]))
    return Cluster("SLURM", f"{hosts[0]}:{port}", count, rank)


def _find_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    fix = "start the command by mpirun, and pass on the variables that it sets"
    rank = _required_int(environment, "OMPI_COMM_WORLD_RANK", fix)
    count = _required_int(environment, "OMPI_COMM_WORLD_SIZE", fix)
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_orte_hnp_uri") or ""
    port = _port(zlib.crc32(job.encode()))
    if _optional_int(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == count:
        return Cluster("Open MPI", f"127.0.0.1:{port}", count, rank)
    # mpirun's own address. Process 0 runs there if that host is the first of mpirun's hosts.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.search(r"tcp://([^,:]+)|tcp6://(\[[^,\]]+)", uri)
    host = "" if match is None else match[1] or f"{match[2]}]"
    return Cluster("Open MPI", f"{host}:{port}" if host else "", count, rank)


def _find_jobset(environment: Mapping[str, str]) -> Cluster | None:
    """Returns the place of a pod of a JobSet, by the variables of launch/kubernetes/.

    Kubernetes sets JOB_COMPLETION_INDEX. The manifest copies the others from the pod's annotations.
    """
    if "JOBSET_NAME" not in environment:
        return None
    fix = "copy it from the pod's annotations, as the manifests of launch/kubernetes do"
    jobset = environment["JOBSET_NAME"]
    job = _required(environment, "REPLICATED_JOB_NAME", fix)
    index_in_job = _required_int(
        environment, "JOB_COMPLETION_INDEX", "set completionMode: Indexed in the manifest"
    )
    pods = _required_int(environment, "PODS_PER_JOB", "set it to the manifest's parallelism")
    replicas = _required_int(environment, "REPLICATED_JOB_REPLICAS", fix)
    job_index = _required_int(environment, "JOB_INDEX", fix)
    return Cluster(
        "Kubernetes JobSet",
        f"{jobset}-{job}-0-0.{jobset}:{_JOBSET_PORT}",
        pods * replicas,
        job_index * pods + index_in_job,
    )


def _merge(
    address: str | None, count: int | None, rank: int | None, scheduled: Cluster | None
) -> Cluster:
    """Returns the cluster that explicit settings describe, completed by the scheduler's."""
    if count == 1:
        return Cluster("flags", address or "", 1, rank or 0)
    if scheduled is not None:
        found_by = scheduled.found_by
        address = address or scheduled.coordinator
        count = scheduled.num_processes if count is None else count
        rank = scheduled.process_id if rank is None else rank
        return Cluster(f"{found_by} and explicit settings", address, count, rank)
    for name, value in (("num_processes", count), ("process_id", rank)):
        if value is None:
            raise ConfigError(
                f"--{name} is missing, and no scheduler says it: "
                f"set --{name} or JAX_{name.upper()} for each process"
            )
    assert count is not None and rank is not None
    return Cluster("explicit settings", address or "", count, rank)


def _check(cluster: Cluster) -> None:
    """Raises ConfigError for a place that cannot be, or whose coordinator is not known."""
    if cluster.num_processes < 1:
        raise ConfigError(f"num_processes={cluster.num_processes}: set it to 1 or more")
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise ConfigError(
            f"process_id={cluster.process_id} is out of range: with "
            f"num_processes={cluster.num_processes}, set it between 0 and "
            f"{cluster.num_processes - 1}"
        )
    if not cluster.coordinator:
        raise ConfigError(
            f"--coordinator_address is missing, and {cluster.found_by} does not say where process "
            "0 runs: set --coordinator_address or JAX_COORDINATOR_ADDRESS to its HOST:PORT"
        )
    host, _, port = cluster.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"coordinator_address={cluster.coordinator!r} is no HOST:PORT: set it to the host of "
            "process 0 and a free port there"
        )


def _check_nobody_left(scheduled: Cluster | None, count: int) -> None:
    """Raises ConfigError if the scheduler started more processes than `count` are to be joined."""
    if scheduled is not None and scheduled.num_processes > count:
        raise ConfigError(
            f"num_processes={count}, but {scheduled.found_by} started {scheduled.num_processes} "
            "processes, which would all do the same work: unset num_processes, or start fewer"
        )
