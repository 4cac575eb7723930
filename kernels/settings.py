"""Guards the kernels against settings of JAX and meshes that they are not written for.

A process that imports the kernels may have other settings for its own code.
"""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AxisType


@contextlib.contextmanager
def own_settings(dtype: jax.typing.DTypeLike) -> Iterator[None]:
    """Sets the JAX settings that the kernels are written for, while they are traced.

    64-bit types are on only if `dtype` is float64. Otherwise a process that sets `jax_enable_x64`
    would turn each Python number in an index map into an int64, beside the kernel's int32. Implicit
    promotion is on, since the kernels rely on it, even if the process forbids it in its own code.
    A caller sees no difference: arrays keep their dtypes. Arrays that come in must have dtypes that
    the kernels know.
    """
    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def check_axes(name: str, x: object) -> None:
    """Raises ValueError if `x` lies on mesh axes whose use JAX checks in each operation.

    These are Explicit axes, and the axes of a jax.shard_map with check_vma. The kernels know of no
    mesh, so they cannot tell JAX how their results lie on it.
    """
    if not isinstance(x, jax.Array):
        return
    sharding, manual = jax.typeof(x).sharding, getattr(jax.typeof(x), "manual_axis_type", None)
    if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
        raise ValueError(
            f"{name} {x.shape} is split over Explicit mesh axes, as {sharding.spec}: "
            "call this inside a jax.shard_map over these axes, with check_vma=False"
        )
    if manual is not None and manual.varying:
        raise ValueError(
            f"{name} {x.shape} is inside a jax.shard_map that checks {sorted(manual.varying)}: "
            "give it check_vma=False"
        )
