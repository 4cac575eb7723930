"""The settings and meshes of JAX that the kernels are written for, whatever the process that
imports them has set for its own code.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType


@contextlib.contextmanager
def own_settings(dtype: Any) -> Iterator[None]:
    """For the time of a trace: integers of 32 bits, unless arrays of `dtype` are of 64; and
    operands that JAX may promote.

    With `jax_enable_x64` each number that Python gives to an index map would be an int64 beside the
    kernel's int32, and a process that wants its promotions written out does not want this of the
    kernels. Nothing of what a caller sees changes: arrays keep their dtypes, and those that come in
    are to be of the dtypes that the kernels know.
    """
    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def check_axes(name: str, x: Any) -> None:
    """Raises ValueError where JAX checks how each operation treats a mesh axis: the kernels know of
    no mesh and cannot tell it.
    """
    if not isinstance(x, jax.Array):
        return
    sharding, manual = jax.typeof(x).sharding, getattr(jax.typeof(x), "manual_axis_type", None)
    if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        raise ValueError(
            f"{name} {x.shape} is split over Explicit mesh axes, as {sharding.spec}: call this inside jax.sharding.auto_axes"
        )
    if manual is not None and manual.varying:
        raise ValueError(
            f"{name} {x.shape} is inside a jax.shard_map that checks {sorted(manual.varying)}: give it check_vma=False"
        )
