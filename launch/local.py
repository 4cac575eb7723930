"""Runs a command as a job of several processes on this machine, for tests and for debugging.

Examples:
    python -m launch.local --processes=4 --devices=2 -- launch.train \\
        --config=configs/dense_tiny.py --workdir=runs/local --config.mesh.fsdp=8
    python -m launch.local --processes=2 --restarts=3 -- launch.train \\
        --config=configs/moe_tiny.py --workdir=runs/moe --config.mesh.expert=2
    python -m launch.local --processes=8 --platform=cuda -- launch.train ...

Everything behind -- is one of the commands that use devices, with its flags. The processes find
each other as those of a cluster do, so what works here works there. By default their devices are
virtual ones of the CPU, and --devices says how many each process has. With --platform=cuda each
process has as many of this machine's GPUs for itself.

The output of process 0 is shown. Every process has a log file, too: WORKDIR/logs/process-00000.log
and so on for launch.train, and logs/COMMAND/ in the current directory for the others. If a process
fails, its last lines are shown.

Ctrl-C and SIGTERM are passed on to the processes, which save and stop; a second one ends them at
once. If this command itself is killed, so are its processes.

The exit code is that of the process that failed first, or 128 + the number of the signal that
killed it. With --restarts=N, the job is started again up to N times in a row, after 1, 2, 4, ...
and at most 60 seconds. A start that has worked for 10 minutes begins a new count.

    code                                                               started again
    0    done                                                          no
    1    an unexpected error                                           yes
    2    bad input                                                     no: it would be the same
    3    diverged                                                      no: it would be the same
    69   not all processes came, or they see the wrong devices         yes
    74   the object store of the run did not answer                    yes
    75   stopped by Ctrl-C or SIGTERM, and saved                       no: you stopped it
    76   a process died                                                yes
    77   a process was stuck                                           yes
    129, 130, 131, 143  ended at once by a signal that people send     no: you stopped it
    others above 128    killed by another signal: 137 by kill -9       yes
"""

import contextlib
import functools
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from absl import flags

from launch import command_line
from launch.child_processes import ending_with_parent, gpu_names, shell_code
from launch.local_signals import STOP_SIGNALS, Signals, catch_signals, pause
from launch.logs import LOST, Places, ending, find_places, last_lines, last_lines_of_ended
from moe.config import ConfigError
from moe.exit_codes import (
    BAD_INPUT,
    DIVERGED,
    INTERRUPTED,
    PEER_DIED,
    PEER_STUCK,
    may_restart,
)
from moe.storage.paths import RunPath, run_path

COMMANDS = (
    "benchmark",
    "evaluate",
    "generate",
    "preflight",
    "routing",
    "train",
    "upcycle",
)
# The others notice a process that failed, and leave by themselves. Those that have not done so
# after this time hang.
GRACE_SECONDS = 30.0
LOG_SECONDS = 5.0  # how long the launcher waits for the log of a process that failed
FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 60.0  # before a restart
LONG_START_SECONDS = 600.0  # a start that worked for this long begins a new count of restarts
_LEFT = (PEER_DIED, PEER_STUCK)  # how a process ends because another one has failed


class Job(NamedTuple):
    """What to start: the words of a command, and its processes."""

    command: Sequence[str]  # launch.train, and its flags
    processes: int
    devices: int  # of each process
    platform: str
    restarts: int = 0  # how often the job was started before

    def logs(self, port: int) -> Places:
        """Returns the folders of the processes' log files, if process 0 listens at this port."""
        values = flags.FlagValues()
        command_line.define_directory("workdir", "", flag_values=values)
        try:
            values(self.command, known_only=True)
        except flags.Error as error:
            raise ConfigError(str(error)) from None
        workdir = run_path(values.workdir) if values.workdir else None
        return find_places(self.command[0].removeprefix("launch."), workdir, address(port))


def address(port: int) -> str:
    return f"127.0.0.1:{port}"


class Process(NamedTuple):
    """One process of a job, and the file that has its output until its log is open."""

    popen: subprocess.Popen[bytes]
    output: IO[bytes] | None  # that of process 0 is shown instead


@contextlib.contextmanager
def reserve_port() -> Iterator[int]:
    """Yields a port of this machine that no other program is given while this context lasts.

    Process 0 can listen at it, since both allow the other to use the same address.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def process_environment(
    job: Job, rank: int, port: int, gpus: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns the variables of one process: its place in the job, its devices, and its restarts."""
    variables = dict(environment) | {
        "JAX_COORDINATOR_ADDRESS": address(port),
        "JAX_NUM_PROCESSES": str(job.processes),
        "JAX_PROCESS_ID": str(rank),
        "JAX_PLATFORMS": job.platform,
    }
    if job.restarts:
        variables["MOE_RESTART_COUNT"] = str(job.restarts)
    if job.platform == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(job.devices)
    else:
        own = gpus[rank * job.devices : (rank + 1) * job.devices]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return variables


def find_gpus(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Returns the GPUs of this machine that a job may use, as CUDA names them.

    Raises ConfigError if there are too few.
    """
    if job.platform == "cpu":
        return []
    gpus = gpu_names(environment)
    needed = job.processes * job.devices
    if needed > len(gpus):
        raise ConfigError(
            f"--processes={job.processes} with --devices={job.devices} needs {needed} GPUs, and "
            f"there are {len(gpus)}: lower one of them, or set --platform=cpu"
        )
    return gpus


def start_process(job: Job, rank: int, port: int, gpus: Sequence[str]) -> Process:
    """Starts one process of a job."""
    output = tempfile.TemporaryFile() if rank else None  # noqa: SIM115  # it outlives this call
    popen = subprocess.Popen(
        [sys.executable, "-m", *job.command],
        env=process_environment(job, rank, port, gpus, os.environ),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # A terminal's Ctrl-C reaches this process alone, which passes it on once.
        process_group=0,
        preexec_fn=ending_with_parent(),
    )
    return Process(popen, output)


class Outcome(NamedTuple):
    """How a job has ended."""

    code: int
    was_stopped: bool  # whether a signal came


def run_job(job: Job, gpus: Sequence[str], signals: Signals) -> Outcome:
    """Runs a job to its end, and says which process failed first, if one did."""
    begin = time.time()
    processes: list[Process] = []
    with reserve_port() as port:
        try:
            for rank in range(job.processes):
                processes.append(start_process(job, rank, port, gpus))
            order, killed, was_stopped = _wait(processes, signals)
        finally:
            for process in processes:
                process.popen.kill()
                process.popen.wait()
    _show_lost_logs(processes)
    codes = [process.popen.returncode for process in processes]
    cause = find_cause(codes, [rank for rank in order if rank not in killed])
    if cause is None:
        return Outcome(0, was_stopped)
    if codes[cause] not in (BAD_INPUT, DIVERGED, INTERRUPTED) or cause:
        print(f"process {cause} of {job.processes} {ending(codes[cause])}", file=sys.stderr)
    # Process 0 has shown its own lines. If it left because another process failed, it has shown
    # those of that process, too.
    if cause and codes[0] not in _LEFT:
        _show_last_lines(processes[cause], lambda: job.logs(port).path(cause), begin)
    return Outcome(shell_code(codes[cause]), was_stopped)


def _wait(processes: Sequence[Process], signals: Signals) -> tuple[list[int], list[int], bool]:
    """Waits until all processes have ended, and passes signals on to them.

    Returns the numbers of the processes in the order in which they ended, those that had to be
    killed because they did not leave after another had failed, and whether a signal came.
    """
    order, killed, was_stopped = [], [], False
    deadline = math.inf
    while len(order) < len(processes):
        left = deadline - time.monotonic()
        for number in signals.wait(None if left == math.inf else max(0.0, left)):
            if number == signal.SIGTSTP:
                pause([process.popen for process in processes])
            elif number in STOP_SIGNALS:
                was_stopped = True
                for process in processes:
                    process.popen.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        for rank, process in enumerate(processes):
            if rank not in order and process.popen.poll() is not None:
                order.append(rank)
                if process.popen.returncode not in (0, INTERRUPTED):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= deadline and not killed:
            killed = [rank for rank in range(len(processes)) if rank not in order]
            for rank in killed:
                text = f"process {rank} of {len(processes)} did not end by itself"
                print(f"{text} within {GRACE_SECONDS:g} s, and is killed", file=sys.stderr)
                processes[rank].popen.kill()
            deadline = math.inf
    return order, killed, was_stopped


def find_cause(codes: Sequence[int], order: Sequence[int]) -> int | None:
    """Returns the process whose end is the cause of the job's, or None if none failed.

    `order` has the processes in the order of their ends, without those that had to be killed. A
    process that left because another one
    failed, or because it was asked to, is the cause only if there is no other. Where process 0
    ended in the same way as the cause, it stands for it.
    """
    failed = [rank for rank in order if codes[rank]]
    if not failed:
        return None
    excuse = lambda rank: 2 if codes[rank] == INTERRUPTED else codes[rank] in _LEFT
    cause = min(failed, key=excuse)
    return 0 if 0 in order and codes[0] == codes[cause] else cause


def _show_lost_logs(processes: Sequence[Process]) -> None:
    """Shows the lines that say that the log of a process is not whole. Process 0 has shown its."""
    for process in processes:
        for line in _first_output(process):
            if line.startswith(LOST):
                print(line, file=sys.stderr)


def _first_output(process: Process) -> list[str]:
    """Returns the lines that a process wrote while it had no log, but for those of process 0."""
    if process.output is None:
        return []
    process.output.seek(0)
    return process.output.read().decode(errors="replace").splitlines()


def _show_last_lines(process: Process, find_log: Callable[[], RunPath], begin: float) -> None:
    """Shows the last lines of a process: those before its log was open, and those of its log."""
    lines = _first_output(process)[-20:]
    # Older lines are of another start. If there are lines from before the log, it may never come.
    may_come = not lines or last_lines(find_log(), since=begin)
    seconds = LOG_SECONDS if may_come else 0.0
    logged = last_lines_of_ended(find_log, since=begin, seconds=seconds)
    if logged:
        print(f"its last lines, all of which are in {find_log()}:", file=sys.stderr)
        lines += logged
    for line in lines:
        print(f"    {line}", file=sys.stderr)


def run_with_restarts(job: Job, gpus: Sequence[str], restarts: int) -> int:
    """Runs a job until it succeeds or is not to be started again, and returns its exit code."""
    count = 0  # of restarts in a row
    with catch_signals() as signals:
        while True:
            begin = time.monotonic()
            code, was_stopped = run_job(job, gpus, signals)
            job = job._replace(restarts=job.restarts + 1)
            if time.monotonic() - begin > LONG_START_SECONDS:
                count = 0
            if count == restarts or was_stopped or not may_restart(code):
                return code
            delay = min(FIRST_DELAY_SECONDS * 2**count, MAX_DELAY_SECONDS)
            count += 1
            print(f"restart {count} of {restarts} in {delay:g} s", file=sys.stderr)
            if not _sleep(delay, signals):
                return INTERRUPTED


def _sleep(seconds: float, signals: Signals) -> bool:
    """Waits for some seconds. Returns False at once if a signal asks to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if set(signals.wait(left)).intersection(STOP_SIGNALS):
            return False
    return True


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments before -- and those behind it, which are the command of the job.

    Where there is no --, there is no command, and what looks like one is left out.
    """
    commands = [place for place, text in enumerate(argv) if text.startswith("launch.")]
    end = argv.index("--") if "--" in argv else min(commands, default=len(argv))
    return list(argv[:end]), list(argv[end + 1 :]) if "--" in argv else []


def main(command: Sequence[str], values: flags.FlagValues) -> int:
    for name, least in (("processes", 1), ("devices", 1), ("restarts", 0)):
        value = getattr(values, name)
        if value < least:
            raise ConfigError(f"--{name}={value}: set it to {least} or more")
    names = [f"launch.{name}" for name in COMMANDS]
    if not command:
        raise ConfigError("the command is missing: write it behind --, as in -- launch.train ...")
    if command[0] not in names:
        raise ConfigError(
            f"{command[0]!r} is no command that uses devices: write one of {', '.join(names)}"
        )
    job = Job(command, values.processes, values.devices, values.platform)
    gpus = find_gpus(job, os.environ)
    places = job.logs(0)
    folder = places.first if places.run is None else places.run
    # A mistake in the command is told before there is any log.
    shown = f"; process 0 is shown, and all will have logs in {folder}"
    where = shown if job.processes > 1 else ""
    print(f"{job.processes} x {job.devices} {job.platform} devices{where}", file=sys.stderr)
    return run_with_restarts(job, gpus, values.restarts)


if __name__ == "__main__":
    sys.argv, command = split_arguments(sys.argv)
    flags.DEFINE_integer("processes", None, "How many processes to start.", required=True)
    flags.DEFINE_integer("devices", 1, "How many devices each process has.")
    flags.DEFINE_enum(
        "platform", "cpu", ["cpu", "cuda"], "Virtual devices of the CPU, or the machine's GPUs."
    )
    flags.DEFINE_integer("restarts", 0, "How often in a row to start a job again that failed.")
    command_line.run(functools.partial(main, command), __doc__)
