"""Reads the checkpoint that a run starts from: `launch.train --init_from` and `--fork_from`."""

import json
from typing import Any

from moe.storage.owner import Check
from moe.storage.paths import RunPath, write_whole
from moe.workdir import checkpoint
from moe.workdir.source import ORIGIN_FILE, Origin


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
