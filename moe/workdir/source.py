"""Says from which other run a run starts or has started. It imports no JAX."""

import json
import os
from typing import NamedTuple

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.config.checks import without_numpy
from moe.interop.compatible import SHARED_FIELDS, check_fields
from moe.storage.paths import RunPath, resolve, run_path
from moe.storage.tokenizer import check_same, names_file, read_stored
from moe.workdir.identity import (
    checkpoint_steps,
    differing_fields,
    read_saved_config,
    use_stored_tokenizer,
)

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
    """Names the checkpoint of another run from which a run starts or has started."""

    run: RunPath
    step: int
    is_fork: bool  # a fork takes the whole state, any other run the parameters and router biases


class Source(NamedTuple):
    """Names the other run, as the caller of `fit` or of launch.train does."""

    run: RunPath
    step: int | None  # that of its checkpoint; None takes the latest one
    # A fork takes the whole state. Otherwise a run takes the parameters and router biases alone.
    is_fork: bool

    @property
    def flag(self) -> str:
        """Returns the flag that names the run, without its ending `_from` or `_step`."""
        return "--fork" if self.is_fork else "--init"


def read_source(
    init_from: str | os.PathLike[str] | None,
    init_step: int | None,
    fork_from: str | os.PathLike[str] | None,
    fork_step: int | None,
) -> Source | None:
    """Returns the other run, or None if there is none.

    Raises ConfigError for a step without a run, a fork without a step, or two other runs.
    """
    for flag, run, step in (("--init", init_from, init_step), ("--fork", fork_from, fork_step)):
        if not run and step is not None:
            raise ConfigError(
                f"{flag}_step={step} names a step, but no run: set {flag}_from to a run too"
            )
    if init_from and fork_from:
        raise ConfigError(
            f"--init_from={init_from} and --fork_from={fork_from} name two runs to start from: "
            "leave one of them out"
        )
    if fork_from:
        if fork_step is None:
            raise ConfigError(
                f"--fork_from={fork_from} names a run, but no step: "
                "set --fork_step to one of its checkpoints before its decay"
            )
        return Source(run_path(fork_from), without_numpy(fork_step), is_fork=True)
    if init_from:
        return Source(run_path(init_from), without_numpy(init_step), is_fork=False)
    return None


def read_origin(workdir: RunPath) -> Origin | None:
    """Returns the checkpoint from which the run in `workdir` has started, or None.

    Raises ConfigError if origin.json is damaged.
    """
    path = workdir / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        is_fork = "fork_from" in saved
        run = saved["fork_from" if is_fork else "init_from"]
        # A run that has begun does not need the other one, which may be gone by now.
        return Origin(run_path(run, ask=False), int(saved["step"]), is_fork)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say a run and a step ({error}): restore it, or set another workdir"
        ) from None


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
