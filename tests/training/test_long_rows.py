"""Rows of 32,768 tokens train on a machine of a few GiB."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.workdir.tracking import read_metrics

ROOT = Path(__file__).parents[2]
LENGTH = 32_768
# The attention of a layer alone would have 4 GiB of scores in float32, and all logits 32 MiB for
# each width of 256.
LIMIT_GIB = 2.0
FIELDS = {
    "data.sequence_length": LENGTH,
    "model.num_layers": 2,
    "model.model_dim": 64,
    "model.feed_forward_dim": 176,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 32,
    "model.remat": "full",
    "train.loss_chunk": 512,
    "train.batch_size": 1,
    "train.steps": 2,
    "train.log_every": 1,
    "train.eval_batches": 1,
    "tracking.tensorboard": False,
}
# Runs a command, and then says how much memory it had at most, in KiB.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rows_of_32k_tokens_train_with_remat_and_chunks_of_the_loss(tmp_path, data_directory):
    """The rows hold many packed files of the standard library."""
    command = [sys.executable, "-m", "launch.train", "--config=configs/dense_tiny.py"]
    flags = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    flags += [f"--workdir={tmp_path}", f"--config.data.directory={data_directory}"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *command, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split("peak")[-1]) / 2**20
    print(f"{peak:.2f} GiB at most")
    losses = [line["train/loss"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[1] < losses[0]
    assert peak < LIMIT_GIB
