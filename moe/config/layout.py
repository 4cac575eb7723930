"""The mesh axes, the dimensions that each of them splits, and the check that a run fits them.

Dimensions are named by the letters of the legend (docs/design.md), so the name of an array says how
it is split: `w_DF` is split over fsdp and tensor, `x_BTD` over the batch axes and context.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from moe.config.checks import ConfigError, check_types

if TYPE_CHECKING:
    from moe.config.run import RunConfig

# The mesh axes that split each dimension. A mesh axis splits at most one dimension of an array: the
# leftmost one that lists it. So fsdp and expert split the D of w_DF, fsdp alone splits the D of
# w_EDF, whose E has taken expert, and nothing splits the D of x_BTD, whose B has taken both.
# Dimensions that are not listed (H, L) are never split.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "D": ("fsdp", "expert"),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "E": ("expert",),
}


def split_axes(dims: str, mesh_axes: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the mesh axes that split each dimension of an array, by RULES."""
    used: set[str] = set()
    axes_by_dim = []
    for dim in dims:
        axes = tuple(axis for axis in RULES.get(dim, ()) if axis in mesh_axes and axis not in used)
        used.update(axes)
        axes_by_dim.append(axes)
    return axes_by_dim


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
                raise ConfigError(
                    f"{name}={size} is not a number of devices: set a positive number, or -1 for the rest"
                )
        if self.sizes.count(-1) > 1:
            free = [name for name, size in dataclasses.asdict(self).items() if size == -1]
            raise ConfigError(
                f"{'=-1 and '.join(free)}=-1 leave the mesh open: set all of them but one"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """The same mesh with -1 replaced, for `num_devices` devices. Raises ConfigError if they
        cannot be laid out so.
        """
        fixed = 1
        for size in self.sizes:
            fixed *= abs(size)
        rest = num_devices // fixed if -1 in self.sizes else 1
        if fixed * rest != num_devices:
            shape = ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())
            raise ConfigError(
                f"mesh ({shape}) does not fit {num_devices} devices: set sizes whose product is {num_devices}"
            )
        return MeshConfig(*(rest if size == -1 else size for size in self.sizes))


# The names of the mesh axes, in the order of the mesh.
AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def check_layout(config: "RunConfig", mesh: MeshConfig) -> None:
    """Raises ConfigError where the batch or the model cannot be split over a mesh without -1."""
    sizes = dataclasses.asdict(mesh)
    _check_batch(config, sizes)
    _check_context(config, mesh)
    model = config.model
    # Key/value heads are copied where the tensor axis is larger than their number, so they need
    # only divide or be divided.
    if mesh.tensor % model.num_kv_heads and model.num_kv_heads % mesh.tensor:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} and mesh.tensor={mesh.tensor} do not divide each "
            f"other: set mesh.tensor to a divisor of {model.num_kv_heads}"
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


def _check_batch(config: "RunConfig", sizes: Mapping[str, int]) -> None:
    """Raises ConfigError where the rows of a microbatch or the tokens of a row cannot be split."""
    batch_axes, time_axes = split_axes("BT", AXES)
    rows = math.prod(sizes[axis] for axis in batch_axes)
    microbatch = config.train.batch_size // config.train.accumulation
    if microbatch % rows:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} in {config.train.accumulation} microbatches "
            f"cannot be split over mesh {'*'.join(batch_axes)}={rows}: "
            f"set train.batch_size to a multiple of {rows * config.train.accumulation}"
        )
    parts = math.prod(sizes[axis] for axis in time_axes)
    if config.data.sequence_length % parts:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} cannot be split over "
            f"mesh.{'*'.join(time_axes)}={parts}: set data.sequence_length to a multiple of {parts}"
        )


def _check_context(config: "RunConfig", mesh: MeshConfig) -> None:
    attention, length, heads = (
        config.model.attention,
        config.data.sequence_length,
        config.model.num_heads,
    )
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
