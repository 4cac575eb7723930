"""The typed view of a run's configuration.

Config files hold ml_collections ConfigDicts; the code sees only these frozen dataclasses. Every default lives here, and every field and
every pair of fields is checked here, before JAX is imported: a mistake costs a second and one line, not a queue slot.
"""

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

BYTE_VOCABULARY = 256  # what the byte tokenizer produces


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line naming the field, the value and the fix."""


def _check_types(config: Any) -> None:
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(expected) is Literal:
            if value not in typing.get_args(expected):
                options = " or ".join(repr(option) for option in typing.get_args(expected))
                raise ConfigError(f"{name}={value!r} is not an option: set {name} to {options}")
        elif expected is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, name, float(value))
        elif type(value) is not expected:
            raise ConfigError(f"{name}={value!r} has type {type(value).__name__}: set {name} to a value of type {expected.__name__}")
        elif expected is float and not math.isfinite(value):
            raise ConfigError(f"{name}={value} is not finite: set {name} to a finite number")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be positive: set {name} to more than 0")


def _check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}={getattr(config, name)} must not be negative: set {name} to 0 or more")


def _check_range(config: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: set {name} between {low} and {high}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int = BYTE_VOCABULARY
    num_layers: int = 4
    model_dim: int = 256
    feed_forward_dim: int = 704
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    # Parameters, norms, softmax and losses are float32 whatever this says.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # "full" keeps only each layer's input for the backward pass.
    remat: Literal["none", "full"] = "none"
    # True compiles one layer and loops; False unrolls the loop in the program. Parameters are stacked either way.
    scan_layers: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "vocab_size", "num_layers", "model_dim", "feed_forward_dim", "num_heads", "num_kv_heads")
        _check_positive(self, "head_dim", "rope_base", "norm_epsilon")
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                f"set num_kv_heads to one of {', '.join(map(str, divisors))}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs: set an even head_dim")

    @property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Groups of layers, each ((the kinds of one period), repeats); a group is one scan over its periods."""
        return ((("dense",), self.num_layers),)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    dataset: str = "stdlib"  # "stdlib", or any TFDS name ("name/config:version") with a "text" feature
    train_split: str = "train"
    validation_split: str = "validation"
    tokenizer: Literal["byte"] = "byte"
    sequence_length: int = 256
    directory: str = "~/.cache/moe"  # TFDS's files and the prepared rows; shared by all hosts

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "sequence_length")
        if os.path.expanduser(self.directory).startswith("~"):
            raise ConfigError(f"directory={self.directory!r} names no user's home: set directory to a path")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then a cosine to a fraction of the peak."""

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "learning_rate", "clip_norm")
        _check_range(self, 0.0, 1.0, "final_learning_rate_fraction")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} is not a decay: set {name} to at least 0.0 and less than 1.0")
        _check_not_negative(self, "warmup_steps", "weight_decay")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One of them may be -1: whatever devices remain."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise ConfigError(f"{name}={size} is not a number of devices: set a positive number, or -1 for the rest")
        if self.sizes.count(-1) > 1:
            free = [name for name, size in dataclasses.asdict(self).items() if size == -1]
            raise ConfigError(f"{'=-1 and '.join(free)}=-1 leave the mesh open: set all of them but one")

    @property
    def sizes(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """The same mesh with -1 replaced, for `num_devices` devices. Raises ConfigError if they cannot be laid out so."""
        fixed = 1
        for size in self.sizes:
            fixed *= abs(size)
        rest = num_devices // fixed if -1 in self.sizes else 1
        if fixed * rest != num_devices:
            shape = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())
            raise ConfigError(f"mesh ({shape}) does not fit {num_devices} devices: set sizes whose product is {num_devices}")
        return MeshConfig(*(rest if size == -1 else size for size in self.sizes))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is written down on the way."""

    steps: int = 1000
    batch_size: int = 16  # rows of a step, over all devices and microbatches
    accumulation: int = 1  # microbatches of a step
    loss_chunk: int = 128  # positions of each row whose logits exist at once
    log_every: int = 10
    eval_every: int = 500
    eval_batches: int = 0  # batches of the validation split at each evaluation; 0 takes them all
    checkpoint_every: int = 500
    keep_last: int = 2  # checkpoints kept besides the multiples of keep_every
    keep_every: int = 0  # 0 keeps only the last ones
    max_skipped_steps: int = 10  # updates skipped in a row, for a non-finite loss or gradient, before the run stops

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "steps", "batch_size", "accumulation", "loss_chunk", "log_every", "eval_every")
        _check_positive(self, "checkpoint_every", "keep_last", "max_skipped_steps")
        _check_not_negative(self, "eval_batches", "keep_every")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}: "
                f"set batch_size to {self.accumulation * max(1, round(self.batch_size / self.accumulation))}"
            )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = True

    def __post_init__(self) -> None:
        _check_types(self)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        _check_types(self)
        _check_range(self, 0, 2**32 - 1, "seed")  # JAX makes keys of 32 bits: a larger seed would be another one's double
        if self.data.tokenizer == "byte" and self.model.vocab_size < BYTE_VOCABULARY:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} is smaller than the byte tokenizer's {BYTE_VOCABULARY}: "
                f"set model.vocab_size to at least {BYTE_VOCABULARY}"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of train.steps={self.train.steps}: "
                f"set optimizer.warmup_steps to less than {self.train.steps}"
            )
        if self.train.steps * self.train.batch_size >= 2**31:
            raise ConfigError(
                f"train.steps={self.train.steps} times batch_size={self.train.batch_size} is more examples than an int32 counts: "
                f"set train.steps to less than {2**31 // self.train.batch_size}"
            )
        # What does not fit with one device along the open axis, fits with no number of them.
        check_layout(self, MeshConfig(*map(abs, self.mesh.sizes)))

    @classmethod
    def from_config_dict(cls, config: ConfigDict | Mapping[str, Any]) -> "RunConfig":
        """Checks a ConfigDict (or the dict of a saved run) field by field. Raises ConfigError."""
        return _build(cls, config, "config")

    @classmethod
    def config_dict(cls) -> ConfigDict:
        """Every field with its default, as the mutable ConfigDict that a config file starts from."""
        return ConfigDict(dataclasses.asdict(cls()))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_layout(config: RunConfig, mesh: MeshConfig) -> None:
    """Raises ConfigError where the batch or the model cannot be split over a mesh without -1."""
    rows = mesh.data * mesh.fsdp * mesh.expert
    microbatch = config.train.batch_size // config.train.accumulation
    if microbatch % rows:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} in {config.train.accumulation} microbatches cannot be split over "
            f"mesh data*fsdp*expert={rows}: set train.batch_size to a multiple of {rows * config.train.accumulation}"
        )
    if config.data.sequence_length % mesh.context:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} cannot be split over mesh.context={mesh.context}: "
            f"set data.sequence_length to a multiple of {mesh.context}"
        )
    model = config.model
    # Key/value heads are copied where the tensor axis is larger than their number, so they need only divide or be divided.
    if mesh.tensor % model.num_kv_heads and model.num_kv_heads % mesh.tensor:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} and mesh.tensor={mesh.tensor} do not divide each other: "
            f"set mesh.tensor to a divisor of {model.num_kv_heads}"
        )
    for name, axis, size in (
        ("num_heads", "tensor", mesh.tensor),
        ("feed_forward_dim", "tensor", mesh.tensor),
        ("vocab_size", "tensor", mesh.tensor),
        ("model_dim", "fsdp", mesh.fsdp),
    ):
        if getattr(model, name) % size:
            raise ConfigError(
                f"model.{name}={getattr(model, name)} cannot be split over mesh.{axis}={size}: set model.{name} to a multiple of {size}"
            )


def _build(cls: type, values: Any, path: str) -> Any:
    if isinstance(values, ConfigDict):
        values = values.to_dict()  # a ConfigDict prints itself over many lines
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}={values!r} is not a group of fields: set its fields one by one")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"the fields are {', '.join(fields)}"
            raise ConfigError(f"{path}.{name}={values[name]!r} is not a field: {hint}")
    types = typing.get_type_hints(cls)
    arguments = {
        name: _build(types[name], values[name], f"{path}.{name}") if dataclasses.is_dataclass(types[name]) else values[name]
        for name in values
    }
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
