"""The job that launch.slurm writes: its options, and what it does after each exit code.

Small scripts stand in for the commands of SLURM.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.slurm.job import TEMPLATE, check_default_time, check_time, job_text, time_limit_s
from moe.config import ConfigError

ROOT = Path(__file__).parents[2]
FLAGS = {
    "nodes": 2,
    "gpus_per_node": None,
    "cpus_per_node": None,
    "time": None,
    "partition": None,
    "account": None,
    "array": None,
    "chain": 1,
    "save_s": 300,
    "restarts": 3,
    "backoff_s": 0,
    "sbatch": [],
    "srun": [],
    "workdir": "runs/a",
}
# Each notes its arguments. srun ends with the next code of the file `codes`, or at SIGTERM with 75.
TOOLS = {
    "srun": 'echo "srun $*" >>calls; echo "${MOE_RESTART_COUNT-0}" >>counts\n'
    "read -r code <codes; sed -i 1d codes\n"
    '[ "$code" = wait ] || exit "$code"\n'
    "trap 'exit 75' TERM; echo $$ >pid; while :; do /bin/sleep 0.05; done",
    "scancel": 'echo "scancel $*" >>calls; [ ! -f pid ] || kill -TERM "$(cat pid)"',
    "scontrol": 'echo "scontrol $*" >>calls',
    "squeue": "cat state",
    "sleep": 'echo "sleep $1" >>calls; [ "$1" != 60 ] || exec /bin/sleep 60',
}


def text(command: list[str] | None = None, **changed: Any) -> str:
    values: Any = SimpleNamespace(**FLAGS | changed)
    return job_text(values, command or ["program"])


def options(**changed: Any) -> list[str]:
    lines = text(**changed).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]


@pytest.fixture
def start(tmp_path: Path):
    """Returns a function that starts a job whose command ends with the given codes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }

    def start(*codes: int | str, env: dict[str, str] | None = None, **changed: Any):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "job").write_text(text(**changed))
        return subprocess.Popen(
            ["bash", "job"],
            cwd=tmp_path,
            env=environment | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def calls(directory: Path) -> list[str]:
    """Returns what the job called, in order, with the first word of srun's command only."""
    return [line.split(" --")[0] for line in (directory / "calls").read_text().splitlines()]


def test_the_options_of_a_job() -> None:
    assert options(time="1:00:00", partition="train", account="us", gpus_per_node=8) == [
        "--job-name=a",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--chdir={os.getcwd()}",
        "--output=runs/a/slurm/%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--exclusive",
        "--mem=0",
        "--gpus-per-node=8",
        "--time=1:00:00",
        "--partition=train",
        "--account=us",
    ]


def test_options_that_share_nodes_and_the_users_own() -> None:
    found = options(cpus_per_node=4, sbatch=["--qos=high", "--comment=two words"], array="0-3")
    assert {"--cpus-per-task=4", "--array=0-3", "--qos=high", '"--comment=two words"'} <= set(found)
    assert "--exclusive" not in found and "--output=runs/a/slurm/%A_%a.log" in found
    assert '"--output=a b/5%%/slurm/%j.log"' in options(workdir="a b/5%")
    assert "--output=slurm/b/%j.log" in options(workdir="gs://bucket/a/b")
    with pytest.raises(ConfigError, match="cannot stand in a #SBATCH line"):
        options(workdir='a"b')


def test_the_command_keeps_its_words() -> None:
    assert f"command=({sys.executable} -m launch.train '--prompt=a b' '$HOME')\n" in text(
        ["launch.train", "--prompt=a b", "$HOME"]
    )
    assert "command=(/bin/true)\n" in text(["/bin/true"])
    assert "srun_options=(--container-image=x)\n" in text(srun=["--container-image=x"])


def test_the_template_has_one_place_for_each_part() -> None:
    template = TEMPLATE.read_text()
    assert template.count("\n# @OPTIONS@\n") == template.count("\n# @SETTINGS@\n") == 1
    assert "# @" not in text()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], 0),
        ([1, 69, 74, 0], 0),
        ([76, 0], 0),
        ([77, 137, 134, 0], 0),
        ([1, 1, 1, 1], 1),  # three restarts, and no more
        ([2], 2),
        ([3], 3),
        ([76, 3], 3),
        ([130], 130),
    ],
)
def test_exit_codes_decide_what_is_started_again(start, tmp_path, codes, expected) -> None:
    job = start(*codes)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, calls(tmp_path).count("srun")) == (expected, len(codes)), output


def test_restarts_wait_longer_each_time(start, tmp_path) -> None:
    start(1, 1, 1, 1, backoff_s=10).communicate(timeout=30)
    waits = [call for call in calls(tmp_path) if call != "srun"]
    assert waits == ["sleep 10", "sleep 20", "sleep 40"]
    # A start that is counted waits for the lock of its run.
    assert (tmp_path / "counts").read_text().split() == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("number", "state", "changed", "expected", "called"),
    [
        # The time limit is near: save, and queue the job again.
        (signal.SIGUSR1, "RUNNING", {}, 0, ["scancel", "scontrol requeue 7"]),
        # A job of a chain leaves the rest to the next one.
        (signal.SIGUSR1, "RUNNING", {"chain": 2}, 75, ["scancel"]),
        # scancel --batch --signal=TERM: save, and end.
        (signal.SIGTERM, "RUNNING", {}, 75, ["scancel"]),
        # An element of an array, which the job's own id might not tell from the others.
        (signal.SIGUSR1, "RUNNING", {"array": "0-4"}, 0, ["scancel", "scontrol requeue 5_4"]),
    ],
)
def test_signals_save_and_then_queue_or_end(
    start, tmp_path, number, state, changed, expected, called
) -> None:
    element = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "4"} if "array" in changed else {}
    job = start("wait", env=element, **changed)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    job.send_signal(number)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, calls(tmp_path)) == (expected, ["srun", *called]), output
    name = "5_4" if element else "7"
    assert f"scancel --quiet --signal=TERM {name}\n" in (tmp_path / "calls").read_text()


def test_a_saved_job_that_nobody_told_is_queued_again(start, tmp_path) -> None:
    """As after a preemption that leaves time: SLURM signals the processes alone."""
    job = start(75)
    job.communicate(timeout=30)
    assert (job.returncode, calls(tmp_path)) == (0, ["srun", "scontrol requeue 7"])


@pytest.mark.parametrize(("left_s", "code"), [(60, 75), (3600, 0)])
def test_a_job_of_a_chain_ends_at_its_time_limit_alone(start, tmp_path, left_s, code) -> None:
    """Training saw the limit itself, or else it was preempted."""
    job = start(75, env={"SLURM_JOB_END_TIME": str(int(time.time()) + left_s)}, chain=2)
    job.communicate(timeout=30)
    assert job.returncode == code and ("scontrol requeue 7" in calls(tmp_path)) == (code == 0)


def test_a_cancelled_job_is_not_queued_again(start, tmp_path) -> None:
    (tmp_path / "state").write_text("CANCELLED\n")
    job = start(75)
    job.communicate(timeout=30)
    assert (job.returncode, calls(tmp_path)) == (75, ["srun"])


def test_a_signal_between_two_starts_queues_the_job_again(start, tmp_path) -> None:
    job = start(1, backoff_s=60)
    assert job.stdout
    while "restart 1 of 3" not in job.stdout.readline():
        pass
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=30)
    assert job.returncode == 0 and calls(tmp_path)[-1] == "scontrol requeue 7"


def test_all_cores_that_a_job_asked_for_are_those_of_its_process(start, tmp_path) -> None:
    """Since SLURM 22.05, srun does not take this number from the job."""
    start(0, env={"SLURM_CPUS_PER_TASK": "4"}).communicate(timeout=30)
    assert "srun --ntasks-per-node=1 --cpus-per-task=4 --cpu" in (tmp_path / "calls").read_text()


def test_an_array_puts_its_number_into_the_command(start, tmp_path) -> None:
    env = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "4"}
    job = start(0, env=env, command=["train", "--seed=%a", "runs/%a b"])
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert (tmp_path / "calls").read_text().endswith(" train --seed=4 runs/4 b\n")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("30:10", 1810),
        ("1:00:00", 3600),
        ("2-0", 172_800),
        ("1-01:30", 91_800),
        ("1-01:30:05", 91_805),
    ],
)
def test_the_time_limit_is_read_as_slurm_reads_it(time: str, seconds: int) -> None:
    assert time_limit_s(time) == seconds


@pytest.mark.parametrize(
    ("time", "message"),
    [
        ("soon", "--time=soon is not a time limit: set it to minutes, or as in 12:00:00"),
        ("6", "--time=6 is 360 s, and --save_s=300 of them are for saving: set --time to at least"),
    ],
)
def test_a_time_limit_that_cannot_work_is_refused(time: str, message: str) -> None:
    check_time("7", 300)
    check_time(None, 300)
    with pytest.raises(ConfigError, match=message):
        check_time(time, 300)


@pytest.mark.parametrize(
    ("limit", "seconds"), [("6:59", 419), ("0:30", 30), ("7:00", 420), ("1-00:00:00", None)]
)
def test_a_job_whose_partition_gives_it_no_time_to_train_ends(
    start, tmp_path: Path, limit: str, seconds: int | None
) -> None:
    """It would save at once and be queued again for ever. The stub `squeue` prints the limit."""
    (tmp_path / "state").write_text(f"{limit}\n")
    job = start(0)
    output, _ = job.communicate(timeout=30)
    if seconds is not None and seconds < 420:
        assert job.returncode == 2 and not (tmp_path / "calls").exists()
        assert output == (
            f"job 7: its time limit of {seconds} s leaves no time to train: "
            "set --time to 7 minutes or more\n"
        )
    else:
        assert job.returncode == 0 and calls(tmp_path) == ["srun"]


@pytest.mark.parametrize("answer", ["UNLIMITED\n", "7:00\n", "", "1-00:00:00\n5:00\n", "N/A\n"])
def test_a_partition_may_give_enough_time(answer: str) -> None:
    check_default_time(answer, 300)


def test_a_job_that_gets_too_little_time_is_cancelled_when_it_is_submitted(tmp_path: Path) -> None:
    for name, body in (("sbatch", "echo 7"), ("squeue", "echo 5:00"), ("scancel", 'echo "$@" >x')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = [f"--workdir={tmp_path}/run", "--nodes=1", "--", "x"]
    done = run(*words, path=str(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --time is not set, and the partition's default is 5:00, of which --save_s=300 "
        "seconds are for saving: set --time to at least 7 minutes\n"
    )
    assert (tmp_path / "x").read_text() == "7\n"


def run(
    *arguments: str, path: str = "/nowhere", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.slurm", *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


TINY = ("--nodes=2", "--workdir=runs/x", "--config=configs/moe_tiny.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            TINY,
            "sbatch is not installed on this machine: run this on a login node of the cluster, ",
        ),
        ((*TINY, "--gpus_per_node=5"), "train.batch_size=16 in 1 microbatches cannot be split"),
        ((*TINY, "--config.model.num_heads=3"), "model.num_heads=3 is not a multiple"),
        ((*TINY, "--array=0-3"), "--array=0-3 would train one run several times: write the"),
        (("--nodes=0", "--workdir=x", "--", "x"), "flag --nodes=0: 0 is not a positive integer"),
        (("--workdir=x", "--", "x"), "--nodes is missing: set --nodes=VALUE"),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done


def test_a_dry_run_prints_the_job_with_the_flags_of_train() -> None:
    words = ("--save_s", "60", "--init_from=runs/a", "--config.train.steps", "5", "--nodry_run")
    done = run(*TINY, *words, "--dry_run")
    assert done.returncode == 0, done
    assert "\n#SBATCH --signal=B:USR1@60\n" in done.stdout
    assert (
        "-m launch.train --workdir=runs/x --config=configs/moe_tiny.py --init_from=runs/a "
        "--config.train.steps 5)\n" in done.stdout
    )


@pytest.mark.parametrize(
    ("flag", "lines"),
    [
        ("--nodry_run", ["submitted job 7; its output: {}/7.log"]),
        ("--array=0-3", ["submitted job 7; its output: {}/7_*.log"]),
        (
            "--chain=2",
            [
                "submitted job 7; its output: {}/7.log",
                "submitted job 7 after the one before; its output: {}/7.log",
            ],
        ),
    ],
)
def test_a_submission_says_where_its_output_is(tmp_path: Path, flag: str, lines: list[str]) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho '7;cluster'\n")
    (tmp_path / "sbatch").chmod(0o755)
    done = run("--nodes=1", flag, f"--workdir={tmp_path}/run", "--", "x", path=str(tmp_path))
    assert done.stdout.splitlines() == [line.format(f"{tmp_path}/run/slurm") for line in lines]


def test_what_sbatch_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: error: no such partition >&2; exit 1")
    (tmp_path / "sbatch").chmod(0o755)
    done = run("--nodes=1", f"--workdir={tmp_path}/run", "--", "x", path=str(tmp_path))
    assert done.stderr == (
        f"error: sbatch refused {tmp_path}/run/slurm/job.sbatch: no such partition\n"
    )


def test_help_lists_the_flags_of_both_commands() -> None:
    done = run("--help")
    assert done.returncode == 0 and {"  --nodes=...", "  --init_from=..."} <= set(
        done.stdout.splitlines()
    )
