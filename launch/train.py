"""Trains a model, or goes on with a run that was interrupted.

Examples:
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/dense_tiny
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/short \\
        --config.train.steps=100
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/short \\
        --config.train.steps=150
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/fine_tuned \\
        --init_from=runs/dense_tiny --init_step=400

A run directory holds config.json, environment.jsonl, metrics.jsonl, tensorboard/, checkpoints/ and
run.lock (lease/, on a mount or at gs://); that of a model with experts holds router.jsonl too. The
same command on an existing run directory goes on from its latest checkpoint, to the same numbers
bit for bit. With more --config.train.steps a finished run goes on. From there it follows the
learning rates of the schedule for the new number of steps. Ctrl-C (SIGINT) and SIGTERM save before
they stop; a second one of either stops at once.

--init_from starts a new run, at step 0 and with a new optimizer state, from the parameters of
another run whose model is the same.

Exit codes: 0 trained to the end; 2 bad input, told in one line; 3 diverged: too many updates in a
row were not finite, or the run came to its end without a finite result; 75 interrupted, with all
that was trained saved, so that the same command goes on; 130 and 143 stopped at once by a second
SIGINT or SIGTERM.
"""

import sys

from absl import flags

from launch import command_line
from moe.config import ConfigError
from moe.data.sources import check_dataset
from moe.exit_codes import DIVERGED, INTERRUPTED
from moe.storage.paths import run_path


def main(values: flags.FlagValues) -> int:
    config = command_line.read_run_config(values.config)
    workdir = run_path(values.workdir)
    init_from = run_path(values.init_from) if values.init_from else None
    if init_from is None and values.init_step is not None:
        raise ConfigError(
            f"--init_step={values.init_step} names a step, but no run: set --init_from to a run too"
        )
    check_dataset(config.data)
    # This loads JAX, which bad input need not wait for.
    from moe.training.trainer import Diverged, Interrupted, fit

    try:
        metrics = fit(config, workdir, init_from=init_from, init_step=values.init_step)
    except Diverged as error:
        print(f"diverged: {error}", file=sys.stderr)
        return DIVERGED
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return INTERRUPTED
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    print(f"The run is in {workdir}; draw it with: python -m launch.report --workdir={workdir}")
    return 0


if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The run directory: a new one, or one to go on with.")
    command_line.define_directory(
        "init_from", "The directory of another run, from whose parameters a new run starts."
    )
    flags.DEFINE_integer(
        "init_step", None, "The step of the checkpoint of --init_from; the latest by default."
    )
    command_line.run(main, __doc__, devices=True)
