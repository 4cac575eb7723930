"""Run directories of an experiment, written without training."""

from collections.abc import Sequence
from pathlib import Path

from launch.sweep_file import Planned
from launch.sweep_table import write_result
from moe.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from moe.workdir.identity import write_config
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


class Rows:
    """Stands for the prepared rows of the data set: 10 rows of 64 tokens."""

    sequence_length = 64

    def __len__(self) -> int:
        return 10


def write_run(
    one: Planned,
    workdir: Path,
    losses: Sequence[float],
    router: Sequence[tuple[float, float]] = (),
    speeds: Sequence[float] = (),
    status: str = "finished",
) -> Planned:
    """Writes the directory and the result of a run as launch.sweep leaves them.

    `losses` are its validations, of which the last is that of the last step, `router` pairs of
    MaxVio and dropped fraction, and `speeds` tokens per second: each a logged value for every step
    from 1 on. A finished run needs `launch.sweep_table.open_split` to be replaced.
    """
    directory, steps = workdir / one.name, one.run.config.train.steps
    directory.mkdir(parents=True)
    write_config(directory, one.run.config)
    with MetricWriter(directory, one.run.config.tracking, step=0) as writer:
        for step, speed in enumerate(speeds, start=1):
            writer.write(step, {"train/loss": 3.0, "train/tokens_per_second": speed})
        for step, (max_vio, dropped) in enumerate(router, start=1):
            values = {"router/worst_max_vio": max_vio, "router/dropped_fraction": dropped}
            writer.write(step, {"train/loss": 3.0, **values})
        for step, loss in enumerate(losses, start=steps + 1 - len(losses)):
            writer.write(step, {"validation/loss": loss})
    write_result(one.run, workdir, status, "a version", None)
    return one
