"""Reads what a sweep trains from its config file, and checks it. It imports no JAX."""

import ast
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from launch.command_line import read_run_config
from launch.config_file import ConfigFileErrors, check_config_file
from launch.sweep_directory import check_name
from moe.config import ConfigError, RunConfig, flatten
from moe.data.chat import read_template
from moe.data.sources import check_dataset
from moe.data.tokenizers import check_tokenizer
from moe.files import announce_wait
from moe.scaling.experiments.sweep import (
    Point,
    Run,
    changed_fields,
    expand,
    link,
    overrides_between,
)
from moe.storage.paths import RunPath
from moe.workdir.identity import CONFIG_FILE, checkpoint_steps, read_config
from moe.workdir.tracking import check_workdir


class Planned(NamedTuple):
    """Is one run of a sweep, and what launch.train needs to train it."""

    run: Run
    file: str  # the config file whose get_config() is the base
    base: RunConfig

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def first_step(self) -> int:
        """Returns the step that the run starts from, which is not 0 for a fork."""
        return self.run.fork_step if self.run.fork_from else 0

    def arguments(self, workdir: RunPath) -> list[str]:
        """Returns the flags of launch.train for this run, whose directory is in `workdir`."""
        words = [f"--config={self.file}", f"--workdir={workdir / self.name}"]
        for field, value in overrides_between(self.base, self.run.config).items():
            words.append(f"--config.{field}={value}")
        if self.run.fork_from:
            words.append(f"--fork_from={workdir / self.run.fork_from}")
            words.append(f"--fork_step={self.run.fork_step}")
        return words


def read_sweep(path: str, changes: Sequence[str]) -> list[Planned]:
    """Returns the runs of the sweep in the config file at `path`, in order.

    `changes` are texts FIELD=VALUE, which are set in every run. Raises ConfigError.
    """
    check_config_file(path, "sweep")
    with announce_wait(f"reading {path}"), ConfigFileErrors(path):
        names = runpy.run_path(path)
        base = _read_base(names, path)
        yielded = _call(names, "get_sweep", path)
    code = getattr(names["get_sweep"], "__code__", None)
    with ConfigFileErrors(path, line=code and code.co_firstlineno):
        points = list(yielded)
    return plan(path, base, points, changes)


def read_configs(
    paths: Sequence[str], seeds: Sequence[int], changes: Sequence[str]
) -> list[Planned]:
    """Returns the runs of several config files with several seeds, as FILE/seed_N.

    All files are trained with the first seed first. Raises ConfigError.
    """
    bases = {}
    for path in paths:
        check_config_file(path, "configs")
        with announce_wait(f"reading {path}"), ConfigFileErrors(path):
            bases[path] = _read_base(runpy.run_path(path), path)
    names = {path: path.rpartition("/")[2].removesuffix(".py") for path in paths}
    if len(set(names.values())) < len(paths):
        raise ConfigError(
            f"--configs={','.join(paths)} has two files of one name, and the names are those of "
            "the variants: rename one of them"
        )
    planned: list[Planned] = []
    for seed in seeds:
        for path, name in names.items():
            point = Point(f"{name}/seed_{seed}", {"seed": seed})
            planned += plan(path, bases[path], [point], changes)
    runs = link([one.run for one in planned])
    return [one._replace(run=run) for one, run in zip(planned, runs, strict=True)]


def _read_base(names: dict[str, Any], path: str) -> RunConfig:
    """Returns the config of a config file, which launch.train must be able to change by flags."""
    return read_run_config(_call(names, "get_config", path), path)


def _call(names: dict[str, Any], name: str, path: str) -> Any:
    """Returns what a function of a config file returns. Raises ConfigError if there is none."""
    if not callable(names.get(name)):
        raise ConfigError(
            f"{path} has no {name}(): write one, as the files in configs/sweeps have it"
        )
    return names[name]()


def plan(
    path: str, base: RunConfig, points: Iterable[Point], changes: Sequence[str]
) -> list[Planned]:
    """Returns the checked runs of some points over a base. Raises ConfigError."""
    try:
        runs = expand(base, points, dict(_read_change(change) for change in changes))
        for run in runs:
            check_name(run.name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not runs:
        raise ConfigError(f"{path}: get_sweep() yields no run: yield at least one Point")
    fields = dict(flatten(base.to_dict()))
    for run in runs:
        _check_flags(path, fields, run)
    return [Planned(run, path, base) for run in runs]


def _check_flags(path: str, base: Mapping[str, Any], run: Run) -> None:
    """Raises ConfigError for a field that no flag of launch.train can set: one that gets None."""
    for field, value in changed_fields(base, run.config).items():
        if value is None:
            raise ConfigError(
                f"{path}: {run.name}: {field}=None cannot take the place of a value: "
                "leave the field at None in get_config(), and set it in the runs that need it"
            )


def _read_change(text: str) -> tuple[str, object]:
    """Returns the field and the value of --set=FIELD=VALUE."""
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ConfigError(f"--set={text} sets nothing: write --set=FIELD=VALUE")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def distinct(planned: Sequence[Planned]) -> list[Planned]:
    """Returns the runs that are trained: one of those that are the same."""
    return [one for one in planned if one.run.same_as is None]


def jobs_of(planned: Sequence[Planned]) -> list[list[Planned]]:
    """Returns what --index counts: each run that starts from nothing, with the forks of it."""
    jobs = {one.name: [one] for one in distinct(planned) if not one.run.fork_from}
    for one in distinct(planned):
        if one.run.fork_from:
            jobs[one.run.fork_from].append(one)
    return list(jobs.values())


def check_runs(planned: Sequence[Planned], workdir: RunPath) -> None:
    """Raises ConfigError for data that cannot be read, or a directory of another run."""
    for data in {one.run.config.data for one in planned}:
        check_dataset(data)
        read_template(data)
    for one in planned:
        check_tokenizer(one.run.config)
    for one in distinct(planned):
        if (workdir / one.name / CONFIG_FILE).exists():
            check_workdir(workdir / one.name, one.run.config)
            _check_schedule(workdir / one.name, one.run.config)


def _check_schedule(directory: RunPath, config: RunConfig) -> None:
    """Raises ConfigError if a run has trained with learning rates of another number of steps.

    A run by hand may go on so. In a sweep its numbers would be those of no run that is planned.
    """
    saved = read_config(directory)
    trained = max(checkpoint_steps(directory / "checkpoints"), default=0)
    before, after = saved.train.steps, config.train.steps
    if before != after and trained > saved.shared_updates(config):
        raise ConfigError(
            f"{directory} has trained {trained} steps with train.steps={before}, at other learning "
            f"rates than with train.steps={after}: set another --workdir, or delete it"
        )
