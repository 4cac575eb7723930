"""Says which run a directory, and each of its checkpoints, belongs to. It imports no JAX.

The checkpoint of step s is the directory `checkpoints/s`. Its `about.json` is written last and
whole, and so marks the checkpoint as complete: a directory without one is never restored. (An
object store cannot rename a directory, but it can write one file whole.)
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe.config import PLACE_FIELDS, ConfigError, RunConfig, flatten
from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, write_whole
from moe.storage.tokenizer import FIELDS, check_same, local_copy, names_file, read_stored

FORMAT_VERSION = 3
CONFIG_FILE = "config.json"
ABOUT_FILE = "about.json"
UNFINISHED_FILE = "unfinished.txt"  # exists while a command creates a directory that is no run yet


def checkpoint_steps(directory: RunPath) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, in order.

    Raises ConfigError for a checkpoint of the older format.
    """
    return [step for step in _numbered(directory) if (directory / str(step) / ABOUT_FILE).exists()]


def unfinished_steps(directory: RunPath) -> list[int]:
    """Returns the steps of the checkpoints in `directory` that are not complete.

    They are being written or deleted, or the process that did so has ended.
    """
    return [
        step for step in _numbered(directory) if not (directory / str(step) / ABOUT_FILE).exists()
    ]


def saved_step(workdir: RunPath, step: int | None) -> int:
    """Returns the step of a run's checkpoint: `step` itself, or that of the latest one if None.

    Raises ConfigError if there is no such checkpoint.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(f"{directory} does not exist: set workdir to a run that has saved one")
    steps = checkpoint_steps(directory)
    if not steps or step not in (None, *steps):
        wanted = "" if step is None else f" of step {step}"
        choices = ", ".join(map(str, steps)) or "none yet"
        raise ConfigError(
            f"{directory} holds no checkpoint{wanted}: choose one of its steps ({choices})"
        )
    return steps[-1] if step is None else step


def _numbered(directory: RunPath) -> list[int]:
    """Returns the steps of all checkpoints in `directory`, in order."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    for step in steps:
        if (directory / str(step) / "about").is_dir():
            path = directory / str(step)
            raise ConfigError(
                f"{path} has format 1, not {FORMAT_VERSION}: read it with the version that wrote it"
            )
    return steps


def write_about(path: RunPath, about: dict[str, Any], check: Check = unchecked) -> None:
    """Writes a checkpoint's about.json, which makes the checkpoint complete.

    `check` raises an error if another process owns the run now: what this one has begun to save
    while it was paused is then never taken for a checkpoint.
    """
    about = {"format_version": FORMAT_VERSION} | about
    check()
    write_whole(path / ABOUT_FILE, json.dumps(about | {"sha256": digest(about)}, indent=1) + "\n")


def read_about(path: RunPath) -> dict[str, Any]:
    """Returns what a checkpoint's about.json says.

    Raises FileNotFoundError, and ConfigError if the file is damaged or of another format or step.
    """
    try:
        about = json.loads((path / ABOUT_FILE).read_text(encoding="utf-8"))
        saved = about.pop("sha256")
        version = about["format_version"]
        whole = saved == digest(about)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise damage_error(path, f"{ABOUT_FILE} is not what was written")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format {version}, not {FORMAT_VERSION}: "
            "read it with the version that wrote it"
        )
    if str(about["step"]) != path.name:
        raise ConfigError(
            f"{path} holds step {about['step']}: rename it to {about['step']}, or delete it"
        )
    return about


def damage_error(path: RunPath, reason: str) -> ConfigError:
    """Returns the error for a checkpoint whose bytes were read and are wrong.

    For a file that the system refused to read, its advice would be wrong: deleting does not help.
    """
    earlier = [step for step in checkpoint_steps(path.parent) if step < int(path.name)]
    advice = (
        f"delete it, and step {earlier[-1]} is taken"
        if earlier
        else "no earlier one is left, so restore its files from a copy"
    )
    return ConfigError(f"{path} is damaged ({reason}): {advice}")


def read_saved_config(workdir: RunPath) -> RunConfig | None:
    """Returns the config of the run in `workdir`, or None if there is no run.

    It is read from config.json, or from the latest checkpoint if that file is missing.
    """
    if (workdir / CONFIG_FILE).exists():
        return _read_config_file(workdir / CONFIG_FILE)
    directory = workdir / "checkpoints"
    steps = checkpoint_steps(directory)
    if not steps:
        return None
    return RunConfig.from_config_dict(read_about(directory / str(steps[-1]))["config"])


def read_config(workdir: RunPath) -> RunConfig:
    """Returns the config of the run in `workdir`. Raises ConfigError if there is none."""
    if isinstance(workdir, Path) and workdir.is_file():
        directory = workdir.parent if workdir.name == CONFIG_FILE else "the directory of a run"
        raise ConfigError(f"{workdir} is a file: set workdir to {directory}")
    saved = read_saved_config(workdir)
    if saved is None:
        raise ConfigError(
            f"{workdir / CONFIG_FILE} does not exist: set workdir to the directory of a run"
        )
    return saved


def _read_config_file(path: RunPath) -> RunConfig:
    """Returns the config in a run's config.json. Raises ConfigError if it is damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({error}): restore it, or set another workdir"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path} holds {type(config).__name__} and not an object: "
            "restore it, or set another workdir"
        )
    try:
        return RunConfig.from_config_dict(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def write_config(workdir: RunPath, config: RunConfig, check: Check = unchecked) -> None:
    """Writes the run's config.json, whole or not at all, if `check` lets it."""
    check()
    write_whole(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def differing_fields(
    saved: RunConfig, config: RunConfig, allowed: Collection[str] = ()
) -> list[str]:
    """Returns a phrase for each field that makes `config` another experiment than `saved`.

    The `allowed` fields may differ, and so may those that say where a run is computed. So may the
    paths of two tokenizers or templates, whose contents `use_stored_tokenizer` compares.
    """
    may_differ = {*allowed, *PLACE_FIELDS}
    before, after = (dict(flatten(one.to_dict())) for one in (saved, config))
    show = lambda values, name: repr(values[name]) if name in values else "missing"
    # One of two mixtures may have sources that the other one lacks.
    return [
        f"{name} is {show(before, name)} there and {show(after, name)} here"
        for name in before | after
        if name not in before or name not in after or before[name] != after[name]
        if may_differ.isdisjoint((name, name.split(".")[0]))
        if not _are_files(name, saved, config)
    ]


def _are_files(name: str, saved: RunConfig, config: RunConfig) -> bool:
    """Returns whether a field names a file of the run in both configs."""
    field = name.removeprefix("data.")
    return field in FIELDS and all(names_file(one.data, field) for one in (saved, config))


def use_stored_tokenizer(
    workdir: RunPath, config: RunConfig, *, must_match: bool = True
) -> RunConfig:
    """Returns the config with the paths of the run's own copies of tokenizer and chat template.

    A run that has not begun has none; its config is returned as it is. Raises ConfigError if the
    config names a file with another content, and for a damaged copy.
    """
    fields = [field for field in FIELDS if names_file(config.data, field)]
    if not fields or read_saved_config(workdir) is None:
        return config
    paths = {}
    for field in fields:
        if stored := read_stored(workdir, field):
            if must_match:
                check_same(workdir, stored, config.data)
            paths[field] = str(local_copy(stored, config.data))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))


def digest(values: dict[str, Any]) -> str:
    """Returns the SHA-256 of values as JSON, which a file of them holds beside them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
