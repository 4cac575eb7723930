"""Specifies the runs of a sweep, checks them, and finds those that are the same. It needs no JAX.

A sweep's config file has a `get_config()`, the base, and a `get_sweep()` that yields points. Each
point has a name, which is also the run's directory, and the dotted fields that it changes in the
base. `grid` and `repeat` make such points, and so do the functions of ladders.py.

Two runs are the same if their configs are, apart from what says where a run is computed.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from moe.config import PLACE_FIELDS, ConfigError, RunConfig, flatten
from moe.config.checks import LONGEST_NAME, show, without_numpy

# Each part of a name is a directory, so it may not begin with a dot, nor be too long.
_PART = rf"\w[\w.=+-]{{,{LONGEST_NAME - 1}}}"
_NAME = re.compile(f"{_PART}(/{_PART})*", re.ASCII)


class Point(NamedTuple):
    """Names one run of a sweep, and says what it changes in the base."""

    name: str
    overrides: Mapping[str, Any]  # values by dotted fields, such as {"model.model_dim": 64}
    fork_from: str | None = None  # the point whose state at step `fork_step` this run starts from
    fork_step: int = 0


class Run(NamedTuple):
    """Holds a checked point: the whole config of one run."""

    name: str
    config: RunConfig
    identity: str  # equal for runs that would compute the same numbers
    same_as: str | None  # the name of another run that is the same, which is trained instead
    fork_from: str | None
    fork_step: int


def identity(config: RunConfig) -> str:
    """Returns a hash of everything in a config that a run's numbers depend on.

    Paths and the mesh are left out. A fork computes what a run of its own would, so it needs no
    place in the hash. Fields with their default values have none either, so that a field which a
    later version adds does not make another run of what is trained already.
    """
    defaults = _default_fields()
    values = {
        name: value
        for name, value in flatten(config.to_dict())
        if value != defaults.get(name) and not _says_where(name)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _default_fields() -> Mapping[str, Any]:
    """Returns the default of each dotted field. A sweep of thousands of runs asks for each run."""
    return MappingProxyType(dict(flatten(RunConfig().to_dict())))


def _says_where(name: str) -> bool:
    """Returns whether a dotted field is, or is in a group of fields, where a run is computed."""
    return any(name == place or name.startswith(f"{place}.") for place in PLACE_FIELDS)


def expand(
    base: RunConfig,
    points: Iterable[Point | tuple[str, Mapping[str, Any]]],
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> list[Run]:
    """Returns the checked runs of a sweep, in order. Raises ConfigError for the first mistake.

    `changes` are set in every run.
    """
    values, runs = base.to_dict(), []
    for given in points:
        point = _check_point(given)
        try:
            config = RunConfig.from_config_dict(_override(values, {**point.overrides, **changes}))
        except ConfigError as error:
            raise ConfigError(f"{point.name}: {error}") from None
        key = identity(config)
        runs.append(Run(point.name, config, key, None, point.fork_from, point.fork_step))
    return link(runs)


def link(runs: Sequence[Run]) -> list[Run]:
    """Returns runs that say which of them are the same, also if they have different bases.

    The first of equal runs that is no fork is trained, or the first one if all are forks. So the
    trunk of each fork is trained from its first step. Raises ConfigError for names and forks that
    do not fit together.
    """
    _check_names([run.name for run in runs])
    _check_forks(runs)
    first_names: dict[str, str] = {}  # by identity
    for run in sorted(runs, key=lambda run: run.fork_from is not None):
        first_names.setdefault(run.identity, run.name)
    trained = {run.name: first_names[run.identity] for run in runs}
    return [
        run._replace(
            same_as=trained[run.name] if trained[run.name] != run.name else None,
            fork_from=trained[run.fork_from] if run.fork_from else None,
        )
        for run in runs
    ]


def _check_point(point: Any) -> Point:
    """Returns what get_sweep() has yielded as a Point. Raises ConfigError if it is none."""
    try:
        point = Point(*point)
        is_point = isinstance(point.name, str) and isinstance(point.overrides, Mapping)
        types = (type(point.fork_from), type(without_numpy(point.fork_step)))
        is_point = is_point and types in ((str, int), (type(None), int))
    except TypeError:
        is_point = False
    if not is_point:
        raise ConfigError(
            f"get_sweep() yielded {show(point)}: yield Point(name, overrides), where overrides is "
            "a dict of dotted fields, or add another point's name and a step, from which it forks"
        )
    if not _NAME.fullmatch(point.name):
        raise ConfigError(
            f"{show(point.name)} cannot name a run's directory: "
            f"use letters, digits and _ . = + -, at most {LONGEST_NAME}, with / between directories"
        )
    return point


def _check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that occurs twice, or that lies within another run."""
    known = set(names)
    if len(known) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError(f"{twice} names two runs: give each its own name")
    for name in names:
        parts = name.split("/")
        for end in range(1, len(parts)):
            outer = "/".join(parts[:end])
            if outer in known:
                raise ConfigError(
                    f"{name} would lie in the directory of the run {outer}: rename one of them"
                )


def _check_forks(runs: Sequence[Run]) -> None:
    """Raises ConfigError for a fork whose trunk is not another run that reaches its step."""
    by_name = {run.name: run for run in runs}
    for run in runs:
        if run.fork_from is None:
            continue
        trunk = by_name.get(run.fork_from)
        if trunk is None or trunk.fork_from is not None:
            reason = "is a fork itself" if trunk else "is no run of the sweep"
            raise ConfigError(
                f"{run.name}: fork_from={run.fork_from} {reason}: set it to a run that is trained "
                "from its first step"
            )
        if not 0 < run.fork_step < min(trunk.config.train.steps, run.config.train.steps):
            raise ConfigError(
                f"{run.name}: fork_step={run.fork_step} is not a step before the end of this run "
                f"and of {run.fork_from}: set it to a step of the stable phase"
            )


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of nested dicts in which dotted fields are set.

    A field that does not exist is set too: RunConfig refuses it in its own words.
    """
    result = dict(values)
    copied = {""}  # the groups that are no longer shared with `values`
    for field, value in overrides.items():
        group, path = result, ""
        *names, last = str(field).split(".")
        for name in names:
            path = f"{path}.{name}"
            if path not in copied:
                inner = group.get(name)
                group[name] = dict(inner) if isinstance(inner, dict) else {}
                copied.add(path)
            group = group[name]
        group[last] = value
    return result


def overrides_between(base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """Returns the dotted fields in which a config differs from its base, with their values."""
    return changed_fields(dict(flatten(base.to_dict())), config)


def changed_fields(before: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Returns the dotted fields whose values in a config are not those of `before`."""
    after = dict(flatten(config.to_dict()))
    if before.keys() != after.keys():
        raise ConfigError(
            "data.mixture has other sources than the base: "
            "name all sources in get_config(), and change their fields in the points"
        )
    return {name: value for name, value in after.items() if before[name] != value}


def grid(fields: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Returns a point for every combination of some values of each dotted field.

    A name has the last part of each field and its value: learning_rate=0.001/batch_size=16.
    """
    for field, values in fields.items():
        _check_several(field, values)
    chosen = (
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    )
    return (Point("/".join(map(_part, one.items())), one) for one in chosen)


def _part(item: tuple[str, Any]) -> str:
    """Returns what a field and its value are called in a point's name."""
    field, value = item
    return f"{field.rpartition('.')[2]}={value}"


def _check_several(name: str, values: Any) -> None:
    """Raises ConfigError for one value in the place of several, such as a text."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(
            f"{name}={show(values)} is one value, not several: set {name} to a list, as in "
            f"[{show(values)}]"
        )


def repeat(points: Iterable[Point], seeds: Sequence[int]) -> Iterator[Point]:
    """Returns each point once with each seed, as NAME/seed_N: all points with the first seed first.

    So all points can be compared once the first seed is trained.
    """
    _check_several("seeds", seeds)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={show(seeds)} has a seed twice: set distinct numbers")
    listed = [Point(*point) for point in points]
    return (_with_seed(point, seed) for seed in seeds for point in listed)


def _with_seed(point: Point, seed: int) -> Point:
    """Returns a point with a seed, which starts from the trunk with the same seed, if from any."""
    trunk = point.fork_from and f"{point.fork_from}/seed_{seed}"
    overrides = {**point.overrides, "seed": seed}
    return Point(f"{point.name}/seed_{seed}", overrides, trunk, point.fork_step)
