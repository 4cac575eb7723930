"""Trains a model, or goes on with a run that was interrupted.

Examples:
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/dense_tiny
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/short \\
        --config.train.steps=100
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/short \\
        --config.train.steps=150
    python -m launch.train --config=configs/dense_tiny.py --workdir=runs/fine_tuned \\
        --init_from=runs/dense_tiny --init_step=400
    python -m launch.train --config=configs/experiments/schedules.py:wsd --workdir=runs/short \\
        --fork_from=runs/long --fork_step=400 --config.train.steps=500

A run directory holds config.json, environment.jsonl, metrics.jsonl, tensorboard/, checkpoints/,
run.lock (lease/, on a mount or at gs://), and a copy of its tokenizer's file in tokenizer/; that
of a model with experts holds router.jsonl too. The
same command on an existing run directory goes on from its latest checkpoint, to the same numbers
bit for bit. With more --config.train.steps a finished run goes on. From there it follows the
learning rates of the schedule for the new number of steps. Ctrl-C (SIGINT) and SIGTERM save before
they stop; a second one of either stops at once. Each process of a job of several stops at the same
step, whichever of them got the signal; a signal before the first step is done ends all of them,
with nothing to save. Under SLURM a run also saves and stops shortly before the time limit of its
job.

--init_from starts a new run, at step 0 and with a new optimizer state, from the parameters of
another run whose model is the same. --fork_from starts one from the whole state of another run,
whose config is the same but for train.steps, at a step before the learning rate of either falls.
It becomes, bit for bit, the run of that many steps.

Before anything is compiled, the memory that a step takes is counted. A config that cannot fit the
devices is refused in one line, which names the cheapest change that makes it fit. --force starts it
all the same.

On a kind of GPU or TPU that this version of the kernels has not run on, they are checked first, in
processes of their own. One that fails is named in a line at each start, and another is used in its
place.

SIGUSR1 makes a process write the stacks of all its threads to stderr and go on.

Exit codes: 0 trained to the end; 2 bad input, told in one line; 3 diverged: too many updates in a
row were not finite, or the run came to its end without a finite result; 74 the object store of the
run did not answer, so that the same command may go on later; 75 interrupted, with all that was
trained saved, so that the same command goes on; 130 and 143 stopped at once by a second SIGINT or
SIGTERM. In a job of several processes: 69 not all have joined it; 76 another process died or ended
early, and 77 another one is stuck, each told in one line that names process and host.
"""

import re
import sys
from collections.abc import Mapping
from shlex import quote
from typing import Any

from absl import flags

from launch import command_line
from launch.kernel_check import check_kernels
from launch.output_paths import check_directory
from moe.config import ConfigError, RunConfig
from moe.data.chat import read_template
from moe.data.sources import check_dataset
from moe.data.tokenizers import check_tokenizer
from moe.exit_codes import DIVERGED, INTERRUPTED
from moe.parallel.distributed import from_first
from moe.storage.paths import RunPath, run_path
from moe.workdir.identity import use_stored_tokenizer
from moe.workdir.source import Source, find_origin, read_source
from moe.workdir.tracking import is_same_run


def prepare(values: flags.FlagValues) -> Mapping[str, Any]:
    """Checks the input, and then the kernels of the run, of which it returns what is known."""
    config = command_line.read_run_config(values.config)
    workdir = run_path(values.workdir)
    check_directory("--workdir", workdir)
    source = read_source(**_sources(values))
    read_profile_steps(values.profile_steps, config.train.steps)
    with_own_copies = use_stored_tokenizer(workdir, config)
    check_dataset(with_own_copies.data)
    check_tokenizer(with_own_copies)
    read_template(with_own_copies.data)
    # `fit` tells these mistakes, too. The disk may show files late to other hosts.
    from_first("a look at the run directory", lambda: check_run(workdir, config, source))
    return check_kernels(config)


def check_run(workdir: RunPath, config: RunConfig, source: Source | None) -> None:
    """Raises ConfigError if a directory holds another run, or a run cannot start from `source`."""
    is_same_run(workdir, config)
    find_origin(workdir, config, source)


def main(values: flags.FlagValues, kernels: Mapping[str, Any]) -> int:
    # These load JAX, which bad input need not wait for.
    from launch.plan_fit import check_fit
    from moe.training.trainer import Diverged, Interrupted, fit

    config, workdir = command_line.read_run_config(values.config), run_path(values.workdir)
    if not values.force:
        check_fit(config)
    steps = read_profile_steps(values.profile_steps, config.train.steps)
    try:
        metrics = fit(config, workdir, **_sources(values), profile_steps=steps, kernels=kernels)
    except Diverged as error:
        print(f"diverged: {error}", file=sys.stderr)
        return DIVERGED
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return INTERRUPTED
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    command = f"python -m launch.report --workdir={quote(str(workdir))}"
    print(f"The run is in {workdir}; draw it with: {command}")
    return 0


def _sources(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags that name another run to start from."""
    names = ("init_from", "init_step", "fork_from", "fork_step")
    return {name: values[name].value for name in names}


def read_profile_steps(text: str | None, last_step: int) -> range | None:
    """Returns the steps that --profile_steps=FIRST:END names, as a slice does: END is not in it."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps or steps[0] < 1:
        raise ConfigError(
            f"--profile_steps={text} names no steps: "
            "write FIRST:END, as in 10:13 for the steps 10, 11 and 12"
        )
    if steps[-1] > last_step:
        raise ConfigError(
            f"--profile_steps={text} goes beyond the last step: "
            f"set its end to at most {last_step + 1}, or train.steps to more than {last_step}"
        )
    return steps


def define_flags() -> None:
    """Defines the flags of this command, which launch.slurm takes too."""
    command_line.define_config()
    command_line.define_workdir("The run directory: a new one, or one to go on with.")
    command_line.define_directory(
        "init_from", "The directory of another run, from whose parameters a new run starts."
    )
    flags.DEFINE_integer(
        "init_step", None, "The step of the checkpoint of --init_from; the latest by default."
    )
    command_line.define_directory(
        "fork_from", "The directory of another run, which a new run continues to other train.steps."
    )
    flags.DEFINE_integer(
        "fork_step", None, "The step of the checkpoint of --fork_from, before its decay."
    )
    flags.DEFINE_bool(
        "force", False, "Whether to start even if counting says that the step cannot fit in memory."
    )
    flags.DEFINE_string(
        "profile_steps",
        None,
        "Steps to trace, as in 10:13 for the steps 10, 11 and 12. Each process writes a file that "
        "https://ui.perfetto.dev opens to WORKDIR/profile.",
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main, __doc__, devices=True, prepare=prepare)
