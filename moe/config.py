"""The typed view of a run's configuration.

Config files hold ml_collections ConfigDicts; the code sees only these frozen dataclasses. Every default lives here, and every field and
every pair of fields is checked here, before JAX is imported: a mistake costs a second and one line, not a queue slot.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from moe.checks import (
    LARGEST_INT,
    ConfigError,
    check_not_negative,
    check_path,
    check_positive,
    check_range,
    check_types,
    computed,
    expand_path,
    nearest_divisors,
    show,
)

BYTE_VOCABULARY = 256  # what the byte tokenizer produces
MAX_LAYERS = 2**16  # the layers of a period are unrolled in the program, and each layer has lines of its own in router.jsonl
MAX_SEQUENCE_LENGTH = 2**24  # rotary positions are float32, which cannot tell larger ones apart
MAX_ELEMENTS = 2**59  # of an array; XLA counts bytes in int64, and a training state holds each parameter several times


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which layers have experts, how a router chooses among them, and how tokens travel to those chosen."""

    num_experts: int = 0  # routed experts of a sparse layer; 0 leaves every layer dense
    experts_per_token: int = 2  # routed experts that a token passes
    expert_dim: int = 352  # feed-forward width of one expert
    num_shared_experts: int = 0  # experts that every token passes, as one feed-forward part so many times as wide
    first_dense_layers: int = 0  # layers before the first sparse one
    layer_period: int = 1  # after those, the last of every so many layers is sparse
    # Scores: softmax over the experts, or a sigmoid of each. "hash" chooses by the token alone; with "expert_choice" experts choose tokens.
    router: Literal["softmax", "sigmoid", "hash", "expert_choice"] = "softmax"
    normalize_weights: bool = True  # divide a token's combine weights by their sum: the softmax over its chosen experts
    weight_scale: float = 1.0  # what combine weights are multiplied by
    num_groups: int = 1  # groups of consecutive experts, of which a token chooses first
    groups_per_token: int = 1  # groups of experts that a token chooses
    jitter: float = 0.0  # in training, the router's input is multiplied by a uniform draw between 1 - jitter and 1 + jitter
    balance_weight: float = 0.01  # of the balance loss, a mean over the sparse layers
    balance_scope: Literal["row", "batch"] = "batch"  # over which load and probability are balanced; a batch is a microbatch, on all hosts
    z_weight: float = 0.0  # of the mean squared log-sum-exp of the router's logits
    bias_update_rate: float = 0.0  # above 0, biases follow the load and steer the choice
    # "dense" computes every expert for every token, "capacity" gives each expert a fixed number of rows,
    # and "dropless" sorts the rows by their experts.
    dispatch: Literal["dense", "capacity", "dropless"] = "dropless"
    capacity_factor: float = 1.25  # an expert takes so many times its share of a row's tokens
    priority: Literal["position", "probability"] = "position"  # who stays where an expert is full: the earlier, or the more probable
    # How rows travel between the devices of the mesh's expert axis.
    exchange: Literal["all_gather", "all_to_all", "ragged_all_to_all"] = "all_gather"
    receive_factor: float = 2.0  # rows that a device has room for in a ragged exchange, over their mean number

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "experts_per_token", "expert_dim", "layer_period", "weight_scale", "num_groups", "groups_per_token")
        check_positive(self, "capacity_factor")
        check_not_negative(
            self, "num_experts", "num_shared_experts", "first_dense_layers", "balance_weight", "z_weight", "bias_update_rate"
        )
        check_range(self, 0.0, 0.5, "jitter")
        if not computed(self, "receive_factor") >= 1:
            raise ConfigError(f"receive_factor={self.receive_factor} has no room for an even load: set receive_factor to 1.0 or more")
        if self.num_experts:
            self._check_choice()
            self._check_pairs()

    def _check_choice(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
                f"set experts_per_token to at most {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}: "
                f"set num_groups to {nearest_divisors(self.num_experts, self.num_groups)}"
            )
        if self.groups_per_token > self.num_groups:
            raise ConfigError(
                f"groups_per_token={self.groups_per_token} is more than num_groups={self.num_groups}: "
                f"set groups_per_token to at most {self.num_groups}"
            )
        reach = self.groups_per_token * self.num_experts // self.num_groups
        if self.experts_per_token > reach:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is more than the {reach} experts of groups_per_token={self.groups_per_token} "
                f"groups: set experts_per_token to at most {reach}"
            )

    def _check_pairs(self) -> None:
        for name, value, other, values, wanted in (
            ("exchange", "all_to_all", "dispatch", ("capacity",), "every device sends as many rows as every other"),
            ("exchange", "ragged_all_to_all", "dispatch", ("dropless",), "rows are sent in the order of their experts"),
            ("router", "expert_choice", "dispatch", ("dense", "capacity"), "each expert takes a fixed number of tokens"),
        ):
            if getattr(self, name) == value and getattr(self, other) not in values:
                options = " or ".join(repr(option) for option in values)
                raise ConfigError(
                    f"{name}={value!r} does not go with {other}={getattr(self, other)!r}, for {wanted}: set {other} to {options}"
                )
        if self.router in ("hash", "expert_choice") and self.bias_update_rate:
            raise ConfigError(
                f"bias_update_rate={self.bias_update_rate} steers nothing with router={self.router!r}: set bias_update_rate to 0.0"
            )
        if self.router in ("hash", "expert_choice") and self.num_groups > 1:
            raise ConfigError(f"num_groups={self.num_groups} limits nothing with router={self.router!r}: set num_groups to 1")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; what it computes is the model's."""

    # "auto" takes the fastest on the chip that the mesh is made of; docs/kernels.md says what each can do.
    implementation: Literal["auto", "blockwise", "tpu", "hopper", "hopper_fused"] = "auto"
    # Over the mesh's context axis: keys go around a ring, or each device gets all tokens of some heads. docs/context.md compares them.
    context_parallelism: Literal["ring", "ulysses"] = "ring"

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int = BYTE_VOCABULARY  # token ids that the embedding and the logits have
    num_layers: int = 4  # Transformer layers
    model_dim: int = 256  # width of the residual stream
    feed_forward_dim: int = 704  # width within a dense feed-forward part
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key/value heads, each shared by as many query heads
    head_dim: int = 64  # width of a head
    rope_base: float = 10_000.0  # base of the rotary positions' frequencies
    norm_epsilon: float = 1e-6  # added to the mean square that RMSNorm divides by
    tied_embeddings: bool = False  # the embedding makes the logits too
    # The type of activations. Parameters, norms, softmax and losses are float32 whatever this says.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What is computed again in the backward pass: "full" keeps only each layer's input.
    remat: Literal["none", "full"] = "none"
    # True compiles one layer and loops; False unrolls the loop in the program. Parameters are stacked either way.
    scan_layers: bool = True
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "vocab_size", "num_layers", "model_dim", "feed_forward_dim", "num_heads", "num_kv_heads")
        check_positive(self, "head_dim", "rope_base", "norm_epsilon")
        check_range(self, 1, MAX_LAYERS, "num_layers")
        if not computed(self, "rope_base") >= 1:
            raise ConfigError(f"rope_base={self.rope_base} turns later pairs faster than the first: set rope_base to 1.0 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                f"set num_kv_heads to {nearest_divisors(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs: set an even head_dim")
        reach = self.moe.first_dense_layers + self.moe.layer_period
        if self.moe.num_experts and reach > self.num_layers:
            raise ConfigError(
                f"moe.first_dense_layers={self.moe.first_dense_layers} and moe.layer_period={self.moe.layer_period} leave no sparse layer "
                f"of num_layers={self.num_layers}: set num_layers to at least {reach}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raises ConfigError for parameters with a dimension or a number of elements that no array can have."""
        products = [
            (LARGEST_INT, ("num_heads", "head_dim")),
            (MAX_ELEMENTS, ("vocab_size", "model_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "num_heads", "head_dim")),
            (MAX_ELEMENTS, ("num_layers", "model_dim", "feed_forward_dim")),
        ]
        if self.moe.num_experts:
            products += [
                (LARGEST_INT, ("moe.num_shared_experts", "moe.expert_dim")),
                (MAX_ELEMENTS, ("num_layers", "model_dim", "moe.num_experts", "moe.expert_dim")),
                (MAX_ELEMENTS, ("num_layers", "model_dim", "moe.num_shared_experts", "moe.expert_dim")),
            ]
        for limit, names in products:
            values = [getattr(self.moe if name.startswith("moe.") else self, name.removeprefix("moe.")) for name in names]
            if math.prod(values) > limit:
                sizes = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
                raise ConfigError(f"{sizes} make an array larger than any can be: set them to a product of at most {limit}")

    @property
    def layer_groups(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """Groups of layers, each ((the kinds of one period, "dense" or "moe"), repeats); a group is one scan over its periods."""
        if not self.moe.num_experts:
            return ((("dense",), self.num_layers),)
        first, period = self.moe.first_dense_layers, self.moe.layer_period
        repeats, rest = divmod(self.num_layers - first, period)
        groups = ((("dense",), first), (("dense",) * (period - 1) + ("moe",), repeats), (("dense",), rest))
        return tuple(group for group in groups if group[1])

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the layers that have experts, among all layers, from 0."""
        kinds = [kind for kinds, repeats in self.layer_groups for kind in kinds * repeats]
        return [number for number, kind in enumerate(kinds) if kind == "moe"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    dataset: str = "stdlib"  # "stdlib", or any TFDS name ("name/config:version") with a "text" feature
    train_split: str = "train"  # the split that is trained on
    validation_split: str = "validation"  # the split that evaluations read
    tokenizer: Literal["byte"] = "byte"  # how text becomes token ids: its UTF-8 bytes
    sequence_length: int = 256  # tokens of a row
    directory: str = "~/.cache/moe"  # TFDS's files and the prepared rows; shared by all hosts

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "sequence_length")
        check_range(self, 1, MAX_SEQUENCE_LENGTH, "sequence_length")
        check_path("directory", self.directory)

    @property
    def path(self) -> Path:
        """`directory`, with ~ expanded. Raises ConfigError where the home directory is not known, as in some containers."""
        return Path(expand_path("config.data.directory", self.directory))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, then a cosine to a fraction of the peak."""

    learning_rate: float = 1e-3  # the peak
    warmup_fraction: float = 0.1  # of train.steps, in which the learning rate rises to its peak
    final_learning_rate_fraction: float = 0.1  # of the peak, where the cosine ends
    weight_decay: float = 0.1  # of matrices, times the learning rate
    beta1: float = 0.9  # decay of the gradient's mean
    beta2: float = 0.95  # decay of the squared gradient's mean
    clip_norm: float = 1.0  # the norm that larger gradients are scaled down to

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "learning_rate", "clip_norm")
        check_range(self, 0.0, 1.0, "final_learning_rate_fraction")
        for name in ("beta1", "beta2"):
            if not 0.0 <= computed(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)} is not a decay: set {name} to at least 0.0 and less than 1.0")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} is not a part of the run: set warmup_fraction to at least 0.0 and less than 1.0"
            )
        check_not_negative(self, "weight_decay")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One of them may be -1: whatever devices remain."""

    data: int = -1  # replicas of the parameters, each with its part of the batch
    fsdp: int = 1  # parameters and batch are split
    expert: int = 1  # experts and batch are split
    context: int = 1  # the tokens of a row are split
    tensor: int = 1  # heads and feed-forward widths are split

    def __post_init__(self) -> None:
        check_types(self)
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

    steps: int = 1000  # updates of the parameters
    batch_size: int = 16  # rows of a step, over all devices and microbatches
    accumulation: int = 1  # microbatches of a step
    loss_chunk: int = 128  # positions of each row whose logits exist at once
    log_every: int = 10  # steps from one line of metrics to the next
    eval_every: int = 500  # steps from one evaluation to the next
    eval_batches: int = 0  # batches of the validation split at each evaluation; 0 takes them all
    checkpoint_every: int = 500  # steps from one checkpoint to the next
    keep_last: int = 2  # checkpoints kept besides the multiples of keep_every
    keep_every: int = 0  # 0 keeps only the last ones
    max_skipped_steps: int = 10  # updates skipped in a row, for a non-finite loss or gradient, before the run stops

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "steps", "batch_size", "accumulation", "loss_chunk", "log_every", "eval_every")
        check_positive(self, "checkpoint_every", "keep_last", "max_skipped_steps")
        check_not_negative(self, "eval_batches", "keep_every")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}: "
                f"set batch_size to {self.accumulation * max(1, round(self.batch_size / self.accumulation))}"
            )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = True  # metrics are written for TensorBoard as well

    def __post_init__(self) -> None:
        check_types(self)


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
        check_range(self, 0, 2**32 - 1, "seed")  # JAX makes keys of 32 bits: a larger seed would be another one's double
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
        """Raises ConfigError for a batch whose tokens, or their rows at the experts, an int32 cannot number."""
        moe, length = self.model.moe, self.data.sequence_length
        factor, names = 1.0, f"train.batch_size={self.train.batch_size} times data.sequence_length={length}"
        if moe.num_experts:
            factor, names = moe.experts_per_token, f"{names} times model.moe.experts_per_token={moe.experts_per_token}"
            if moe.dispatch == "capacity":
                factor, names = factor * max(1.0, moe.capacity_factor), f"{names} times model.moe.capacity_factor={moe.capacity_factor}"
            elif moe.exchange == "ragged_all_to_all":
                factor, names = factor * moe.receive_factor, f"{names} times model.moe.receive_factor={moe.receive_factor}"
        if self.train.batch_size * length * factor > LARGEST_INT:
            raise ConfigError(f"{names} is more rows than an int32 counts: set them to a product of at most {LARGEST_INT}")

    def _check_routing(self) -> None:
        moe, length = self.model.moe, self.data.sequence_length
        if not moe.num_experts:
            return
        if moe.router == "expert_choice":
            raise ConfigError(
                "model.moe.router='expert_choice' looks at later tokens, which a decoder must not: set model.moe.router to 'softmax'"
            )
        share = length * moe.experts_per_token / moe.num_experts
        if moe.dispatch == "capacity" and moe.capacity_factor * share < 1:
            raise ConfigError(
                f"model.moe.capacity_factor={moe.capacity_factor} gives an expert less than one of a row's tokens: "
                f"set model.moe.capacity_factor to at least {math.ceil(1000 / share) / 1000}"
            )

    @property
    def warmup_steps(self) -> int:
        """The number of the update that has the peak learning rate; at least one step is left for the cosine."""
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
    _check_context(config, mesh)
    # Key/value heads are copied where the tensor axis is larger than their number, so they need only divide or be divided.
    if mesh.tensor % model.num_kv_heads and model.num_kv_heads % mesh.tensor:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} and mesh.tensor={mesh.tensor} do not divide each other: "
            f"set mesh.tensor to a divisor of {model.num_kv_heads}"
        )
    for name, value, axes, size in (
        ("num_heads", model.num_heads, "tensor", mesh.tensor),
        ("feed_forward_dim", model.feed_forward_dim, "tensor", mesh.tensor),
        ("vocab_size", model.vocab_size, "tensor", mesh.tensor),
        ("moe.num_experts", model.moe.num_experts, "expert", mesh.expert),
        ("moe.expert_dim", model.moe.expert_dim if model.moe.num_experts else 0, "tensor", mesh.tensor),
        ("model_dim", model.model_dim, "fsdp*expert", mesh.fsdp * mesh.expert),
    ):
        if value % size:
            raise ConfigError(f"model.{name}={value} cannot be split over mesh.{axes}={size}: set model.{name} to a multiple of {size}")


def _check_context(config: RunConfig, mesh: MeshConfig) -> None:
    attention, length, heads = config.model.attention, config.data.sequence_length, config.model.num_heads
    if mesh.context == 1:
        return
    if attention.context_parallelism == "ring" and length % (2 * mesh.context):
        raise ConfigError(
            f"data.sequence_length={length} cannot be cut into 2 chunks for each of mesh.context={mesh.context} devices of a ring: "
            f"set data.sequence_length to a multiple of {2 * mesh.context}"
        )
    if attention.context_parallelism == "ulysses" and heads % (mesh.context * mesh.tensor):
        raise ConfigError(
            f"model.num_heads={heads} cannot be split over mesh.context*tensor={mesh.context * mesh.tensor}, as Ulysses does: "
            "set model.attention.context_parallelism to 'ring'"
        )


def _build(cls: type, values: Any, path: str) -> Any:
    if isinstance(values, ConfigDict):
        values = values.to_dict()  # a ConfigDict prints itself over many lines
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}={show(values)} is not a group of fields: set its fields one by one")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {path}.{near[0]}?" if near else f"the fields are {', '.join(fields)}"
            shown = name if isinstance(name, str) and name.isprintable() else show(name)
            raise ConfigError(f"{path}.{shown}={show(values[name])} is not a field: {hint}")
    types = typing.get_type_hints(cls)
    arguments = {
        name: _build(types[name], values[name], f"{path}.{name}") if dataclasses.is_dataclass(types[name]) else values[name]
        for name in values
    }
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
