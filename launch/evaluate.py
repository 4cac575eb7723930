"""Evaluates a run's checkpoint on all of a split: loss in nats per token, and bits per byte of
text.

Examples:
    python -m launch.evaluate --workdir=runs/dense_tiny
    python -m launch.evaluate --workdir=runs/dense_tiny --step=500 --split=train

All devices of this machine share the work, however the run was laid out. Prints one JSON object; of
a model with experts it has their load's max_vio and load_entropy and the dropped_fraction too, as
means over the sparse layers.
"""

import dataclasses
import json
import math
from pathlib import Path

from absl import flags

from launch import command_line
from moe.config import ConfigError


def evaluate(workdir: Path, step: int | None = None, split: str | None = None) -> dict[str, float]:
    """`loss` and `bits_per_byte` of a run's checkpoint (the latest) on all of a split (the
    validation split), and the `step`.

    For sparse layers also the statistics of their load that `evaluation.evaluate` gives. Raises
    ConfigError where a number is not finite.
    """
    from moe.training import evaluation, trainer  # load JAX, which --help need not wait for

    config, program, variables, step = trainer.load_run(workdir, step)
    rows = program.task.rows(config, split or config.data.validation_split)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=0))
    result = evaluation.evaluate(config, program, variables, rows)
    for name, value in result.items():
        if not math.isfinite(value):
            raise ConfigError(
                f"{workdir / 'checkpoints' / str(step)} has a {name} that is not finite: set --step to an earlier checkpoint"
            )
    return {"step": step, **result}


def main(values: flags.FlagValues) -> None:
    print(json.dumps(evaluate(Path(values.workdir), values.step, values.split), allow_nan=False))


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_string(
        "split", None, "The split to evaluate on; the config's validation split by default."
    )
    command_line.run(main, __doc__)
