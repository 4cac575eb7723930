"""Starts a run from another run's checkpoint: `launch.train --init_from` and `--fork_from`."""

import json
from typing import Any

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.interop.upcycle import SHARED_FIELDS, check_fields
from moe.storage.owner import Check
from moe.storage.paths import RunPath, resolve, run_path, write_whole
from moe.storage.tokenizer import check_same, names_file, read_stored
from moe.workdir import checkpoint
from moe.workdir.identity import (
    checkpoint_steps,
    differing_fields,
    read_saved_config,
    use_stored_tokenizer,
)
from moe.workdir.source import ORIGIN_FILE, Origin, Source, read_origin

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


def find_origin(workdir: RunPath, config: RunConfig, source: Source | None) -> Origin | None:
    """Returns the checkpoint from which the run in `workdir` starts, or None for a new state.

    If the run has started from one already, its origin.json names the checkpoint, and `source` must
    name the same one or be None. Raises ConfigError if the two differ, if there is no such
    checkpoint, or if a run of `config` cannot start from it.
    """
    has_begun = read_saved_config(workdir) is not None
    origin = read_origin(workdir)
    if origin:
        if source and not _is_same(source, origin):
            verb = "forked" if origin.is_fork else "started"
            raise ConfigError(
                f"{workdir} {verb} from step {origin.step} of {origin.run}: "
                f"leave out {source.flag}_from, or set another workdir"
            )
        if has_begun:
            return origin
        source = Source(run_path(origin.run), origin.step, origin.is_fork)
    if not source:
        return None
    if has_begun:
        raise ConfigError(
            f"{workdir} holds a run that started from new parameters: "
            f"leave out {source.flag}_from, or set another workdir"
        )
    saved = read_saved_config(source.run)
    if saved is None:
        raise ConfigError(
            f"{source.flag}_from={source.run} is no run: "
            f"set {source.flag}_from to the directory of a run that has saved a checkpoint"
        )
    if source.is_fork:
        check_fork(source, saved, config)
    else:
        check_model(saved.model, config.model)
        _check_tokenizer(source, saved, config)
    return Origin(resolve(source.run), _choose_step(source), source.is_fork)


def _check_tokenizer(source: Source, saved: RunConfig, config: RunConfig) -> None:
    """Raises ConfigError if the tokens of the config are not those that `source` has learnt."""
    has_file = names_file(config.data, "tokenizer")
    if names_file(saved.data, "tokenizer") != has_file:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than "
            f"{saved.data.tokenizer} of {source.run}: set the same one"
        )
    if has_file and (stored := read_stored(source.run, "tokenizer")):
        check_same(source.run, stored, config.data)


def _is_same(source: Source, origin: Origin) -> bool:
    """Returns whether `source` names the checkpoint from which a run started."""
    step = origin.step if source.step is None else source.step
    return (resolve(source.run), step, source.is_fork) == origin


def _choose_step(source: Source) -> int:
    """Returns the step of `source`, or by default that of the latest checkpoint of its run."""
    steps = checkpoint_steps(source.run / "checkpoints")
    if not steps or source.step not in (None, *steps):
        wanted = "" if source.step is None else f" of step {source.step}"
        raise ConfigError(
            f"{source.flag}_from={source.run} holds no checkpoint{wanted}: set {source.flag}_step "
            f"to one of its steps ({', '.join(map(str, steps)) or 'none yet'})"
        )
    return steps[-1] if source.step is None else source.step


def check_fork(source: Source, saved: RunConfig, config: RunConfig) -> None:
    """Raises ConfigError unless a run of `config` has the same first steps as the one to fork.

    `saved` is the config of that run. The two may differ in `train.steps` alone, and both must
    have the same learning rates up to the step of `source`.
    """
    differing = differing_fields(saved, config, allowed=("train.steps",))
    if differing:
        raise ConfigError(
            f"--fork_from={source.run} is a run of another config ({'; '.join(differing)}): "
            "set the same config, in which train.steps alone may differ"
        )
    use_stored_tokenizer(source.run, config)  # which refuses another tokenizer
    if config.optimizer.schedule == "cosine":
        raise ConfigError(
            f"--fork_from={source.run} has other learning rates than this run from the first step "
            "on, since optimizer.schedule='cosine': train both with optimizer.schedule='wsd'"
        )
    if saved.warmup_steps != config.warmup_steps:
        raise ConfigError(
            f"optimizer.warmup_fraction={config.optimizer.warmup_fraction} gives "
            f"{saved.warmup_steps} steps of warm-up in {source.run} and {config.warmup_steps} "
            "here: train both with the same optimizer.warmup_steps"
        )
    shared = saved.shared_updates(config)
    if source.step is not None and source.step > shared:
        steps = [step for step in checkpoint_steps(source.run / "checkpoints") if step <= shared]
        raise ConfigError(
            f"--fork_step={source.step} is in the decay of {source.run} or of this run, which "
            f"have the same learning rates up to step {shared}: set --fork_step to one of its "
            f"steps up to there ({', '.join(map(str, steps)) or 'none is saved'})"
        )


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
    name = "fork_from" if origin.is_fork else "init_from"
    saved = {name: str(origin.run), "step": origin.step}
    check()
    write_whole(workdir / ORIGIN_FILE, json.dumps(saved) + "\n")


def read_variables(origin: Origin, abstract_state: Any) -> Any:
    """Returns the model's variables of a checkpoint, sharded as `abstract_state` says."""
    with checkpoint.read_checkpoints(origin.run) as checkpoints:
        return checkpoint.restore_variables(checkpoints, abstract_state, origin.step)


def read_state(origin: Origin, abstract_state: Any, rows_sha256: str) -> Any:
    """Returns the whole state of a checkpoint, sharded as `abstract_state` says.

    Raises ConfigError if it was trained on other rows than these.
    """
    with checkpoint.read_checkpoints(origin.run) as checkpoints:
        checkpoint.check_rows(checkpoints, rows_sha256, origin.step)
        return checkpoint.restore(checkpoints, abstract_state, origin.step)
