"""Real training under `launch.local`: equal to one process, and killed, stopped and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.report_hosts import read_host_lines
from moe.workdir.tracking import read_metrics
from tests.jobs import SMALL_MODEL, wait_for_step, wait_until

ROOT = Path(__file__).parents[2]
STEPS = 60
FLAGS = {
    **SMALL_MODEL,
    "data.sequence_length": 64,
    "mesh.fsdp": 4,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": 30,
    "train.eval_batches": 1,
    "train.checkpoint_every": 20,
    "tracking.tensorboard": False,
}
TIMED = {"train/tokens_per_second", "train/data_wait_fraction"}
GATED = "tests/launch/gated.py"
PREFIX = re.compile(r"[\dT:.-]+Z \S+ (\d+) \| ")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def train_command(
    workdir: Path, data_directory: str, config: str = "configs/dense_tiny.py", **changed
) -> list[str]:
    flags = FLAGS | {"data.directory": data_directory} | changed
    return [
        "launch.train",
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    ]


def start_local(
    command: list[str], *options: str, gate: Path | None = None, cwd: Path = ROOT
) -> subprocess.Popen[str]:
    """Starts a job of two processes, which wait in step 30 until the file `gate` is there."""
    launcher = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=2", *options]
    return subprocess.Popen(
        [*launcher, "--", *command],
        cwd=cwd,
        env=os.environ
        | {"GATE": f"30:{gate}", "MOE_STUCK_SECONDS": "600", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(workdir: Path) -> list[dict[str, float]]:
    lines = read_metrics(workdir)
    return [{name: line[name] for name in line.keys() - TIMED} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_directory: str) -> Path:
    """Returns the directory of a run over two processes, which nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("local") / "whole"
    process = start_local(train_command(workdir, data_directory))
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert output.count("loss: ") == 1  # process 0 alone prints the result
    assert error.startswith("2 x 2 cpu devices; process 0 is shown, and all will have logs in ")
    return workdir


def test_two_processes_with_two_devices_are_one_with_four(
    whole: Path, tmp_path: Path, data_directory: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *train_command(tmp_path / "one", data_directory)],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for got, expected in zip(losses(whole), losses(tmp_path / "one"), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def test_a_run_has_one_environment_and_a_log_of_each_process(whole: Path) -> None:
    (line,) = (whole / "environment.jsonl").read_text().splitlines()
    assert json.loads(line)["devices"]["processes"] == 2
    names = sorted(path.name for path in (whole / "logs").iterdir())
    assert names == ["process-00000.log", "process-00001.log"]
    for rank, name in enumerate(names):
        lines = (whole / "logs" / name).read_text().splitlines()
        assert {PREFIX.match(line)[1] for line in lines} == {str(rank)}  # type: ignore[index]
        assert f"process {rank} of 2 on " in lines[0]
        assert any(", 2 devices, coordinator 127.0.0.1:" in line for line in lines[1:])
        assert len(lines) < 50  # a bar is not hundreds of lines


def test_a_run_has_the_step_times_of_its_processes(whole: Path) -> None:
    lines = read_host_lines(whole)
    assert lines and {len(line.step_seconds) for line in lines} == {2}
    assert all((line.host_seconds <= line.step_seconds).all() for line in lines)


def find_process(workdir: Path, rank: int) -> int:
    """Returns the number of the system for a process of a job, by its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = str(workdir).encode() in (path / "cmdline").read_bytes()
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        is_command = b"log_writer.py" not in (path / "cmdline").read_bytes()
        if is_ours and is_command and f"JAX_PROCESS_ID={rank}".encode() in variables:
            return int(path.name)
    raise LookupError(f"no process {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_restarts_the_job_which_resumes(
    whole: Path, tmp_path: Path, data_directory: str, rank: int
) -> None:
    command, gate = train_command(tmp_path, data_directory, GATED), tmp_path / "open"
    process = start_local(command, "--restarts=1", gate=gate)
    wait_for_step(tmp_path, 25, process)
    os.kill(find_process(tmp_path, rank), signal.SIGKILL)
    gate.touch()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert f"process {rank} of 2 was killed by SIGKILL\n" in error
    assert "restart 1 of 1 in 1 s\n" in error
    log = (tmp_path / "logs" / f"process-{1 - rank:05d}.log").read_text()
    assert re.search(rf"\| process {rank} of 2 on \S+ died: this process ends too", log)
    assert losses(tmp_path) == losses(whole)
    assert len((tmp_path / "environment.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_saves_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path, data_directory: str
) -> None:
    command, gate = train_command(tmp_path, data_directory, GATED), tmp_path / "open"
    process = start_local(command, "--restarts=1", gate=gate)
    wait_for_step(tmp_path, 25, process)
    process.send_signal(signal.SIGINT)
    said = "stopping: this step is finished and saved first"
    log = tmp_path / "logs" / "process-00000.log"
    wait_until(lambda: said in log.read_text(), process)
    gate.touch()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75 and said in error, error
    again = start_local(command, gate=gate)
    _, error = again.communicate(timeout=600)
    assert again.returncode == 0, error
    assert losses(tmp_path) == losses(whole)


def test_an_evaluation_prints_json_alone(whole: Path, tmp_path: Path) -> None:
    """Gloo prints to the standard output when it connects the processes."""
    process = start_local(["launch.evaluate", f"--workdir={whole}"], cwd=tmp_path)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert json.loads(output)["step"] == STEPS, output


def test_bad_input_of_the_command_is_told_once(tmp_path: Path, data_directory: str) -> None:
    command = train_command(tmp_path, data_directory, **{"mesh.fsdp": 3})
    process = start_local(command, "--restarts=1")
    output, error = process.communicate(timeout=600)
    assert output == "" and error.count("error: ") == 1, error
