"""Jobs of launch.slurm on a real SLURM, whose two nodes are on this machine: pytest -m slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet

from moe.workdir.tracking import read_metrics
from tests.launch.slurm_cluster import Cluster, cluster, why_not
from tests.launch.test_runs import SMALL

ROOT = Path(__file__).parents[2]
# Its last run waits in step 30 until the test opens the gate.
SWEEP = """
from moe.config import RunConfig
from moe.scaling.experiments.sweep import Point
from tests.launch import gated

def get_config():
    config = RunConfig.config_dict()
    config.update_from_flattened_dict({fields})
    config.train.update(steps=5, eval_every=5, checkpoint_every=5)
    return config

def get_sweep():
    yield Point("short", {{"train.steps": 4}})
    yield Point("wide", {{"model.feed_forward_dim": 32}})
    yield Point("long", {{"train.steps": 60, "train.eval_every": 60}})
"""
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


class Run:
    """A run of the tiny model, and the jobs that train it."""

    def __init__(self, slurm: Cluster, directory: Path, data_directory: str):
        self._slurm, self._data_directory = slurm, data_directory
        self.directory = directory

    def submit(self, *arguments: str, steps: int = 100_000) -> str:
        """Submits a job of two nodes, and returns its id."""
        fields = SMALL | {
            "train.steps": steps,
            "train.eval_every": steps,
            "train.checkpoint_every": steps,
            "data.directory": self._data_directory,
            "tracking.tensorboard": False,
        }
        return submit(
            self._slurm,
            f"--workdir={self.directory}",
            "--config=tests/launch/gated.py",
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *arguments,
        )

    def log(self, job: str) -> str:
        return read_log(self.directory / "slurm" / f"{job}.log")

    def steps(self) -> list[int]:
        """Returns the steps that metrics.jsonl has, in its order, without the evaluations."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line["step"] for line in whole if "train/loss" in line]

    def saved(self) -> list[int]:
        return [int(path.parent.name) for path in self.directory.glob("checkpoints/*/about.json")]

    def wait_for_step(self, job: str, step: int) -> None:
        wait(lambda: max(self.steps(), default=0) >= step, lambda: self.log(job))

    def wait_for_log(self, job: str, words: str, times: int = 1) -> None:
        wait(lambda: self.log(job).count(words) >= times, lambda: self.log(job))


def read_log(path: Path) -> str:
    """Returns the log of a job. One that is being written may end within a character."""
    return path.read_text(errors="replace") if path.exists() else "the job has not started"


def submit(slurm: Cluster, *arguments: str, nodes: int = 2) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm", f"--nodes={nodes}", "--backoff_s=1", *arguments],
        cwd=ROOT,
        env=slurm.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    return done.stdout.split()[2].rstrip(";")


def wait(is_true, describe, timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


@pytest.fixture
def run(slurm: Cluster, tmp_path: Path, data_directory: str) -> Iterator[Run]:
    yield Run(slurm, tmp_path / "a run", data_directory)
    for job in slurm.run("squeue", "--noheader", "--format=%i").split():
        slurm.run("scancel", "--full", "--signal=KILL", job)
        slurm.run("scancel", job)


def test_a_job_of_two_nodes_trains_to_its_end(slurm: Cluster, run: Run) -> None:
    job = run.submit(steps=5)
    slurm.wait_for(job, "COMPLETED", run.log)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert run.saved() == [5] and "ended with exit code 0" in run.log(job)
    assert "process 1 of 2" in (run.directory / "logs" / "process-00001.log").read_text()


def test_a_cancelled_job_saves(slurm: Cluster, run: Run) -> None:
    job = run.submit()
    run.wait_for_step(job, 3)
    slurm.run("scancel", job)
    run.wait_for_log(job, "ended with exit code 75")
    slurm.wait_for(job, "CANCELLED", run.log)
    assert run.saved() == [run.steps()[-1]]


def test_a_preempted_job_is_queued_again_and_resumes(slurm: Cluster, run: Run) -> None:
    """And once more when its time limit is near. All of it is one run, with each step once."""
    job = run.submit()
    run.wait_for_step(job, 3)
    urgent = submit(
        slurm, "--partition=urgent", f"--workdir={run.directory}/urgent", "--", "sleep", "1"
    )
    slurm.wait_for(urgent, "COMPLETED", run.log)
    saved = max(run.saved())
    run.wait_for_step(job, saved + 3)
    assert slurm.state(job)["Restarts"] == "1"
    told = run.log(job).count("the job is queued again")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    run.wait_for_log(job, "the job is queued again", told + 1)
    saved = max(run.saved())
    run.wait_for_step(job, saved + 3)
    assert slurm.state(job)["Restarts"] == "2"
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    slurm.wait_for(job, "FAILED", run.log)
    assert "submit the same command again to go on" in run.log(job)
    assert run.steps() == list(range(1, max(run.saved()) + 1))


def test_a_killed_process_starts_the_job_again(
    slurm: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = run.directory.with_name("open")
    monkeypatch.setitem(slurm.environment, "GATE", f"50:{gate}")
    job = run.submit("--config.train.checkpoint_every=20", steps=100)
    wait(lambda: max(run.saved(), default=0) >= 20, lambda: run.log(job))
    os.kill(process_id(job, rank=1), signal.SIGKILL)
    gate.touch()
    run.wait_for_log(job, "restart 1 of 3 in 1 s")
    slurm.wait_for(job, "COMPLETED", run.log)
    assert slurm.state(job)["Restarts"] == "0"  # SLURM has seen one start only
    assert run.steps() == list(range(1, 101))


def process_id(job: str, rank: int) -> int:
    """Returns the id of the process of launch.train with this rank in a job."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_text().split("\0")
            words = (path / "cmdline").read_text().split("\0")
        except OSError:
            continue  # it has ended, or is not ours
        is_rank = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"} <= set(variables)
        if is_rank and words[1:3] == ["-m", "launch.train"]:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank} in job {job}")


def test_an_array_runs_a_command_of_the_user(slurm: Cluster, tmp_path: Path) -> None:
    """Its second element fails once."""
    command = "echo $0 of $SLURM_ARRAY_TASK_COUNT; [ $0 != 1 ] || [ -e again ] || ! touch again"
    job = submit(
        slurm,
        "--array=0-2%2",
        f"--workdir={tmp_path}",
        f"--sbatch=--chdir={tmp_path}",
        "--",
        "bash",
        "-c",
        command,
        "%a",
        nodes=1,
    )
    logs = [tmp_path / "slurm" / f"{job}_{element}.log" for element in range(3)]
    read = lambda: [read_log(log) for log in logs]
    wait(lambda: all("exit code 0" in text for text in read()), read)
    for element, text in enumerate(read()):
        assert f"\n{element} of 3\n" in text
        assert ("restart 1 of 3" in text) == (element == 1)


def test_a_sweep_is_trained_as_an_array(
    slurm: Cluster, tmp_path: Path, data_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes train at once, and one element is queued again. One table has all runs."""
    gate = tmp_path / "open"
    monkeypatch.setitem(slurm.environment, "GATE", f"30:{gate}")
    file = tmp_path / "sweep.py"
    fields = SMALL | {"data.directory": data_directory, "tracking.tensorboard": False}
    file.write_text(SWEEP.format(fields=fields))
    workdir = tmp_path / "runs"
    words = ("launch.sweep", f"--sweep={file}", f"--workdir={workdir}")
    arguments = ("--array=0-2", f"--workdir={workdir}", "--", *words, "--index=%a")
    job = submit(slurm, *arguments, nodes=1)
    logs = [workdir / "slurm" / f"{job}_{element}.log" for element in range(3)]
    read = lambda: [read_log(log) for log in logs]
    wait(lambda: (workdir / "long" / "metrics.jsonl").exists(), read)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    wait(lambda: "stopping: this step is finished" in read()[2], read)
    gate.touch()
    wait(lambda: all("ended with exit code 0" in text for text in read()), read)
    assert [text.count("the job is queued again") for text in read()] == [0, 0, 1]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--report_only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done
    rows = parquet.read_table(workdir / "runs.parquet").to_pylist()
    assert [(row["run"], row["status"]) for row in rows] == [
        ("short", "finished"),
        ("wide", "finished"),
        ("long", "finished"),
    ]
    assert len({row["loss"] for row in rows}) == 3
    steps = [line["step"] for line in read_metrics(workdir / "long") if "train/loss" in line]
    assert steps == list(range(1, rows[2]["steps"] + 1))


def test_a_chain_goes_on_after_any_end(slurm: Cluster, tmp_path: Path) -> None:
    submit(slurm, "--chain=2", f"--workdir={tmp_path}", "--", "bash", "-c", "exit 3")
    ended = lambda: [read_log(log) for log in (tmp_path / "slurm").glob("*.log")]
    wait(lambda: sum("ended with exit code 3" in log for log in ended()) == 2, ended)


def test_a_job_with_a_short_default_time_is_refused(slurm: Cluster, tmp_path: Path) -> None:
    """When it is submitted, and also when somebody has submitted its file by hand."""
    words = ["--partition=short", f"--workdir={tmp_path}", "--", "sleep", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm", "--nodes=1", *words],
        cwd=ROOT,
        env=slurm.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "the partition's default is 5:00, of which" in done.stderr
    assert slurm.run("squeue", "--noheader", "--states=PENDING,RUNNING") == ""
    file = str(tmp_path / "slurm" / "job.sbatch")
    job = slurm.run("sbatch", "--parsable", file).strip()
    log = tmp_path / "slurm" / f"{job}.log"
    read = lambda _: read_log(log)
    slurm.wait_for(job, "FAILED", read)
    assert "its time limit of 300 s leaves no time to train: set --time to 7 min" in read(job)
    assert slurm.state(job)["ExitCode"] == "2:0"
    job = slurm.run("sbatch", "--parsable", "--time=8", file).strip()
    slurm.wait_for(job, "COMPLETED", read)


def test_a_mistake_is_told_once(slurm: Cluster, tmp_path: Path) -> None:
    command = ("launch.train", "--config=configs/dense_tiny.py", "--workdir=x", "--stpes=3")
    job = submit(slurm, f"--workdir={tmp_path}", "--", *command)
    log = tmp_path / "slurm" / f"{job}.log"
    slurm.wait_for(job, "FAILED", lambda _: read_log(log))
    assert read_log(log).count("error: --stpes is not a flag") == 1
    assert read_log(log).count("Exited with exit code 2") == 2
    (ROOT / "logs" / "train" / "process-00001.log").unlink()


def test_a_signal_reaches_one_element_of_an_array(slurm: Cluster, tmp_path: Path) -> None:
    """The last element has the id of the whole array, so it is the one that could go wrong."""
    # It ends at SIGTERM, or if it has been queued again, or else when the file `end` is there.
    command = (
        "trap 'exit 75' TERM; echo begun; [ $SLURM_RESTART_COUNT ] || "
        "while [ ! -e end ]; do sleep 0.1; done"
    )
    arguments = ("--array=0-1", f"--workdir={tmp_path}", f"--sbatch=--chdir={tmp_path}")
    job = submit(slurm, *arguments, "--", "bash", "-c", command, nodes=1)
    logs = [tmp_path / "slurm" / f"{job}_{element}.log" for element in range(2)]
    read = lambda: [read_log(log) for log in logs]
    wait(lambda: all("begun" in text for text in read()), read)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    wait(lambda: "ended with exit code 0" in read()[1], read)
    assert "the job is queued again" in read()[1] and "ended" not in read()[0]
    (tmp_path / "end").touch()
    wait(lambda: "ended with exit code 0" in read()[0], read)
    assert "queued again" not in read()[0]
