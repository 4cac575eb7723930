"""Trains a model, or goes on with a run that was interrupted.

Examples:
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/dense_tiny
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/short --config.train.steps=100

A run directory holds config.json, environment.jsonl, metrics.jsonl, tensorboard/, checkpoints/ and run.lock, and of a model with experts
router.jsonl. The same command on an existing run directory goes on from its latest checkpoint, to the same numbers bit for bit. Ctrl-C
(SIGINT) and SIGTERM save before they stop.

Exit codes: 0 trained to the end; 2 bad input, told in one line; 3 stopped, since too many updates in a row were not finite; 75 interrupted
and saved, so that the same command goes on.
"""

import sys
from pathlib import Path

from absl import flags

from launch import command_line


def main(values: flags.FlagValues) -> int:
    config = command_line.read_run_config(values.config)
    workdir = Path(values.workdir)
    from moe.trainer import Diverged, Interrupted, fit  # loads JAX, which bad input need not wait for

    try:
        metrics = fit(config, workdir)
    except Diverged as error:
        print(f"diverged: {error}", file=sys.stderr)
        return command_line.DIVERGED
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return command_line.INTERRUPTED
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    print(f"The run is in {workdir}; draw it with: python -m launch.report --workdir={workdir}")
    return 0


if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The run directory: a new one, or one to go on with.")
    command_line.run(main, __doc__)
