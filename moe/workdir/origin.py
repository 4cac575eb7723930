"""A new run that starts from another run's parameters and routers' biases: `launch.train
--init_from`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import ConfigError, ModelConfig
from moe.files import write_whole
from moe.interop.upcycle import KEPT_FIELDS
from moe.workdir import checkpoint
from moe.workdir.identity import CONFIG_FILE, read_config, read_saved_config

ORIGIN_FILE = "origin.json"
# What a sparse model's function or its tree depends on. All else may differ: how it is computed,
# and how its routers are trained.
KEPT_MOE_FIELDS = (
    *(
        "num_experts",
        "experts_per_token",
        "expert_dim",
        "num_shared_experts",
        "first_dense_layers",
        "layer_period",
    ),
    *("router", "normalize_weights", "weight_scale", "num_groups", "groups_per_token"),
)


class Origin(NamedTuple):
    """A checkpoint of another run."""

    run: Path
    step: int


def find_origin(
    workdir: Path, model: ModelConfig, init_from: Path | None, init_step: int | None
) -> Origin | None:
    """Returns the checkpoint that the run in `workdir` starts or has started from; None for one of
    new parameters.

    A run that has begun says it itself, in origin.json; `init_from` may repeat it. Raises
    ConfigError where they differ, and where there is no such checkpoint or it is of another model.
    """
    path = workdir / ORIGIN_FILE
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            origin = Origin(Path(saved["init_from"]), int(saved["step"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} does not say a run and a step ({error}): restore it, or set another --workdir"
            ) from None
        if (
            init_from
            and (init_from.resolve(), origin.step if init_step is None else init_step) != origin
        ):
            raise ConfigError(
                f"{workdir} started from step {origin.step} of {origin.run}: leave out --init_from, or set another --workdir"
            )
        return origin
    if not init_from:
        return None
    if read_saved_config(workdir):
        raise ConfigError(
            f"{workdir} holds a run that started from new parameters: leave out --init_from, or set another --workdir"
        )
    if not (init_from / CONFIG_FILE).exists():
        raise ConfigError(
            f"--init_from={init_from} is no run: set --init_from to the directory of a run that has saved a checkpoint"
        )
    check_model(read_config(init_from).model, model)
    with checkpoint.read_checkpoints(init_from) as checkpoints:
        steps = sorted(checkpoints.all_steps())
    if not steps or init_step not in (None, *steps):
        raise ConfigError(
            f"--init_from={init_from} holds no checkpoint{'' if init_step is None else f' of step {init_step}'}: "
            f"set --init_step to one of its steps ({', '.join(map(str, steps)) or 'none yet'})"
        )
    return Origin(init_from.resolve(), steps[-1] if init_step is None else init_step)


def check_model(before: ModelConfig, after: ModelConfig) -> None:
    """Raises ConfigError naming the first field in which the models of two runs are other functions
    of their parameters.
    """
    names = [*KEPT_FIELDS]
    if before.moe.num_experts or after.moe.num_experts:
        names += [f"moe.{name}" for name in KEPT_MOE_FIELDS]
    for name in names:
        values = [
            getattr(model.moe if "." in name else model, name.removeprefix("moe."))
            for model in (before, after)
        ]
        if values[0] != values[1]:
            raise ConfigError(
                f"model.{name}={values[1]!r} is {values[0]!r} in the run to start from: set model.{name} to {values[0]!r}"
            )


def write_origin(workdir: Path, origin: Origin) -> None:
    """Writes origin.json, whole or not at all; before config.json, since a run without it started
    from new parameters.
    """
    write_whole(
        workdir / ORIGIN_FILE,
        json.dumps({"init_from": str(origin.run), "step": origin.step}) + "\n",
    )


def read_variables(origin: Origin, abstract_state: Any) -> Any:
    """Returns the model's variables of a checkpoint, laid out by the shardings of `abstract_state`."""
    with checkpoint.read_checkpoints(origin.run) as checkpoints:
        return checkpoint.restore_variables(checkpoints, abstract_state, origin.step)
