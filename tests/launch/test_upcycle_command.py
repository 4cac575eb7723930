"""The upcycling command on a small dense run.

What it writes is a run at step 0 that evaluates as the dense one does, and trains on.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.evaluate import evaluate
from launch.upcycle import upcycle
from moe.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.training.train_step import make_program
from moe.training.trainer import fit
from moe.workdir import checkpoint
from moe.workdir.identity import read_config
from moe.workdir.tracking import read_metrics

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    num_layers=2,
    model_dim=16,
    feed_forward_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    compute_dtype="float32",
)
MOE = MoEConfig(num_experts=4, expert_dim=16, first_dense_layers=1, bias_update_rate=0.001)


@pytest.fixture(scope="module")
def dense(data_directory):
    return RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=64, directory=data_directory),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_fraction=1 / 6),
        train=TrainConfig(
            steps=6, batch_size=8, log_every=1, eval_every=6, eval_batches=2, checkpoint_every=3
        ),
        tracking=TrackingConfig(tensorboard=False),
    )


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    fit(dense, workdir)
    return workdir


@pytest.fixture(scope="module")
def config(dense):
    return dataclasses.replace(dense, seed=1, model=dataclasses.replace(MODEL, moe=MOE))


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, 3])
def test_an_upcycled_run_evaluates_as_the_dense_one_and_trains_on(
    source, dense, config, tmp_path, step
):
    dense_run, sparse_run = tmp_path / "dense", tmp_path / "sparse"
    upcycle(source, config, sparse_run, step=step)
    before, after = evaluate(source, step), evaluate(sparse_run)
    assert (before["step"], after["step"]) == (step or 6, 0)
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    fit(config, sparse_run)
    # The dense run that goes on from the same parameters sees the same first batch.
    fit(dataclasses.replace(dense, seed=config.seed), dense_run, init_from=source, init_step=step)
    dense_losses, sparse_losses = (
        [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]
        for run in (dense_run, sparse_run)
    )
    assert sparse_losses[0] == pytest.approx(dense_losses[0], rel=1e-5)
    assert len(sparse_losses) == 6 and evaluate(sparse_run)["step"] == 6
    assert evaluate(sparse_run)["loss"] < after["loss"]


@pytest.mark.slow
def test_everything_but_the_parameters_is_as_in_a_new_run(source, config, tmp_path):
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=2, expert=2, tensor=2)
    )
    upcycle(source, config, tmp_path, noise=0.1)
    program = make_program(config)
    with checkpoint.read_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [0]
        state = checkpoint.restore(checkpoints, program.abstract_state)
    new = program.init_state()
    assert np.any(state.params["embedding"] != new.params["embedding"])
    jax.tree.map(np.testing.assert_array_equal, state.replace(params={}), new.replace(params={}))
    assert read_config(tmp_path) == config
    assert len((tmp_path / "environment.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_refused_upcycling_leaves_no_directory(source, config, tmp_path):
    new = tmp_path / "new"
    wrong = dataclasses.replace(
        config, model=dataclasses.replace(config.model, moe=dataclasses.replace(MOE, expert_dim=12))
    )
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_dim=12 does not divide"):
        upcycle(source, wrong, new)
    with pytest.raises(
        ConfigError, match=r"no checkpoint of step 5: choose one of its steps \(3, 6\)"
    ):
        upcycle(source, config, new, step=5)
    assert not new.exists()


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_named_with_its_step(
    source, config, tmp_path, monkeypatch
):
    restore = checkpoint.restore_variables_and_step

    def broken(*arguments):
        variables, step = restore(*arguments)
        return jax.tree.map(lambda leaf: leaf * np.nan, variables), step

    monkeypatch.setattr(checkpoint, "restore_variables_and_step", broken)
    for asked, step in ((3, 3), (None, 6)):
        with pytest.raises(ConfigError, match=rf"checkpoints/{step} holds numbers that are not"):
            upcycle(source, config, tmp_path / "new", step=asked)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_upcycling_that_is_cut_off_leaves_no_run(source, config, tmp_path, monkeypatch):
    """Wherever it ends, the directory is refused: launch.train would train it from scratch."""
    from moe.training import trainer
    from moe.workdir import tracking

    for number, (module, name) in enumerate(
        [(checkpoint, "open_checkpoints"), (checkpoint, "save"), (tracking, "write_environment")]
    ):
        workdir = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                upcycle(source, config, workdir)
        reason = r"launch\.upcycle from .* did not finish"
        with pytest.raises(
            ConfigError, match=rf"is no run yet \({reason}\): delete it, and make it again"
        ):
            trainer.fit(config, workdir)


def test_wrong_paths_and_noise_are_refused(tmp_path):
    (tmp_path / "dense" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ConfigError,
        match=r"--from=.*/none holds no checkpoint: set --from to the directory of a dense run",
    ):
        upcycle(tmp_path / "none", RunConfig(), tmp_path / "new")
    with pytest.raises(
        ConfigError, match=r"--workdir=.* is not empty: set --workdir to a new directory"
    ):
        upcycle(tmp_path / "dense", RunConfig(), tmp_path)
    for noise in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"--noise=.*: set --noise to 0\.0 or more"):
            upcycle(tmp_path / "dense", RunConfig(), tmp_path / "new", noise=noise)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.upcycle", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_the_command_line(source, dense, tmp_path):
    done = run("--help")
    assert done.returncode == 0 and "python -m launch.upcycle --from=runs/dense_tiny" in done.stdout
    done = run("--config=configs/dense_tiny.py", f"--workdir={tmp_path}/new")
    assert (done.returncode, done.stderr) == (2, "error: --from is missing: set --from=VALUE\n")
    fields = {
        "num_layers": 2,
        "model_dim": 16,
        "feed_forward_dim": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    fields |= {"moe.num_experts": 4, "moe.expert_dim": 32}
    flags = [f"--config.model.{name}={value}" for name, value in fields.items()] + [
        f"--config.data.directory={dense.data.directory}"
    ]
    done = run(
        f"--from={source}",
        "--step=3",
        f"--workdir={tmp_path}/new",
        "--config=configs/dense_tiny.py",
        *flags,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/new is at step 0; train on")
    assert evaluate(tmp_path / "new")["step"] == 0
    done = run(
        f"--from={source}", f"--workdir={tmp_path}/new", "--config=configs/dense_tiny.py", *flags
    )
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: --workdir={tmp_path}/new is not empty"
    ), done.stderr
