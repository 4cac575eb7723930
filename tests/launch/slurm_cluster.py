"""Starts a SLURM cluster of two nodes on this machine, in a directory of its own, and stops it."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.jobs import free_port

# A node's name must be an address, since JAX takes the first node's name as its coordinator.
NODES = ("127.0.0.11", "127.0.0.12")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=200
CompleteWait=0
MailProg=/bin/true
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=short Nodes=ALL MaxTime=INFINITE DefaultTime=5 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


def why_not() -> str | None:
    """Returns why no cluster can be started here, or None if one can."""
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing:
        return f"{missing[0]} is not installed: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """A running cluster: its configuration, and what the tests ask it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done)
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Returns what SLURM says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str, log: Callable[[str], str]) -> None:
        """Waits until a job is in a state; if it is not in time, shows its log."""
        deadline = time.monotonic() + 400
        while (found := self.state(job)["JobState"]) != state:
            assert time.monotonic() < deadline, f"{found}\n{log(job)}"
            time.sleep(0.2)

    def start(self) -> None:
        for part in ("munge", "state", *(f"spool/{node}" for node in NODES)):
            (self._directory / part).mkdir(parents=True)
        for directory in (self._directory, self._directory / "munge"):
            directory.chmod(0o755)  # munged refuses a socket that others cannot reach
        munge = self._directory / "munge"
        (munge / "munge.key").write_bytes(os.urandom(128))
        (munge / "munge.key").chmod(0o600)
        ports = [free_port() for _ in range(3)]
        nodes = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2\n"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIG.format(directory=self._directory, port=ports[0]).split("PartitionName", 1)
        (self._directory / "slurm.conf").write_text(
            text[0] + "".join(nodes) + "PartitionName" + text[1]
        )
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        names = ("munge.key", "munge.socket", "munged.pid", "munged.log", "munged.seed")
        self.run("munged", *(f"--{a}={munge / b}" for a, b in zip(files, names, strict=True)))
        self.run("slurmctld", "-i")
        for node in NODES:
            self.run("slurmd", "-N", node)
        deadline = time.monotonic() + 200
        while self.run("sinfo", "--noheader", "--Node", "--format=%t").split() != ["idle"] * 6:
            assert time.monotonic() < deadline, self.run("sinfo")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancels all jobs, and ends the daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", "--full")
            deadline = time.monotonic() + 100
            while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
            self.run("scontrol", "shutdown")
        for path in self._directory.rglob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
                os.kill(int(path.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while list(self._directory.rglob("*.pid")) and time.monotonic() < deadline:
            time.sleep(0.05)  # a daemon removes its file when it ends


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Runs a cluster in a new directory in /tmp: the path of munge's socket must be short."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    running = Cluster(directory)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(directory, ignore_errors=True)
