"""The config of a run, and how it is built from a ConfigDict."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe.config.checks import LARGEST_INT, ConfigError, check_range, check_types, show
from moe.config.data import BYTE_VOCABULARY, DataConfig
from moe.config.layout import MeshConfig, check_layout
from moe.config.model import ModelConfig
from moe.config.training import OptimizerConfig, TrackingConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    # What the run learns. The program that calls `fit` passes it a custom task.
    task: Literal["language_modelling", "custom"] = "language_modelling"
    seed: int = 0  # of the parameters, the order of the rows, and all other random choices
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        check_types(self, wide=("seed",))
        # JAX makes keys of 32 bits, so a larger seed would draw the same numbers as another one.
        check_range(self, 0, 2**32 - 1, "seed")
        if self.task == "language_modelling":
            self._check_language_model()
        self._check_batch()
        self._check_capacity()
        # Where one device along the open axis does not fit, no number of devices does.
        check_layout(self, MeshConfig(*map(abs, self.mesh.sizes)))

    def _check_language_model(self) -> None:
        """Raises ConfigError for a model that cannot predict the next token of the data."""
        if self.data.tokenizer == "byte" and self.model.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the byte tokenizer's "
                f"{BYTE_VOCABULARY}: set model.vocab_size to at least {BYTE_VOCABULARY}"
            )
        if self.model.moe.num_experts and self.model.moe.router == "expert_choice":
            raise ConfigError(
                "model.moe.router='expert_choice' looks at later tokens, which a decoder must not: "
                "set model.moe.router to 'softmax'"
            )

    def _check_batch(self) -> None:
        """Raises ConfigError if an int32 cannot number a batch's tokens, or their expert rows."""
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
        moe, length = self.model.moe, self.data.sequence_length
        if not moe.num_experts or moe.dispatch != "capacity" or moe.row_share * length >= 1:
            return
        even_share = length * moe.experts_per_token / moe.num_experts
        raise ConfigError(
            f"model.moe.capacity_factor={moe.capacity_factor} gives an expert less than one of a "
            "row's tokens: "
            f"set model.moe.capacity_factor to at least {math.ceil(1000 / even_share) / 1000}"
        )

    @property
    def warmup_steps(self) -> int:
        """The number of the update that has the peak learning rate.

        At least one step is left for the cosine.
        """
        return min(round(self.optimizer.warmup_fraction * self.train.steps), self.train.steps - 1)

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "RunConfig":
        """Checks a ConfigDict (or the dict of a saved run) field by field. Raises ConfigError."""
        built = _build(cls, config, "config")
        _ = built.data.path  # raises ConfigError if the path names a home that nobody has
        return built

    @classmethod
    def config_dict(cls) -> ConfigDict:
        """Returns every field with its default, as the ConfigDict that a config file changes."""
        config = ConfigDict(dataclasses.asdict(cls()))
        model: Any = config.model
        model.moe.normalize_weights = placeholder(bool)  # None, but a flag may set it
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as nested dicts, as config.json holds it."""
        return dataclasses.asdict(self)


def _build(cls: type, values: Any, path: str) -> Any:
    """Builds a config class from a dict of its fields. `path` is the dict's name in messages."""
    if isinstance(values, ConfigDict):
        values = values.to_dict()  # a ConfigDict prints itself over many lines
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path}={show(values)} is not a group of fields: set its fields one by one"
        )
    _check_names(cls, values, path)
    types = typing.get_type_hints(cls)
    arguments = {
        name: _build(types[name], values[name], f"{path}.{name}")
        if dataclasses.is_dataclass(types[name])
        else values[name]
        for name in values
    }
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None


def _check_names(cls: type, values: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError for a name that is no field of the class."""
    fields = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = (
                f"did you mean {path}.{near[0]}?" if near else f"the fields are {', '.join(fields)}"
            )
            shown = name if isinstance(name, str) and name.isprintable() else show(name)
            raise ConfigError(f"{path}.{shown}={show(values[name])} is not a field: {hint}")
