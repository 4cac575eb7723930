"""Turns a dense run's checkpoint into the first checkpoint of a new run with experts.

This is sparse upcycling (Komatsuzaki et al. 2022).

Examples:
    python -m launch.upcycle --from=runs/dense_tiny --workdir=runs/upcycled \\
        --config=configs/dense_tiny.py \\
        --config.model.moe.num_experts=8 --config.model.moe.expert_dim=704
    python -m launch.upcycle --from=runs/dense_tiny --step=400 --workdir=runs/fine --noise=0.01 \\
        --config=configs/dense_tiny.py \\
        --config.model.moe.num_experts=8 --config.model.moe.expert_dim=352

launch.train with the same --config flags and --workdir then trains on, from step 0, with a new
optimizer state. Each expert starts as a copy of the dense feed-forward part, or, where expert_dim
is a fraction of feed_forward_dim, as a copy of one slice of it. Shared experts take the first
slices. Attention, norms, embeddings and layers that stay dense are copied. Routers are initialised
as in a new run. moe/interop/upcycle.py says when the new model computes exactly what the dense one
does: in both examples it does, apart from the noise. All other fields of config.model must be those
of the dense run. --config.mesh.* has to fit this machine, and may differ when the run trains on.
"""

import dataclasses
import functools
import math
from shlex import quote
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command_line
from launch.output_paths import check_directory
from moe.config import ConfigError, RunConfig
from moe.config.objectives import check_decoder
from moe.data.sources import check_dataset
from moe.data.tokenizers import check_tokenizer
from moe.interop.compatible import check_upcycle
from moe.storage.owner import LEASE_DIRECTORY, LOCK_FILE
from moe.storage.paths import RunPath, run_path, write_whole
from moe.workdir.identity import UNFINISHED_FILE, read_config, saved_step, write_config

if TYPE_CHECKING:
    from moe.training.train_step import Program, TrainState


def upcycle(
    source: RunPath,
    config: RunConfig,
    workdir: RunPath,
    *,
    step: int | None = None,
    noise: float = 0.0,
) -> None:
    """Makes `workdir` a run of `config` at step 0, from a checkpoint of the dense run `source`.

    The checkpoint is the latest one by default. Raises ConfigError.
    """
    check_input(source, config, workdir, step, noise)
    # These load JAX, which bad input need not wait for.
    import jax

    from moe.data.mixtures import open_training
    from moe.interop.upcycle import upcycle
    from moe.training.start import check_memory
    from moe.training.train_step import make_program

    dense = read_config(source).model
    program = make_program(config)
    check_memory(program.mesh, program.abstract_state)
    dense_params = _read_dense_params(source, dataclasses.replace(config, model=dense), step)
    rows = open_training(config, program.task.rows).rows
    state = program.init_state()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    convert = jax.jit(
        functools.partial(upcycle, dense=dense, config=config.model, noise=noise),
        out_shardings=shardings,
    )
    params = convert(dense_params, state.params, jax.random.key(config.seed))
    _write_run(source, workdir, config, program, rows.sha256, state.replace(params=params))


def _read_dense_params(source: RunPath, config: RunConfig, step: int | None) -> Any:
    """Returns the parameters of a checkpoint of `source`, all of them finite.

    `config` is the new run's, with the dense model in place of its own. Its mesh lays
    the parameters out as the new run needs them, so that no array has to move when it is converted.
    """
    from moe.training.start import check_finite
    from moe.training.train_step import make_program
    from moe.workdir import checkpoint

    abstract_state = make_program(config).abstract_state
    with checkpoint.read_checkpoints(source) as checkpoints:
        variables, step = checkpoint.restore_variables_and_step(checkpoints, abstract_state, step)
    check_finite(source / "checkpoints" / str(step), variables["params"])
    return variables["params"]


def _write_run(
    source: RunPath,
    workdir: RunPath,
    config: RunConfig,
    program: "Program",
    rows_sha256: str,
    state: "TrainState",
) -> None:
    """Writes a new run directory whose only checkpoint is `state`, at step 0."""
    import jax

    from moe.training.start import lock_run
    from moe.workdir import checkpoint, tracking

    # Until everything is written, this file keeps launch.train from taking the directory for a new
    # run, which it would train from scratch.
    unfinished = workdir / UNFINISHED_FILE

    def begin() -> None:
        tracking.check_workdir(workdir, config)
        write_whole(unfinished, f"launch.upcycle from {source} did not finish\n")

    with lock_run(workdir, begin) as (_, check):
        with checkpoint.open_checkpoints(workdir, config, check) as checkpoints:
            checkpoint.save(checkpoints, config, rows_sha256, state)
        if jax.process_index() == 0:
            write_config(workdir, config, check)
            tracking.write_environment(workdir, program.attention, check=check)
            check()
            unfinished.unlink()


def check_input(
    source: RunPath, config: RunConfig, workdir: RunPath, step: int | None, noise: float
) -> None:
    """Raises ConfigError for bad input. It loads no JAX, and makes nothing."""
    _check_paths(source, workdir, noise)
    saved_step(source, step)
    check_decoder("config", config.task)
    check_upcycle(read_config(source).model, config.model)
    check_dataset(config.data)
    check_tokenizer(config)


def _check_paths(source: RunPath, workdir: RunPath, noise: float) -> None:
    if not (source / "checkpoints").is_dir():
        raise ConfigError(
            f"--from={source} holds no checkpoint: "
            "set --from to the directory of a dense run that has saved one"
        )
    check_directory("--workdir", workdir)
    names = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    if names - {LOCK_FILE, LEASE_DIRECTORY}:
        raise ConfigError(f"--workdir={workdir} is not empty: set --workdir to a new directory")
    if not 0 <= noise < math.inf:
        raise ConfigError(f"--noise={noise} is no standard deviation: set --noise to 0.0 or more")


def prepare(values: flags.FlagValues) -> None:
    """Checks the flags. No program of this command runs kernels that would need a check."""
    config, workdir = command_line.read_run_config(values.config), run_path(values.workdir)
    check_input(run_path(getattr(values, "from")), config, workdir, values.step, values.noise)


def main(values: flags.FlagValues, _: None) -> None:
    config, workdir = command_line.read_run_config(values.config), run_path(values.workdir)
    source = run_path(getattr(values, "from"))
    upcycle(source, config, workdir, step=values.step, noise=values.noise)
    print(
        f"{workdir} is at step 0; train on with the same --config flags: "
        f"python -m launch.train --config=... --workdir={quote(str(workdir))}"
    )


if __name__ == "__main__":
    command_line.define_config()
    command_line.define_workdir("The directory of the run to make: a new or empty one.")
    command_line.define_directory(
        "from", "The directory of the dense run. Required.", required=True
    )
    flags.DEFINE_integer("step", None, "The dense run's checkpoint; the latest by default.")
    flags.DEFINE_float(
        "noise",
        0.0,
        "The standard deviation of the noise that is added to each expert's copy, as a multiple of "
        "the copied matrix's own standard deviation. Its seed is config.seed.",
    )
    command_line.run(main, __doc__, devices=True, prepare=prepare)
