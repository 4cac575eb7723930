"""A run over two real processes against the same run in one: the same rows, losses and files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moe.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.training.trainer import fit, load_run
from moe.workdir.tracking import read_metrics
from tests.jobs import free_port
from tests.tiny import TINY_MODEL

ROOT = Path(__file__).parents[1]
CONFIG = RunConfig(
    model=dataclasses.replace(TINY_MODEL, num_layers=2),
    data=DataConfig(sequence_length=64),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=1 / 3),
    mesh=MeshConfig(data=2, fsdp=2),
    train=TrainConfig(
        steps=6, batch_size=8, log_every=1, eval_every=3, eval_batches=1, checkpoint_every=3
    ),
    tracking=TrackingConfig(tensorboard=False),
)
PROGRAM = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from moe.config import RunConfig
from moe.training.trainer import fit
fit(RunConfig.from_config_dict(json.loads(sys.argv[3])), Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, directory=str(tmp_path / "data"))
    )
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [str(free_port()), json.dumps(config.to_dict()), str(two)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, arguments[0], str(rank), *arguments[1:]],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    fit(config, one, jax.devices()[:4])
    for got, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        timed = {"train/tokens_per_second", "train/data_wait_fraction"}
        assert {name: got[name] for name in got.keys() - timed} == pytest.approx(
            {name: expected[name] for name in expected.keys() - timed}, rel=1e-4
        )
    assert len((two / "environment.jsonl").read_text().splitlines()) == 1
    assert load_run(two)[3] == 6
