"""Configures a whole run, and builds its config from a ConfigDict."""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe.config.checks import (
    LARGEST_INT,
    ConfigError,
    check_range,
    check_types,
    field_types,
    show,
    without_none,
    without_numpy,
)
from moe.config.data import BYTE_VOCABULARY, DataConfig
from moe.config.layout import MeshConfig, check_layout
from moe.config.model import ModelConfig
from moe.config.objectives import SpanCounts, TaskName, corrupted_row, special_tokens
from moe.config.training import OptimizerConfig, TrackingConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Holds everything that determines a run."""

    # What the model learns (docs/data/objectives.md). "custom" means that the program which trains
    # it passes a Task to `fit`.
    task: TaskName = "language_modelling"
    seed: int = 0  # the seed of the parameters, the row order and all other random numbers
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        check_types(self, wide=("seed",))
        # JAX makes keys of 32 bits, so a larger seed would repeat the run of a smaller one.
        check_range(self, 0, 2**32 - 1, "seed")
        if self.data.chat_template and self.task not in ("language_modelling", "custom"):
            raise ConfigError(
                f"task={self.task!r} does not learn answers alone, as data.chat_template asks: "
                "set task to 'language_modelling', or leave data.chat_template out"
            )
        if self.task != "custom":
            self._check_vocabulary()
            self._check_causal_experts()
        self._check_batch()
        self._check_capacity()
        # An axis of size -1 is checked as an axis of one device. If the run cannot be split over
        # the other axes then, it cannot be split over more devices either.
        check_layout(self, MeshConfig(*map(abs, self.mesh.sizes)))

    def _check_vocabulary(self) -> None:
        """Raises ConfigError for a model that lacks tokens of the tokenizer or of the task."""
        # A tokenizer's file is not read here, since a saved run may have been moved away from it.
        byte_vocabulary = BYTE_VOCABULARY + len(self.data.special_tokens)
        added = set(special_tokens(self.task)) - set(self.data.special_tokens)
        needed = byte_vocabulary + len(added)
        if self.data.tokenizer == "byte" and self.model.vocab_size < needed:
            tokens = f" and the {len(added)} of task={self.task!r}" if added else ""
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the byte tokenizer's "
                f"{byte_vocabulary}{tokens}: set model.vocab_size to at least {needed}"
            )

    def _check_causal_experts(self) -> None:
        """Raises ConfigError for a decoder whose experts choose their tokens."""
        moe = self.model.moe
        if moe.num_experts and moe.router == "expert_choice" and self.task != "masked_tokens":
            raise ConfigError(
                "model.moe.router='expert_choice' looks at later tokens, which a decoder must not: "
                "set model.moe.router to 'softmax'"
            )

    def _check_batch(self) -> None:
        """Raises ConfigError for a batch with more tokens or routed rows than an int32 counts."""
        moe, length = self.model.moe, self.data.sequence_length
        factors: dict[str, float] = {
            "train.batch_size": self.train.batch_size,
            "data.sequence_length": length,
        }
        if moe.num_experts:
            factors["model.moe.experts_per_token"] = moe.experts_per_token
            if moe.dispatch == "capacity":
                factors["model.moe.capacity_factor"] = moe.capacity_factor
            elif moe.exchange == "ragged_all_to_all":
                factors["model.moe.receive_factor"] = moe.receive_factor
        # A factor below 1 gives experts less room, but there are as many assignments as before.
        factors_at_least_1 = [max(1, factor) for factor in factors.values()]
        if math.prod(factors_at_least_1) > LARGEST_INT:
            product = " times ".join(f"{name}={value}" for name, value in factors.items())
            raise ConfigError(
                f"{product} is more rows than an int32 counts: "
                f"set them to a product of at most {LARGEST_INT}"
            )

    def _check_capacity(self) -> None:
        """Raises ConfigError for a capacity of less than one token of a row."""
        moe, length = self.model.moe, min(self.row_lengths)
        if not moe.num_experts or moe.dispatch != "capacity" or moe.row_share * length >= 1:
            return
        even_share = length * moe.experts_per_token / moe.num_experts
        raise ConfigError(
            f"model.moe.capacity_factor={moe.capacity_factor} gives an expert room for less than "
            "one token of a row: "
            f"set model.moe.capacity_factor to at least {math.ceil(1000 / even_share) / 1000}"
        )

    @property
    def corrupted_row(self) -> SpanCounts:
        """Returns how many tokens a row of span corruption has, before and after it."""
        return corrupted_row(self.data.sequence_length)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Returns the number of tokens in the rows of a batch: those of each stack of layers."""
        if self.task == "span_corruption":
            return self.corrupted_row.inputs, self.corrupted_row.targets
        return (self.data.sequence_length,)

    @property
    def warmup_steps(self) -> int:
        """Returns the number of steps of warm-up, which leaves at least one step after it."""
        steps = self.optimizer.warmup_steps
        if steps is None:
            steps = round(self.optimizer.warmup_fraction * self.train.steps)
        return min(steps, self.train.steps - 1)

    @property
    def decay_steps(self) -> int:
        """Returns the number of steps, at the end of the run, in which the learning rate falls."""
        after_warmup = self.train.steps - self.warmup_steps
        if self.optimizer.schedule == "cosine":
            return after_warmup
        wanted = round(self.optimizer.decay_fraction * self.train.steps)
        return min(max(wanted, 1), after_warmup)

    def shared_updates(self, other: "RunConfig") -> int:
        """Returns how many first updates have the same learning rates in two runs.

        The runs differ in `train.steps` at most. With a stable phase they agree until the first one
        decays.
        """
        if self.optimizer.schedule == "cosine" or self.warmup_steps != other.warmup_steps:
            return self.train.steps if self == other else 0
        return min(run.train.steps - run.decay_steps for run in (self, other))

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "RunConfig":
        """Builds a checked config from a ConfigDict or from the dict of a saved run.

        Raises ConfigError for the first mistake in it.
        """
        built = _build(cls, config, "")
        _ = built.data.path  # raises ConfigError if the home directory is not known
        return built

    @classmethod
    def config_dict(cls) -> ConfigDict:
        """Returns every field with its default, as the ConfigDict that a config file changes."""
        return _Fields.from_dict(_with_placeholders(cls, cls().to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as nested dicts, as config.json holds it."""
        return _as_dict(self)


def _with_placeholders(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Returns a config's values as nested dicts, in which a flag may set also what is None."""
    types = field_types(config_class)
    found = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _with_placeholders(types[name], value)
        elif value is None:
            value = placeholder(without_none(types[name]))
        found[name] = value
    return found


class _Fields(ConfigDict):
    """Extends ConfigDict: a field that is set to a NumPy scalar holds the Python number of it."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "_Fields":
        """Returns the fields with their values. Groups of fields become such objects, too."""
        fields = cls()
        for name, value in values.items():
            fields[name] = cls.from_dict(value) if isinstance(value, dict) else value
        return fields

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, without_numpy(value))


# The fields and groups of fields that say where a run is computed, and how it fits there. They are
# no part of what it is.
PLACE_FIELDS = (
    "mesh",
    "model.remat",
    "train.gather_once",
    "train.pipeline_rounds",
    "data.directory",
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of each field of a config as nested dicts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _as_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass as nested dicts.

    Its values cannot change, so they are not copied, which would take most of the time. Named
    configs, such as the sources of a mixture, become a dict from each name to the other fields.
    """
    values = {}
    named = _named_fields(type(config))
    for name in field_types(type(config)):
        value = getattr(config, name)
        if name in named:
            value = {one.name: _as_dict(one) for one in value}
            for fields in value.values():
                del fields["name"]
        elif dataclasses.is_dataclass(value):
            value = _as_dict(value)
        values[name] = value
    return values


@functools.cache
def _named_fields(config_class: type) -> Mapping[str, type]:
    """Returns the fields of a dataclass that hold named configs, with the class of these."""
    classes = {name: named_class(declared) for name, declared in field_types(config_class).items()}
    return {name: found for name, found in classes.items() if found}


def named_class(declared: Any) -> type | None:
    """Returns the class C of a field that is declared as `tuple[C, ...]`, or None.

    C is a dataclass with a field `name`.
    """
    if typing.get_origin(declared) is not tuple:
        return None
    element = typing.get_args(declared)[0]
    return element if hasattr(element, "__dataclass_fields__") else None


def _build(cls: type, values: Any, path: str, **name: str) -> Any:
    """Builds a config class from a dict of its fields.

    `path` is the dict's dotted name within the run's config, "" for the run's config itself. An
    error names a field by its full path, such as model.num_heads. The `name` of a named config is
    no field of the dict.
    """
    values = _as_mapping(values, path, "set its fields one by one")
    prefix = f"{path}." if path else ""
    types = {field: declared for field, declared in field_types(cls).items() if field not in name}
    _check_names(list(types), values, prefix)
    arguments: dict[str, Any] = dict(name)
    for field, value in values.items():
        if dataclasses.is_dataclass(types[field]):
            value = _build(types[field], value, f"{prefix}{field}")
        elif named := _named_fields(cls).get(field):
            by_name = _as_mapping(value, prefix + field, f"set {field} to a dict of these by name")
            value = tuple(
                _build(named, fields, f"{prefix}{field}.{key}", name=str(key))
                for key, fields in by_name.items()
            )
        arguments[field] = value
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _as_mapping(values: Any, path: str, fix: str) -> Mapping[str, Any]:
    """Returns a group of fields as a dict. Raises ConfigError if it is no such group."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()  # a ConfigDict would fill many lines of a message
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'}={show(values)} is not a group of fields: {fix}")
    return values


def _check_names(fields: list[str], values: Mapping[str, Any], prefix: str) -> None:
    """Raises ConfigError for a name that is not one of the fields."""
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            listed = f"the fields are {', '.join(fields)}"
            hint = f"did you mean {prefix}{near[0]}?" if near else listed
            shown = name if isinstance(name, str) and name.isprintable() else show(name)
            raise ConfigError(f"{prefix}{shown}={show(values[name])} is not a field: {hint}")
