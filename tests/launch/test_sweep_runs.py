"""Kills a sweep and its runs, as machines do, and looks whether the same command goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from launch.sweep_progress import last_step
from tests.jobs import let_it_stop, wait_until

ROOT = Path(__file__).parents[2]
SWEEP = """
from moe.config import RunConfig
from moe.scaling.experiments.sweep import Point
from tests.launch import gated

def get_config():
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=1, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1, head_dim=8
    )
    config.data.sequence_length = 64
    config.train.update(steps=400, batch_size=8, log_every=1, eval_every=400, eval_batches=1)
    config.train.update(checkpoint_every=20, keep_every=20)
    config.optimizer.update(schedule="wsd", warmup_steps=10)
    config.tracking.tensorboard = False
    return config

def get_sweep():
    yield Point("one", {})
    yield Point("two", {"seed": 1, "train.steps": 20})
    yield Point("fork", {"train.steps": 100}, "one", 80)
"""


def start(directory: Path, name: str, *flags: str, gate: int = 0) -> subprocess.Popen[str]:
    """Starts the sweep in a directory of this name. Its runs wait in the step `gate`."""
    path = directory / "sweep.py"
    path.write_text(SWEEP)
    words = [f"--sweep={path}", f"--workdir={directory / name}"]
    words += [f"--set=data.directory={directory / 'data'}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.sweep", *words],
        cwd=ROOT,
        env=os.environ | {"GATE": f"{gate}:{directory / 'open'}"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_steps(process: subprocess.Popen[str], run: Path) -> int:
    """Waits until a run has trained 20 steps more than ever, and returns its process's number."""
    before = last_step(run)[0]
    wait_until(lambda: last_step(run)[0] >= before + 20, process)
    found = re.match(r"process (\d+) on ", (run / "run.lock").read_text())
    assert found
    return int(found[1])


def finish(directory: Path, name: str, *flags: str) -> str:
    """Starts the sweep, and returns its output once it has ended well."""
    process = start(directory, name, *flags)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return output


def column(workdir: Path, name: str) -> list[Any]:
    return parquet.read_table(workdir / "runs.parquet").column(name).to_pylist()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seven processes start JAX and compile
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "killed"
    process = start(tmp_path, "killed", gate=30)
    child = wait_for_steps(process, workdir / "one")
    process.kill()  # as kill -9 does
    process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():  # the system kills the run with its sweep
        assert time.monotonic() < deadline
        time.sleep(0.01)

    # Killed alone, a run fails, and the next one begins.
    process = start(tmp_path, "killed", gate=60)
    os.kill(wait_for_steps(process, workdir / "one"), signal.SIGKILL)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert "failed: one: killed by SIGKILL" in output
    assert "failed: fork: one, from which it starts, is failed" in output
    assert column(workdir, "status") == ["failed", "finished", "failed"]

    process = start(tmp_path, "killed", gate=90)
    wait_for_steps(process, workdir / "one")
    process.send_signal(signal.SIGTERM)
    let_it_stop(process, workdir / "one", tmp_path / "open")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 75 and "1 interrupted" in output, errors
    assert "1 of 3 runs are done already" in errors
    finish(tmp_path, "killed")
    assert column(workdir, "status") == ["finished"] * 3
    starts = [
        (workdir / name / "environment.jsonl").read_text().count("\n") for name in ("one", "two")
    ]
    assert starts == [4, 1]

    # One job trains the same run and its fork without an interruption, and prints here.
    assert "validation/loss" in finish(tmp_path, "whole", "--index=0")
    output = finish(tmp_path, "whole", "--report_only")
    assert "3 runs: 2 finished, 1 waiting" in output
    losses = [column(tmp_path / name, "loss") for name in ("killed", "whole")]
    assert losses[0][::2] == losses[1][::2] and losses[1][1] is None
