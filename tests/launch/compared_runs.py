"""Run directories of an experiment, written without training."""

from collections.abc import Sequence

from launch.compare import Run
from moe.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.workdir.identity import write_about, write_config
from moe.workdir.tracking import MetricWriter

TINY = RunConfig(
    model=ModelConfig(
        num_layers=1, model_dim=16, feed_forward_dim=24, num_heads=2, num_kv_heads=1, head_dim=8
    ),
    data=DataConfig(sequence_length=64),
    optimizer=OptimizerConfig(learning_rate=0.05, warmup_fraction=0.25),
    train=TrainConfig(
        steps=4, batch_size=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=2
    ),
    tracking=TrackingConfig(tensorboard=False),
)


def write_run(
    run: Run,
    losses: Sequence[float],
    router: Sequence[tuple[float, float]] = (),
    speeds: Sequence[float] = (),
) -> Run:
    """Writes a run directory as fit() leaves it, and returns the run.

    `losses` are its validations, `router` pairs of MaxVio and dropped fraction, and `speeds` tokens
    per second: each a logged value for every step from 1 on.
    """
    run.workdir.mkdir(parents=True)
    write_config(run.workdir, run.config)
    with MetricWriter(run.workdir, run.config.tracking, step=0) as writer:
        for step, speed in enumerate(speeds, start=1):
            writer.write(step, {"train/loss": 3.0, "train/tokens_per_second": speed})
        for step, (max_vio, dropped) in enumerate(router, start=1):
            writer.write(
                step,
                {
                    "train/loss": 3.0,
                    "router/worst_max_vio": max_vio,
                    "router/dropped_fraction": dropped,
                },
            )
        for step, loss in enumerate(losses, start=1):
            writer.write(step, {"validation/loss": loss})
    finish(run)
    return run


def finish(run: Run) -> None:
    """Leaves what marks the last checkpoint as complete."""
    path = run.workdir / "checkpoints" / str(run.config.train.steps)
    path.mkdir(parents=True)
    write_about(path, {"step": run.config.train.steps})
