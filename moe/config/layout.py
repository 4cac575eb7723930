"""Says which mesh axes split which dimensions, and checks that a run fits a mesh.

Dimensions are named by the letters of the legend (docs/design.md), so the name of an array says how
it is split: `w_DF` is split over fsdp, expert and tensor, `x_BTD` over the batch axes and context.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moe.config.checks import ConfigError, check_types

if TYPE_CHECKING:
    from moe.config.run import RunConfig

# The mesh axes that split each dimension. A mesh axis can split only one dimension of an array. If
# several dimensions list the same axis, the leftmost of them takes it:
# - w_DF: fsdp and expert split D, and tensor splits F.
# - w_EDF: E takes expert, so fsdp alone splits D.
# - x_BTD: B takes fsdp and expert, so D stays whole.
# - w_LDF, stacked over layers: pipeline splits L, and the rest is as in w_DF.
# The letter t is the time of the residual stream, between the matmuls of layers. Inside of them
# tensor splits heads and widths, and all devices of this axis have the same tokens, T.
# The letter e counts the experts of one device, where a shard_map has already split them.
# The letter P counts the parts of a sum over tokens that devices have not exchanged yet: one for
# each device with tokens of its own.
# Dimensions that are not listed (H, A, and so on) are never split.
RULES: dict[str, tuple[str, ...]] = {
    "L": ("pipeline",),
    "P": ("data", "fsdp", "expert", "context"),
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "t": ("context", "tensor"),
    "D": ("fsdp", "expert"),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "E": ("expert",),
}


def split_axes(dims: str, mesh_axes: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the mesh axes that split each dimension of an array, by RULES.

    `dims` holds one letter for each dimension, and `mesh_axes` the axes that the mesh has.
    """
    used: set[str] = set()
    axes_by_dim = []
    for dim in dims:
        axes = tuple(axis for axis in RULES.get(dim, ()) if axis in mesh_axes and axis not in used)
        used.update(axes)
        axes_by_dim.append(axes)
    return axes_by_dim


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Says how many devices each mesh axis has; one axis may be -1 and takes those that remain."""

    data: int = -1  # splits the batch; every replica holds all parameters
    pipeline: int = 1  # splits the layers into stages, which microbatches go through one by one
    fsdp: int = 1  # splits the parameters and the batch
    expert: int = 1  # splits the experts, the other parameters and the batch
    context: int = 1  # splits the tokens of each row
    tensor: int = 1  # splits heads, feed-forward widths and the vocabulary

    def __post_init__(self) -> None:
        check_types(self)
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise ConfigError(
                    f"{name}={size} is not a number of devices: "
                    f"set {name} to a positive number, or to -1 for the devices that remain"
                )
        if self.sizes.count(-1) > 1:
            free = [name for name, size in dataclasses.asdict(self).items() if size == -1]
            raise ConfigError(
                f"{'=-1 and '.join(free)}=-1 leave the mesh undetermined: set all but one of them"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Returns the number of devices along each axis, in the order of the mesh."""
        return dataclasses.astuple(self)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Returns this mesh for `num_devices` devices, with its -1 replaced.

        Raises ConfigError if the sizes do not multiply to the number of devices.
        """
        fixed = 1
        for size in self.sizes:
            fixed *= abs(size)
        rest = num_devices // fixed if -1 in self.sizes else 1
        if fixed * rest != num_devices:
            shape = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())
            raise ConfigError(
                f"mesh ({shape}) does not fit {num_devices} devices: "
                f"set sizes whose product is {num_devices}"
            )
        return MeshConfig(*(rest if size == -1 else size for size in self.sizes))


# The names of the mesh axes, in the order of the mesh.
AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


class Turn(NamedTuple):
    """Says what a stage of a pipeline does at one tick: integers, or arrays of them."""

    is_busy: Any  # False while the pipeline fills or empties: the stage's result is not used
    group: Any  # the number of the group of microbatches
    round: Any  # the number of the round that the group is in
    member: Any  # the number of the microbatch within its group


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Says which stage of a pipeline works on which microbatch at each tick.

    With one round this is GPipe (Huang et al. 2019): a stage holds consecutive layers, and each
    microbatch goes through the stages once. With more rounds it is the circular, or interleaved,
    schedule (Narayanan et al. 2021, section 2.2): the layers are cut into `rounds * stages` pieces,
    stage s computes the pieces s, s + stages, s + 2 stages, ..., and a microbatch goes around once
    for each round. Microbatches go in groups of as many as there are stages, so that the last stage
    hands one to the first stage just when that can take it.
    """

    stages: int
    rounds: int
    microbatches: int

    @property
    def ticks(self) -> int:
        """Returns the number of ticks, in each of which every stage computes one piece."""
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def groups(self) -> int:
        """Returns the number of groups, which is also how many microbatches a stage loads."""
        return self.microbatches // self.stages

    def turn(self, tick: Any, stage: Any) -> Turn:
        """Returns what a stage does at a tick."""
        number = tick - stage  # of the turn, among those of this stage
        group, turn_of_group = divmod(number, self.rounds * self.stages)
        round_, member = divmod(turn_of_group, self.stages)
        is_busy = (number >= 0) & (number < self.rounds * self.microbatches)
        return Turn(is_busy, group, round_, member)

    @property
    def bubble(self) -> float:
        """Returns the fraction of all turns that are idle, counted tick by tick.

        It equals (stages - 1) / (rounds * microbatches + stages - 1).
        """
        places = itertools.product(range(self.ticks), range(self.stages))
        idle = sum(not self.turn(tick, stage).is_busy for tick, stage in places)
        return idle / (self.ticks * self.stages)


def check_layout(config: "RunConfig", mesh: MeshConfig) -> None:
    """Raises ConfigError if the batch or the model cannot be split over the mesh.

    `mesh` must be resolved: none of its sizes is -1.
    """
    sizes = dataclasses.asdict(mesh)
    _check_batch(config, sizes)
    _check_context(config, mesh)
    _check_pipeline(config, mesh)
    model = config.model
    # Fewer key/value heads than devices on the tensor axis are copied, so either number may divide
    # the other.
    if mesh.tensor % model.num_kv_heads and model.num_kv_heads % mesh.tensor:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} and mesh.tensor={mesh.tensor} do not divide "
            f"each other: set mesh.tensor to a divisor of {model.num_kv_heads}"
        )
    expert_dim = model.moe.expert_dim if model.moe.num_experts else 0
    for name, value, dim, dims in (
        ("num_heads", model.num_heads, "N", "DNH"),
        ("feed_forward_dim", model.feed_forward_dim, "F", "DF"),
        ("vocab_size", model.vocab_size, "V", "VD"),
        ("moe.num_experts", model.moe.num_experts, "E", "EDF"),
        ("moe.expert_dim", expert_dim, "F", "EDF"),
        ("model_dim", model.model_dim, "D", "DF"),
    ):
        axes = split_axes(dims, AXES)[dims.index(dim)]
        split = math.prod(sizes[axis] for axis in axes)
        if value % split:
            raise ConfigError(
                f"model.{name}={value} cannot be split over mesh.{'*'.join(axes)}={split}: "
                f"set model.{name} to a multiple of {split}"
            )


def gathers_once(config: "RunConfig", sizes: Mapping[str, int]) -> bool:
    """Returns whether a step gathers parameters once for all microbatches on such a mesh."""
    return config.train.gathers_once and sizes["fsdp"] * sizes["expert"] > 1


def count_batch_parts(sizes: Mapping[str, int]) -> int:
    """Returns the number of parts into which a mesh of such axes splits a batch."""
    batch_axes, _ = split_axes("BT", AXES)
    return math.prod(sizes[axis] for axis in batch_axes)


def _check_batch(config: "RunConfig", sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if a microbatch's rows or a row's tokens cannot be split evenly."""
    batch_axes, time_axes = split_axes("BT", AXES)
    batch_parts = count_batch_parts(sizes)
    microbatch = config.train.batch_size // config.train.accumulation
    if microbatch % batch_parts:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} in {config.train.accumulation} "
            f"microbatches cannot be split over mesh {'*'.join(batch_axes)}={batch_parts}: "
            f"set train.batch_size to a multiple of {batch_parts * config.train.accumulation}"
        )
    time_parts = math.prod(sizes[axis] for axis in time_axes)
    if config.data.sequence_length % time_parts:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} cannot be split over "
            f"mesh.{'*'.join(time_axes)}={time_parts}: "
            f"set data.sequence_length to a multiple of {time_parts}"
        )
    if config.task == "span_corruption" and time_parts > 1:
        raise ConfigError(
            f"mesh.{'*'.join(time_axes)}={time_parts} splits the tokens of a row, and those of "
            "task='span_corruption' are too few in the decoder: set mesh.context to 1"
        )


def _check_context(config: "RunConfig", mesh: MeshConfig) -> None:
    """Raises ConfigError if attention cannot be computed over the devices of the context axis."""
    if mesh.context == 1:
        return
    parallelism = config.model.attention.context_parallelism
    length, num_heads = config.data.sequence_length, config.model.num_heads
    # A ring gives each device two chunks of a row, an early and a late one, so that all devices
    # have equally much to do under a causal mask.
    if parallelism == "ring" and length % (2 * mesh.context):
        raise ConfigError(
            f"data.sequence_length={length} cannot be cut into 2 chunks for each of "
            f"mesh.context={mesh.context} devices of a ring: "
            f"set data.sequence_length to a multiple of {2 * mesh.context}"
        )
    # Ulysses gives each device all tokens of some heads, so it splits the heads over both axes.
    split = mesh.context * mesh.tensor
    if parallelism == "ulysses" and num_heads % split:
        raise ConfigError(
            f"model.num_heads={num_heads} cannot be split over mesh.context*tensor={split}, "
            "as Ulysses does: set model.attention.context_parallelism to 'ring'"
        )


def _check_pipeline(config: "RunConfig", mesh: MeshConfig) -> None:
    """Raises ConfigError if layers or microbatches cannot be dealt out to the pipeline's stages."""
    stages, rounds = mesh.pipeline, config.train.pipeline_rounds
    microbatches = config.train.accumulation
    if stages == 1:
        return
    if config.task == "span_corruption":
        raise ConfigError(
            f"mesh.pipeline={stages} cuts one stack of layers into stages, and "
            "task='span_corruption' has an encoder and a decoder: set mesh.pipeline to 1"
        )
    if microbatches % stages:
        raise ConfigError(
            f"train.accumulation={microbatches} microbatches cannot be dealt out to "
            f"mesh.pipeline={stages} stages: "
            f"set train.accumulation to a multiple of {stages}"
        )
    model, pieces = config.model, stages * rounds
    kinds, repeats = model.layer_groups[model.pipelined_group]
    if repeats % pieces:
        fitting = max(1, repeats // pieces) * pieces
        raise ConfigError(
            f"model.num_layers={model.num_layers} has {repeats} repeats of {'+'.join(kinds)} "
            f"layers, which mesh.pipeline*train.pipeline_rounds={pieces} pieces cannot share: "
            f"set model.num_layers to {model.num_layers + (fitting - repeats) * len(kinds)}"
        )
