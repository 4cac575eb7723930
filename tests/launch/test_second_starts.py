"""A second start on a run that is being trained: by a person, and by a scheduler."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.workdir.tracking import read_metrics
from tests.jobs import SMALL_MODEL, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
FIELDS = {
    **SMALL_MODEL,
    "data.sequence_length": 64,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.steps": 1_000_000,
    "train.eval_every": 1_000_000,
    "train.checkpoint_every": 1_000_000,
    "tracking.tensorboard": False,
}
TWO = ["launch.local", "--processes=2", "--", "launch.train"]


class Start:
    """A started command. It writes to a file, since a full pipe would stop it."""

    def __init__(self, directory: Path, words: list[str], **environment: str):
        self.path = directory / f"{time.monotonic_ns()}.err"
        variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
        with self.path.open("w") as error:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=directory,
                env=variables | environment,
                stdout=subprocess.DEVNULL,
                stderr=error,
            )

    @property
    def error(self) -> str:
        return self.path.read_text()

    def result(self, code: int) -> str:
        assert self.process.wait(600) == code, self.error
        return self.error

    def wait_for(self, text: str) -> None:
        while text not in self.error:
            assert self.process.poll() is None, self.error
            time.sleep(0.05)


class Starts:
    def __init__(self, directory: Path, data_directory: str):
        self.directory, self.run = directory, directory / "run"
        fields = FIELDS | {"data.directory": data_directory}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        self.flags = [
            *(f"--config={ROOT}/configs/dense_tiny.py", f"--workdir={self.run}", *flags),
        ]
        self.started: list[Start] = []

    def __call__(self, words: list[str], **environment: str) -> Start:
        self.started.append(Start(self.directory, [*words, *self.flags], **environment))
        return self.started[-1]

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        lines = read_metrics(self.run) if path.exists() else []
        return max((line["step"] for line in lines), default=0)

    def wait_for_step(self, step: int, start: Start) -> None:
        while self.steps() < step:
            assert start.process.poll() is None, start.error
            time.sleep(0.05)

    def logged(self, rank: int) -> str:
        return (self.run / "logs" / f"process-{rank:05d}.log").read_text()


@pytest.fixture
def starts(tmp_path: Path, data_directory: str) -> Iterator[Starts]:
    starts = Starts(tmp_path, data_directory)
    yield starts
    for start in starts.started:
        start.process.kill()
        start.process.wait()


def test_a_person_is_refused_and_a_scheduler_waits(starts: Starts) -> None:
    first = starts(TWO)
    starts.wait_for_step(3, first)
    assert not list((starts.directory / "logs").rglob("*.log"))  # they have moved to the run
    before = {path.name for path in starts.run.iterdir()}

    error = starts(TWO).result(code=2)
    assert re.search(r"error: \S+ is being written by process \d+ on \S+: wait until it", error)
    assert error.count("error: ") == 1 and "waiting up to" not in error
    left = sorted((starts.directory / "logs").rglob("*.log"))
    assert [path.name for path in left] == ["process-00000.log", "process-00001.log"]
    # A process waits for a second at its end until its log is written.
    wait_until(lambda: all("error: " in path.read_text() for path in left))
    assert {path.name for path in starts.run.iterdir()} == before
    assert [starts.logged(rank).count(" starts: ") for rank in (0, 1)] == [1, 1]

    again = starts(TWO, SLURM_RESTART_COUNT="1")
    again.wait_for(f"no longer writes {starts.run}\n")
    assert re.search(r"\nwaiting up to 300 s until process \d+ on \S+ no longer w", again.error)
    first.process.send_signal(signal.SIGTERM)
    first.result(code=75)
    starts.wait_for_step(starts.steps() + 1, again)
    again.process.send_signal(signal.SIGTERM)
    assert again.result(code=75).count("waiting up to") == 1
    steps = [line["step"] for line in read_metrics(starts.run)]
    assert steps == list(range(1, len(steps) + 1))
    assert [starts.logged(rank).count(" starts: ") for rank in (0, 1)] == [2, 2]


def test_a_signal_ends_the_wait_of_a_scheduler(starts: Starts) -> None:
    first = starts(["launch.train"])
    starts.wait_for_step(1, first)
    again = starts(["launch.train"], MOE_RESTART_COUNT="1")
    again.wait_for("no longer writes")
    again.process.send_signal(signal.SIGTERM)
    assert again.result(code=75).endswith("interrupted: before there was anything to save\n")
    assert first.process.poll() is None
