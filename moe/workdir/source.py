"""Says from which other run a run starts or has started. It imports no JAX."""

import json
import os
from typing import NamedTuple

from moe.config import ConfigError
from moe.config.checks import without_numpy
from moe.storage.paths import RunPath, run_path

ORIGIN_FILE = "origin.json"


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
        saved = json.loads(path.read_text())
        is_fork = "fork_from" in saved
        run = saved["fork_from" if is_fork else "init_from"]
        # A run that has begun does not need the other one, which may be gone by now.
        return Origin(run_path(run, ask=False), int(saved["step"]), is_fork)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say a run and a step ({error}): restore it, or set another workdir"
        ) from None
