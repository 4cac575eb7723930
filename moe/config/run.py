"""The config of a run, and how it is built from a ConfigDict."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

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

    seed: int = 0  # of the parameters, the order of the rows, and every other draw
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        check_types(self, wide=("seed",))
        check_range(
            self, 0, 2**32 - 1, "seed"
        )  # JAX makes keys of 32 bits: a larger seed would be another one's double
        if self.data.tokenizer == "byte" and self.model.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the byte tokenizer's {BYTE_VOCABULARY}: "
                f"set model.vocab_size to at least {BYTE_VOCABULARY}"
            )
        if self.train.steps * self.train.batch_size >= 2**31:
            raise ConfigError(
                f"train.steps={self.train.steps} times batch_size={self.train.batch_size} is more examples than an int32 counts: "
                f"set train.steps to less than {-(-(2**31) // self.train.batch_size)}"
            )
        self._check_batch()
        self._check_routing()
        # What does not fit with one device along the open axis, fits with no number of them.
        check_layout(self, MeshConfig(*map(abs, self.mesh.sizes)))

    def _check_batch(self) -> None:
        """Raises ConfigError for a batch whose tokens, or their rows at the experts, an int32
        cannot number.
        """
        moe, length = self.model.moe, self.data.sequence_length
        factor, names = (
            1.0,
            f"train.batch_size={self.train.batch_size} times data.sequence_length={length}",
        )
        if moe.num_experts:
            factor, names = (
                moe.experts_per_token,
                f"{names} times model.moe.experts_per_token={moe.experts_per_token}",
            )
            if moe.dispatch == "capacity":
                factor, names = (
                    factor * max(1.0, moe.capacity_factor),
                    f"{names} times model.moe.capacity_factor={moe.capacity_factor}",
                )
            elif moe.exchange == "ragged_all_to_all":
                factor, names = (
                    factor * moe.receive_factor,
                    f"{names} times model.moe.receive_factor={moe.receive_factor}",
                )
        if self.train.batch_size * length * factor > LARGEST_INT:
            raise ConfigError(
                f"{names} is more rows than an int32 counts: set them to a product of at most {LARGEST_INT}"
            )

    def _check_routing(self) -> None:
        moe, length = self.model.moe, self.data.sequence_length
        if not moe.num_experts:
            return
        if moe.router == "expert_choice":
            raise ConfigError(
                "model.moe.router='expert_choice' looks at later tokens, which a decoder must not: set model.moe.router to 'softmax'"
            )
        share = length * moe.experts_per_token / moe.num_experts
        if moe.dispatch == "capacity" and moe.row_share * length < 1:
            raise ConfigError(
                f"model.moe.capacity_factor={moe.capacity_factor} gives an expert less than one of a row's tokens: "
                f"set model.moe.capacity_factor to at least {math.ceil(1000 / share) / 1000}"
            )

    @property
    def warmup_steps(self) -> int:
        """The number of the update that has the peak learning rate; at least one step is left for
        the cosine.
        """
        return min(round(self.optimizer.warmup_fraction * self.train.steps), self.train.steps - 1)

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "RunConfig":
        """Checks a ConfigDict (or the dict of a saved run) field by field. Raises ConfigError."""
        built = _build(cls, config, "config")
        _ = built.data.path  # for its error
        return built

    @classmethod
    def config_dict(cls) -> ConfigDict:
        """Every field with its default, as the mutable ConfigDict that a config file starts from."""
        config = ConfigDict(dataclasses.asdict(cls()))
        config.model.moe.normalize_weights = placeholder(bool)  # None, but a flag may set it
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _build(cls: type, values: Any, path: str) -> Any:
    if isinstance(values, ConfigDict):
        values = values.to_dict()  # a ConfigDict prints itself over many lines
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path}={show(values)} is not a group of fields: set its fields one by one"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = (
                f"did you mean {path}.{near[0]}?" if near else f"the fields are {', '.join(fields)}"
            )
            shown = name if isinstance(name, str) and name.isprintable() else show(name)
            raise ConfigError(f"{path}.{shown}={show(values[name])} is not a field: {hint}")
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
