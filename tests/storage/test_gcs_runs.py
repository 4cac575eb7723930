"""The commands on a run at gs://: it is trained, killed, paused, resumed and read."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe.exit_codes import UNREACHABLE, may_restart
from moe.storage.paths import RunPath, run_path
from moe.workdir.identity import checkpoint_steps
from moe.workdir.tracking import read_metrics
from tests.jobs import SMALL_MODEL
from tests.storage.conftest import VARIABLES, Emulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
# Runs a command with times of leases that a test can wait for.
START = """
import runpy, sys
from moe.storage import owner
owner.RENEW_SECONDS, owner.LEASE_SECONDS, owner.POLL_SECONDS = 1, 8, 0.2
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
FIELDS = {
    **SMALL_MODEL,
    "data.sequence_length": 32,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 20,
    "train.eval_every": 1000,
    "train.eval_batches": 1,
}


class Command:
    """Is a started command. It writes to files, since a full pipe would stop it."""

    def __init__(self, directory: Path, module: str, *flags: str) -> None:
        self.stdout, self.stderr = (
            directory / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")
        )
        with self.stdout.open("w") as stdout, self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, module, *flags],
                cwd=ROOT,
                stdout=stdout,
                stderr=stderr,
            )

    def result(self, code: int = 0) -> tuple[str, str]:
        """Waits for the command, and returns what it wrote to stdout and stderr."""
        assert self.process.wait(600) == code, (self.process.args, self.stderr.read_text())
        return self.stdout.read_text(), self.stderr.read_text()


class Commands:
    """Starts commands, and ends those that a test leaves."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.started = directory, []

    def start(self, module: str, *flags: str) -> Command:
        self.started.append(Command(self.directory, module, *flags))
        return self.started[-1]

    def train(self, workdir: str | Path, data: str, steps: int) -> Command:
        fields = FIELDS | {"train.steps": steps, "data.directory": data}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return self.start(
            "launch.train", "--config=tests/launch/gated.py", f"--workdir={workdir}", *flags
        )


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    for command in commands.started:
        command.process.kill()
        command.process.wait()


def wait_for_step(workdir: RunPath, step: int, command: Command) -> None:
    while not [saved for saved in checkpoint_steps(workdir / "checkpoints") if saved >= step]:
        assert command.process.poll() is None, command.stderr.read_text()
        time.sleep(0.2)


def losses(workdir: RunPath) -> list[tuple[int, float]]:
    return [
        (line["step"], line["train/loss"]) for line in read_metrics(workdir) if "train/loss" in line
    ]


def test_a_run_is_killed_resumed_and_read(
    commands: Commands,
    workdir: str,
    tmp_path: Path,
    data_directory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local, gate = tmp_path / "run", tmp_path / "open"
    commands.train(local, data_directory, 300).result()
    monkeypatch.setenv("GATE", f"150:{gate}")  # the run does not end before it is killed
    first = commands.train(workdir, data_directory, 300)
    directory, holder = run_path(workdir), f"process {first.process.pid} on "
    wait_for_step(directory, 20, first)
    _, error = commands.train(workdir, data_directory, 300).result(code=2)
    assert re.search(rf"is being written by {holder}.*: wait until it ends", error)
    first.process.kill()
    gate.touch()
    _, error = commands.train(workdir, data_directory, 300).result()
    assert f"to see whether {holder}" in error
    # The run reads as one that was never interrupted.
    assert losses(directory) == losses(local)
    saved = [checkpoint_steps(place / "checkpoints") for place in (directory, local)]
    assert saved[0] == saved[1]
    assert len((directory / "environment.jsonl").read_text().splitlines()) == 2

    places = (workdir, local)
    evaluated = [
        commands.start("launch.evaluate", f"--workdir={place}").result()[0] for place in places
    ]
    assert evaluated[0] == evaluated[1] and json.loads(evaluated[0])["step"] == 300
    flags = ("--prompt=def ", "--max_new_tokens=5")
    assert "def " in commands.start("launch.generate", f"--workdir={workdir}", *flags).result()[0]
    commands.start("launch.report", f"--workdir={workdir}").result()
    assert (directory / "report" / "index.html").read_text().count("<picture>") > 3


@pytest.mark.timeout(1800)  # Google's clients try again for a long time
def test_a_store_that_does_not_answer_has_a_code_that_is_restarted(
    commands: Commands, emulator: Emulator, data_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run, at its start, and for a command that reads it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, emulator.address)
    workdir = "gs://bucket-one/run"
    run = commands.train(workdir, data_directory, 100_000)
    while b"about.json" not in emulator.names():
        assert run.process.poll() is None, run.stderr.read_text()
        time.sleep(0.2)
    emulator.process.kill()
    again = commands.train(workdir, data_directory, 100_000)
    reader = commands.start("launch.evaluate", f"--workdir={workdir}")
    for command in (again, reader, run):
        _, error = command.result(code=UNREACHABLE)
        assert may_restart(UNREACHABLE)
        assert re.search(r"^unreachable: .*(gs://bucket-one|Connect)", error, re.MULTILINE), error
        assert "Traceback" not in error and "error: " not in error


def test_an_owner_that_wakes_after_its_run_was_taken_stops(
    commands: Commands, workdir: str, data_directory: str
) -> None:
    paused = commands.train(workdir, data_directory, 100_000)
    directory = run_path(workdir)
    wait_for_step(directory, 20, paused)
    paused.process.send_signal(signal.SIGSTOP)
    before = max(checkpoint_steps(directory / "checkpoints"))
    taker = commands.train(workdir, data_directory, 100_000)
    wait_for_step(directory, before + 1, taker)
    paused.process.send_signal(signal.SIGCONT)
    _, error = paused.result(code=2)
    assert re.search(rf"error: .* was taken over by process {taker.process.pid} on .*\n$", error)
    assert error.count("error:") == 1 and "Traceback" not in error
    taker.process.terminate()
    taker.result(code=75)
    steps = [step for step, _ in losses(directory)]
    assert steps == list(range(1, len(steps) + 1))
