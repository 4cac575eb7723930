"""Evaluates a run's checkpoint on a whole split: loss in nats per token, and bits per byte.

Examples:
    python -m launch.evaluate --workdir=runs/dense_tiny
    python -m launch.evaluate --workdir=runs/dense_tiny --step=500 --split=train

All devices of this machine share the work, however the run was laid out. Prints one JSON object.
For a model with experts it also has max_vio and load_entropy, which say how even the experts' load
is, and dropped_fraction, all as means over the sparse layers. For a run on a mixture, the numbers
are those of all sources together, and NAME/loss and so on are those of the source NAME.
"""

import dataclasses
import json
import math

from absl import flags

from launch import command_line
from moe.config import ConfigError
from moe.data.sources import check_dataset
from moe.storage.paths import RunPath, run_path
from moe.workdir.identity import read_config


def evaluate(
    workdir: RunPath, step: int | None = None, split: str | None = None
) -> dict[str, float]:
    """Returns `step`, `loss` and `bits_per_byte` of a checkpoint (the latest) on a whole split.

    The split is the validation split by default. A model with sparse layers adds the statistics of
    their load. Raises ConfigError for an unknown run, step or split, and where a number is not
    finite.
    """
    data = read_config(workdir).data
    data = data.with_validation_split(split) if split else data
    check_dataset(data)
    # These load JAX, which bad input need not wait for.
    from moe.data.mixtures import open_validation
    from moe.training import evaluation, trainer

    config, program, variables, step = trainer.load_run(workdir, step)
    train = dataclasses.replace(config.train, eval_batches=0)
    # The run's own copy of its tokenizer is in the config that `load_run` returns.
    data = dataclasses.replace(data, tokenizer=config.data.tokenizer)
    config = dataclasses.replace(config, train=train, data=data)
    rows = open_validation(config, program.task.rows)
    result = evaluation.evaluate_sources(config, program, variables, rows)
    for name, value in result.items():
        if not math.isfinite(value):
            raise ConfigError(
                f"{workdir / 'checkpoints' / str(step)} has a {name} that is not finite: "
                "set --step to an earlier checkpoint"
            )
    return {"step": step, **result}


def main(values: flags.FlagValues) -> None:
    result = evaluate(run_path(values.workdir), values.step, values.split)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    command_line.define_workdir("The run directory, as given to launch.train.")
    flags.DEFINE_integer("step", None, "The checkpoint's step; the latest by default.")
    flags.DEFINE_string(
        "split", None, "The split to evaluate on; the config's validation split by default."
    )
    command_line.run(main, __doc__, devices=True)
