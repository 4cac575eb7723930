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

ROOT = Path(__file__).parents[2]
SWEEP = """
from moe.config import RunConfig
from moe.scaling.sweep import Point

def get_config():
    config = RunConfig.config_dict()
    config.model.update(
        num_layers=1, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1, head_dim=8
    )
    config.data.sequence_length = 64
    config.train.update(steps=400, batch_size=8, log_every=1, eval_every=400, eval_batches=1)
    config.train.update(checkpoint_every=20, keep_last=1)
    config.tracking.tensorboard = False
    return config

def get_sweep():
    yield Point("one", {})
    yield Point("two", {"seed": 1, "train.steps": 20})
"""


def start(directory: Path, name: str, *flags: str) -> subprocess.Popen[str]:
    """Starts the sweep in a directory of this name."""
    path = directory / "sweep.py"
    path.write_text(SWEEP)
    words = [f"--sweep={path}", f"--workdir={directory / name}"]
    words += [f"--set=data.directory={directory / 'data'}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.sweep", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> int:
    """Waits until a run has logged a step, and returns the number of its process."""
    deadline = time.monotonic() + 400
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
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
    process = start(tmp_path, "killed")
    child = wait_for_step(process, workdir / "one", 25)
    process.kill()  # as kill -9 does
    process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():  # the system kills the run with its sweep
        assert time.monotonic() < deadline
        time.sleep(0.01)

    # Killed alone, a run fails, and the next one begins.
    process = start(tmp_path, "killed")
    os.kill(wait_for_step(process, workdir / "one", 60), signal.SIGKILL)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 1, errors
    assert "failed: one: killed by SIGKILL" in output and column(workdir, "status")[1] == "finished"

    process = start(tmp_path, "killed")
    wait_for_step(process, workdir / "one", 100)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 75 and "1 interrupted" in output, errors
    assert "1 of 2 runs are done already" in errors

    finish(tmp_path, "killed")
    assert column(workdir, "status") == ["finished", "finished"]
    starts = (workdir / "one" / "environment.jsonl").read_text().splitlines()
    assert (
        len(starts) == 4 and len((workdir / "two/environment.jsonl").read_text().split("\n")) == 2
    )

    # One job trains the same run without an interruption, and prints where it is started.
    output = finish(tmp_path, "whole", "--index=0")
    assert "validation/loss" in output
    assert "2 runs: 1 finished, 1 waiting" in finish(tmp_path, "whole", "--report_only")
    assert column(workdir, "loss")[0] == column(tmp_path / "whole", "loss")[0]
