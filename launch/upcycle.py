"""Turns a dense run's checkpoint into the first checkpoint of a new run with experts (sparse
upcycling, Komatsuzaki et al. 2022).

Examples:
    python -m launch.upcycle --from=runs/dense_tiny --workdir=runs/upcycled --config=configs/dense_tiny.py \\
        --config.model.moe.num_experts=8 --config.model.moe.expert_dim=704
    python -m launch.upcycle --from=runs/dense_tiny --step=400 --workdir=runs/fine --config=configs/dense_tiny.py \\
        --config.model.moe.num_experts=8 --config.model.moe.expert_dim=352 --noise=0.01

launch.train with the same --config flags and --workdir then trains on, from step 0, with a new
optimizer state. Each expert starts as a copy of the dense feed-forward part, or, where expert_dim
is a fraction of feed_forward_dim, of one slice of it; shared experts take the first slices.
Attention, norms, embeddings and layers that stay dense are copied, and routers are drawn as in a
new run. moe/interop/upcycle.py says when the new model computes exactly what the dense one does:
both examples do, but for the noise. All other fields of config.model must be the dense run's;
--config.mesh.* has to fit this machine, and may differ when the run trains on.
"""

import dataclasses
import functools
import math
from pathlib import Path

from absl import flags

from launch import command_line
from moe.config import ConfigError, RunConfig
from moe.files import write_whole
from moe.workdir.identity import LOCK_FILE, UNFINISHED_FILE, read_config, write_config


def upcycle(
    source: Path, config: RunConfig, workdir: Path, *, step: int | None = None, noise: float = 0.0
) -> None:
    """Makes `workdir` a run of `config` at step 0, from a checkpoint (the latest) of the dense run
    `source`. Raises ConfigError.
    """
    _check_paths(source, workdir, noise)
    import jax  # loaded here, so that bad input need not wait for it

    from moe.interop.upcycle import check_upcycle, upcycle
    from moe.training import start
    from moe.training.train_step import make_program
    from moe.workdir import checkpoint, tracking

    dense = read_config(source).model
    check_upcycle(dense, config.model)
    program = make_program(config)
    start.check_memory(program.mesh, program.abstract_state)
    with checkpoint.read_checkpoints(
        source
    ) as checkpoints:  # laid out as the new run, so that no array has to move
        wanted = make_program(dataclasses.replace(config, model=dense)).abstract_state
        dense_params = checkpoint.restore_variables(checkpoints, wanted, step)["params"]
    start.check_finite(source / "checkpoints", dense_params)
    rows = program.task.rows(config, config.data.train_split)
    state = program.init_state()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    convert = jax.jit(
        functools.partial(upcycle, dense=dense, config=config.model, noise=noise),
        out_shardings=shardings,
    )
    state = state.replace(params=convert(dense_params, state.params, jax.random.key(config.seed)))
    with start.lock_run(workdir):
        tracking.check_workdir(workdir, config)
        # Until all is written, the directory is no run: launch.train would begin one from scratch.
        unfinished = workdir / UNFINISHED_FILE
        if jax.process_index() == 0:
            write_whole(unfinished, f"launch.upcycle from {source} did not finish\n")
        with checkpoint.open_checkpoints(workdir, config) as checkpoints:
            checkpoint.save(checkpoints, config, rows.sha256, state)
        if jax.process_index() == 0:
            write_config(workdir, config)
            tracking.write_environment(workdir, program.attention)
            unfinished.unlink()


def _check_paths(source: Path, workdir: Path, noise: float) -> None:
    if not (source / "checkpoints").is_dir():
        raise ConfigError(
            f"--from={source} holds no checkpoint: set --from to the directory of a dense run that has saved one"
        )
    if workdir.exists() and any(path.name != LOCK_FILE for path in workdir.iterdir()):
        raise ConfigError(f"--workdir={workdir} is not empty: set --workdir to a new directory")
    if not 0 <= noise < math.inf:
        raise ConfigError(f"--noise={noise} is no standard deviation: set --noise to 0.0 or more")


def main(values: flags.FlagValues) -> None:
    config, workdir = command_line.read_run_config(values.config), Path(values.workdir)
    upcycle(Path(values["from"].value), config, workdir, step=values.step, noise=values.noise)
    print(
        f"{workdir} is at step 0; train on with the same --config flags: python -m launch.train --config=... --workdir={workdir}"
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
        "Adds normal noise to each expert's copy, of so many of each matrix's standard deviations; drawn from config.seed.",
    )
    command_line.run(main, __doc__)
