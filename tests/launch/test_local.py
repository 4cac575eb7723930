"""What `launch.local` does with its processes: here they are small scripts that need no JAX."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import logs
from launch.local import (
    COMMANDS,
    Job,
    Process,
    _show_last_lines,
    find_cause,
    find_gpus,
    main,
    process_environment,
    split_arguments,
)
from launch.log_writer import Log, time_text
from moe.config import ConfigError
from moe.exit_codes import may_restart
from tests.jobs import wait_until

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import os, sys, time
from launch import local, local_signals
local_signals.SAME_SIGNAL_SECONDS = 20.0
local.FIRST_DELAY_SECONDS, local.GRACE_SECONDS = map(float, sys.argv[3:5])
class Clock:
    # A worker can add an hour.
    sleep, time = time.sleep, time.time
    def monotonic():
        return time.monotonic() + (3600 if os.path.exists("an hour later") else 0)
local.time = Clock
job = local.Job(["worker", *sys.argv[5:]], int(sys.argv[1]), 2, "cpu")
sys.exit(local.run_with_restarts(job, [], int(sys.argv[2])))
"""
WORKER = """
import os, signal, sys, time
rank = int(os.environ["JAX_PROCESS_ID"])
"""


def start(
    directory: Path,
    body: str,
    processes: int = 3,
    restarts: int = 0,
    delay: float = 0.1,
    grace: float = 30.0,
    **options,
) -> subprocess.Popen[str]:
    """Starts a job whose processes run a script."""
    numbers = map(str, (processes, restarts, delay, grace))
    (directory / "worker.py").write_text(WORKER + body)
    paths = os.pathsep.join([str(ROOT), str(directory)])
    environment = {key: os.environ[key] for key in os.environ.keys() - {"PYTHONUNBUFFERED"}}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *numbers],
        cwd=directory,
        env=environment | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(directory: Path, body: str, processes: int = 3, **options) -> tuple[str, str, int]:
    process = start(directory, body, processes, **options)
    output, error = process.communicate(timeout=60)
    return output, error, process.returncode


def test_each_process_knows_its_place_and_process_0_alone_is_shown(tmp_path: Path) -> None:
    body = """
names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "PLATFORMS", "NUM_CPU_DEVICES")
values = [os.environ[f"JAX_{name}"] for name in names]
open(f"place-{rank}", "w").write(" ".join(values))
print(rank)
"""
    assert run(tmp_path, body) == ("0\n", "", 0)
    places = [(tmp_path / f"place-{rank}").read_text().split() for rank in range(3)]
    assert len({address for address, *_ in places}) == 1
    assert [place[1:] for place in places] == [["3", str(rank), "cpu", "2"] for rank in range(3)]


def test_the_port_is_free_for_process_0_and_for_nobody_else(tmp_path: Path) -> None:
    body = """
import errno, socket
host, port = os.environ["JAX_COORDINATOR_ADDRESS"].split(":")
if rank == 0:
    socket.create_server((host, int(port)))
    sys.exit(0)
try:
    socket.socket().bind((host, int(port)))
except OSError as error:
    sys.exit(error.errno != errno.EADDRINUSE)
sys.exit(1)
"""
    assert run(tmp_path, body, processes=2) == ("", "", 0)


def test_the_first_failure_is_the_cause_and_its_last_lines_are_shown(tmp_path: Path) -> None:
    body = """
if rank == 2:
    print("a bug")
    sys.exit(1)
time.sleep(0.2)
sys.exit(0 if rank else 75)
"""
    output, error, code = run(tmp_path, body)
    assert (output, code) == ("", 1)
    assert error == "process 2 of 3 ended with exit code 1\n    a bug\n"


def test_the_log_of_the_process_that_failed_is_shown(tmp_path: Path) -> None:
    body = """
from pathlib import Path
from launch import logs
logs.start(logs.log_path(Path("logs/worker"), rank), rank, 3)
print("a line in the log of", rank)
if rank == 1:
    open("pid.part", "w").write(str(os.getpid()))
    os.rename("pid.part", "pid")
    os.kill(os.getpid(), signal.SIGKILL)
while not os.path.exists("pid") or os.path.exists("/proc/" + open("pid").read()):
    time.sleep(0.01)  # until the launcher has collected it
sys.exit(1)
"""
    output, error, code = run(tmp_path, body)
    assert (output, code) == ("a line in the log of 0\n", 128 + 9)
    assert error.startswith(
        "process 1 of 3 was killed by SIGKILL\n"
        "its last lines, all of which are in logs/worker/process-00001.log:\n    20"
    )
    assert error.endswith(" 1 | a line in the log of 1\n") and error.count("\n") == 3


def test_a_log_is_waited_for_though_there_are_lines_from_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those alone would not tell that the log is coming, but its first lines do."""
    monkeypatch.setattr(logs, "_QUIET_SECONDS", 0.01)
    path, looks = tmp_path / "log", []
    log, prefix = Log(str(path)), time_text(time.time())
    log.write(f"{prefix} host 1 | one\n".encode())

    def find_log() -> Path:
        looks.append(path)
        if len(looks) == 6:
            log.write(f"{prefix} host 1 | two\n".encode())
            os.close(log._file._file)  # pyright: ignore[reportAttributeAccessIssue]
        return path

    with (tmp_path / "output").open("w+b") as output, subprocess.Popen("true") as popen:
        output.write(b"early\n")
        _show_last_lines(Process(popen, output), find_log, 0.0)
    lines = capsys.readouterr().err.splitlines()
    texts = [line.split(" | ")[-1].strip() for line in lines]
    assert texts == [f"its last lines, all of which are in {path}:", "early", "one", "two"]


@pytest.mark.parametrize("code", [2, 3])
def test_what_process_0_says_too_is_not_repeated(tmp_path: Path, code: int) -> None:
    body = f"time.sleep(0.2 * (rank == 0)); print('error: x', file=sys.stderr); sys.exit({code})"
    assert run(tmp_path, body) == ("", "error: x\n", code)


def test_a_log_that_was_lost_is_named_though_the_job_succeeds(tmp_path: Path) -> None:
    body = """
from pathlib import Path
from launch import logs
logs.start(logs.log_path(Path("logs"), rank), rank, 3)
if rank == 1:
    logs._running.writer.kill()
"""
    _, error, code = run(tmp_path, body)
    assert code == 0
    assert error.startswith("log lost: process 1's log_writer.py was killed by SIGKILL, and what")
    assert len(error.splitlines()) == 1


def test_a_process_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    body = """
if rank == 0:
    sys.exit(77)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    _, error, code = run(tmp_path, body, processes=2, grace=0.5)
    assert code == 77
    assert error == (
        "process 1 of 2 did not end by itself within 0.5 s, and is killed\n"
        "process 0 of 2 ended with exit code 77\n"
    )


SAVING = """
count = 0
def stop(number, frame):
    global count
    count += 1
    open(f"stopped-{rank}", "a").write(signal.Signals(number).name + " ")
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
open(f"ready-{rank}", "w").close()
while not count:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(75)
"""


def wait_for(directory: Path, names: list[str]) -> None:
    wait_until(lambda: all((directory / name).exists() for name in names))


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGINT", "SIGINT "), ("SIGTERM", "SIGTERM "), ("SIGHUP", "SIGTERM ")],
)
def test_a_signal_reaches_each_process_once_and_is_waited_for(
    tmp_path: Path, sent: str, received: str
) -> None:
    """It is sent as `timeout` and terminals do: to the command, and to its whole group."""
    process = start(tmp_path, SAVING, restarts=3, start_new_session=True)
    wait_for(tmp_path, ["ready-0", "ready-1", "ready-2"])
    os.kill(process.pid, signal.Signals[sent])
    os.killpg(process.pid, signal.Signals[sent])
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 75
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(3)] == [received] * 3


def state(pid: int) -> str:
    """Returns the system's letter for the state of a process: Z has ended, and T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def is_alive(pid: int) -> bool:
    return state(pid) != "Z"


def test_a_launcher_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    body = """
open(f"pid-{rank}.part", "w").write(str(os.getpid()))
os.rename(f"pid-{rank}.part", f"pid-{rank}")
time.sleep(600)
"""
    process = start(tmp_path, body)
    names = [f"pid-{rank}" for rank in range(3)]
    wait_for(tmp_path, names)
    process.kill()
    process.communicate(timeout=60)
    pids = [int((tmp_path / name).read_text()) for name in names]
    wait_until(lambda: not any(map(is_alive, pids)))


def test_asking_for_stacks_does_not_end_the_job(tmp_path: Path) -> None:
    body = """
open(f"ready-{rank}", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
"""
    process = start(tmp_path, body)
    wait_for(tmp_path, ["ready-0", "ready-1", "ready-2"])
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "end").touch()
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def test_ctrl_z_stops_the_whole_job(tmp_path: Path) -> None:
    body = """
while not os.path.exists("end"):
    open(f"time-{rank}.part", "w").write(f"{os.getpid()} {time.time()}")
    os.rename(f"time-{rank}.part", f"time-{rank}")
    time.sleep(0.01)
"""
    process = start(tmp_path, body)
    names = [f"time-{rank}" for rank in range(3)]
    wait_for(tmp_path, names)
    process.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    pids = [int((tmp_path / name).read_text().split()[0]) for name in names]
    wait_until(lambda: {state(pid) for pid in pids} == {"T"})
    before = [(tmp_path / name).read_text() for name in names]
    time.sleep(0.1)
    assert [(tmp_path / name).read_text() for name in names] == before
    (tmp_path / "end").touch()
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


@pytest.mark.parametrize(
    ("end", "starts", "code"),
    [
        ("sys.exit(0 if starts == 2 else 76 if rank else 1)", 2, 0),
        ("sys.exit(69)", 2, 69),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, 137),
        ("sys.exit(2)", 1, 2),
        ("sys.exit(3)", 1, 3),
        ("sys.exit(75)", 1, 75),
        ("os.kill(os.getpid(), signal.SIGTERM)", 1, 143),
    ],
)
def test_a_job_is_started_again_if_that_may_help(
    tmp_path: Path, end: str, starts: int, code: int
) -> None:
    body = f"""
open(f"starts-{{rank}}", "a").write("x")
starts = len(open(f"starts-{{rank}}").read())
{end}
"""
    _, error, found = run(tmp_path, body, processes=2, restarts=1)
    assert found == code
    assert [len((tmp_path / f"starts-{rank}").read_text()) for rank in range(2)] == [starts] * 2
    assert ("restart 1 of 1 in 0.1 s\n" in error) == (starts == 2)


def test_a_start_that_worked_for_long_begins_a_new_count(tmp_path: Path) -> None:
    body = """
open("starts", "a").write(os.environ.get("MOE_RESTART_COUNT", "0"))
starts = len(open("starts").read())
if starts == 2:
    open("an hour later", "w").close()
sys.exit(1)
"""
    _, error, code = run(tmp_path, body, processes=1, restarts=1)
    assert code == 1 and error.count("restart 1 of 1") == 2
    # Each start knows which one it is, so that it waits for the lock of its run.
    assert (tmp_path / "starts").read_text() == "012"


def test_a_signal_ends_the_wait_for_a_restart(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.exit(1)", processes=1, restarts=9, delay=60.0)
    assert process.stderr
    while "in 60 s" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.communicate()


@pytest.mark.parametrize(
    ("codes", "order", "cause"),
    [
        ([0, 0, 0], [2, 1, 0], None),
        ([76, 76, 1], [2, 0, 1], 2),
        ([76, 76, 1], [0, 1, 2], 2),  # the first one left because of process 2
        ([77, 77], [1, 0], 0),
        ([75, 75, 76], [0, 1, 2], 2),
        ([75, 75], [1, 0], 0),
        ([2, 2, 2], [1, 2, 0], 0),
        ([0, -9, 1], [1, 2, 0], 1),
        ([-9, -9, 76], [1, 2], 1),  # process 0 hung, and was killed
    ],
)
def test_find_cause(codes: list[int], order: list[int], cause: int | None) -> None:
    assert find_cause(codes, order) == cause


def test_codes_of_users_and_of_mistakes_are_not_restarted() -> None:
    codes = [0, 1, 2, 3, 69, 74, 75, 76, 77, 129, 130, 131, 134, 137, 139, 143]
    assert [code for code in codes if may_restart(code)] == [1, 69, 74, 76, 77, 134, 137, 139]


def test_the_commands_are_those_that_use_devices() -> None:
    files = sorted((ROOT / "launch").glob("*.py"))
    assert [path.stem for path in files if "devices=True" in path.read_text()] == list(COMMANDS)


def test_each_process_gets_its_own_gpus() -> None:
    job = Job(["launch.train"], 3, 2, "cuda")
    gpus = find_gpus(job, {"CUDA_VISIBLE_DEVICES": "4,5,GPU-a,GPU-b,7,8,9"})
    found = [
        process_environment(job, rank, 1234, gpus, {"PATH": "x"})["CUDA_VISIBLE_DEVICES"]
        for rank in range(3)
    ]
    assert found == ["4,5", "GPU-a,GPU-b", "7,8"]
    with pytest.raises(ConfigError, match="needs 6 GPUs, and there are 5"):
        find_gpus(job, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"})


@pytest.mark.parametrize(
    ("argv", "own", "command"),
    [
        (
            ["x", "--a=1", "--", "launch.train", "--", "b"],
            ["x", "--a=1"],
            ["launch.train", "--", "b"],
        ),
        (["x", "--a=1", "launch.train", "--b=2"], ["x", "--a=1"], []),
        (["x", "--help"], ["x", "--help"], []),
    ],
)
def test_split_arguments(argv: list[str], own: list[str], command: list[str]) -> None:
    assert split_arguments(argv) == (own, command)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--", "launch.train"], "--processes is missing: set --processes=VALUE"),
        (["--processes=2", "launch.train", "--config=x"], "the command is missing: write it "),
        (
            ["--processes=9", "--platform=cuda", "--", "launch.train"],
            "--processes=9 with --devices=1 needs 9 GPUs, and there are 1: lower one of them, ",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], error: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "command", "error"),
    [
        ({"processes": 0}, ["launch.train"], "--processes=0: set it to 1 or more"),
        ({"devices": 0}, ["launch.train"], "--devices=0: set it to 1 or more"),
        ({"restarts": -1}, ["launch.train"], "--restarts=-1: set it to 0 or more"),
        ({}, [], "the command is missing: write it behind --, as in -- launch.train"),
        ({}, ["python"], "'python' is no command that uses devices: write one of launch.b"),
        ({}, ["launch.plan"], "'launch.plan' is no command that uses devices: "),
        ({}, ["launch.train", "--workdir"], "Missing value for flag --workdir"),
    ],
)
def test_a_wrong_job_is_refused(changed: dict[str, int], command: list[str], error: str) -> None:
    values = {"processes": 2, "devices": 1, "restarts": 0, "platform": "cpu"} | changed
    with pytest.raises(ConfigError) as caught:
        main(command, SimpleNamespace(**values))
    assert str(caught.value).startswith(error)
