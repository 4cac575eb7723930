"""Starts a new run from another run's parameters and router biases: `launch.train --init_from`."""

import json
from typing import Any, NamedTuple

from moe.config import ConfigError, ModelConfig
from moe.interop.upcycle import SHARED_FIELDS, check_fields
from moe.storage.owner import Check
from moe.storage.paths import RunPath, resolve, run_path, write_whole
from moe.workdir import checkpoint
from moe.workdir.identity import CONFIG_FILE, read_config, read_saved_config

ORIGIN_FILE = "origin.json"
# The fields on which the function of a sparse model, or its tree of parameters, depends. All others
# may differ: how the model is computed, and how its routers are trained.
SHARED_MOE_FIELDS = (
    "num_experts",
    "experts_per_token",
    "expert_dim",
    "num_shared_experts",
    "first_dense_layers",
    "layer_period",
    "router",
    "normalize_weights",
    "weight_scale",
    "num_groups",
    "groups_per_token",
)


class Origin(NamedTuple):
    """Names a checkpoint of another run."""

    run: RunPath
    step: int


def find_origin(
    workdir: RunPath, model: ModelConfig, init_from: RunPath | None, init_step: int | None
) -> Origin | None:
    """Returns the checkpoint from which the run in `workdir` starts, or None for new parameters.

    If the run has begun already, its origin.json names the checkpoint, and `init_from` must name
    the same one or none. Raises ConfigError if the two differ, if there is no such checkpoint, or
    if the checkpoint holds another model.
    """
    if (workdir / ORIGIN_FILE).exists():
        origin = _read_origin(workdir / ORIGIN_FILE)
        step = origin.step if init_step is None else init_step
        if init_from and (resolve(init_from), step) != origin:
            raise ConfigError(
                f"{workdir} started from step {origin.step} of {origin.run}: "
                "leave out --init_from, or set another --workdir"
            )
        return origin
    if not init_from:
        return None
    if read_saved_config(workdir):
        raise ConfigError(
            f"{workdir} holds a run that started from new parameters: "
            "leave out --init_from, or set another --workdir"
        )
    if not (init_from / CONFIG_FILE).exists():
        raise ConfigError(
            f"--init_from={init_from} is no run: "
            "set --init_from to the directory of a run that has saved a checkpoint"
        )
    check_model(read_config(init_from).model, model)
    return Origin(resolve(init_from), _choose_step(init_from, init_step))


def _read_origin(path: RunPath) -> Origin:
    """Returns the checkpoint that an origin.json names."""
    try:
        saved = json.loads(path.read_text())
        return Origin(run_path(saved["init_from"]), int(saved["step"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say a run and a step ({error}): restore it, or set another --workdir"
        ) from None


def _choose_step(init_from: RunPath, init_step: int | None) -> int:
    """Returns `init_step`, or by default the step of the latest checkpoint of `init_from`."""
    with checkpoint.read_checkpoints(init_from) as checkpoints:
        steps = sorted(checkpoints.all_steps())
    if not steps or init_step not in (None, *steps):
        wanted = "" if init_step is None else f" of step {init_step}"
        raise ConfigError(
            f"--init_from={init_from} holds no checkpoint{wanted}: "
            f"set --init_step to one of its steps ({', '.join(map(str, steps)) or 'none yet'})"
        )
    return steps[-1] if init_step is None else init_step


def check_model(before: ModelConfig, after: ModelConfig) -> None:
    """Raises ConfigError for the first field that makes `after` another function than `before`."""
    names = [*SHARED_FIELDS]
    if before.moe.num_experts or after.moe.num_experts:
        names += [f"moe.{name}" for name in SHARED_MOE_FIELDS]
    check_fields(before, after, names)


def write_origin(workdir: RunPath, origin: Origin, check: Check) -> None:
    """Writes origin.json, whole or not at all, if `check` lets it.

    It must be written before config.json: a run without it counts as started from new parameters.
    """
    saved = {"init_from": str(origin.run), "step": origin.step}
    check()
    write_whole(workdir / ORIGIN_FILE, json.dumps(saved) + "\n")


def read_variables(origin: Origin, abstract_state: Any) -> Any:
    """Returns the model's variables of a checkpoint, sharded as `abstract_state` says."""
    with checkpoint.read_checkpoints(origin.run) as checkpoints:
        return checkpoint.restore_variables(checkpoints, abstract_state, origin.step)
