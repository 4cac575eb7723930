"""The mesh of a run, and how arrays lie on it by the table `moe.config.layout.RULES`."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe.config import AXES, RULES, ConfigError, RunConfig, check_layout, split_axes
from moe.parameters import is_declared


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over `devices` (all, by default). Raises ConfigError where batch or model
    cannot be split over it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.mesh.resolve(len(devices))
    check_layout(config, sizes)
    if (
        config.model.moe.exchange == "ragged_all_to_all"
        and sizes.expert > 1
        and devices[0].platform == "cpu"
    ):
        raise ConfigError(
            "model.moe.exchange='ragged_all_to_all' is not there on CPUs: set model.moe.exchange to 'all_gather'"
        )
    return jax.make_mesh(
        sizes.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def spec(dims: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Which axes of `mesh` split each dimension of an array, by RULES. Raises ValueError where a
    size cannot be split.

    Three dimensions are copied instead: key/value heads (K) fewer than the tensor axis, and a batch
    or a time (B, T) too small to split, as in the trace that makes the parameters or in decoding. A
    run's own batch is checked by `check_layout`.
    """
    entries: list[tuple[str, ...]] = []
    # The axes of a dimension that is copied do not fall to another: what B cannot use does not
    # split an activation's D.
    for dim, size, axes in zip(dims, shape, split_axes(dims, mesh.shape), strict=True):
        split = math.prod(mesh.shape[axis] for axis in axes)
        if size % split and dim not in "BTK":
            raise ValueError(
                f"dimension {dim} of {dims} has size {size}: it cannot be split over {'*'.join(axes)}={split}"
            )
        entries.append(() if size % split else axes)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out by RULES inside a program whose mesh was set; without a mesh, and inside
    shard_map, does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_auto(mesh):
        return x
    # Where a mesh of another project lacks a dimension's axes, the compiler decides: an empty entry
    # would ask for copies.
    lacking = [dim in RULES and not set(RULES[dim]).intersection(mesh.shape) for dim in dims]
    entries = zip(spec(dims, x.shape, mesh), lacking, strict=True)
    return jax.lax.with_sharding_constraint(
        x,
        PartitionSpec(*(PartitionSpec.UNCONSTRAINED if none else entry for entry, none in entries)),
    )


def per_shard(
    function: Callable[..., Any],
    in_dims: tuple[str, ...],
    out_dims: tuple[str, ...],
    *arrays: jax.Array,
) -> Any:
    """Calls `function` on each device's part of the arrays, laid out by RULES (jax.shard_map);
    without a mesh, on the whole arrays.

    Without a mesh the function must make the whole of what its parts make: its results' shapes are
    taken from that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_auto(mesh):
        return function(*arrays)
    in_specs = tuple(spec(dims, x.shape, mesh) for dims, x in zip(in_dims, arrays, strict=True))
    shapes = jax.eval_shape(function, *arrays)
    out_specs = tuple(spec(dims, x.shape, mesh) for dims, x in zip(out_dims, shapes, strict=True))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)


def on_auto_axes(
    out_specs: Callable[[PartitionSpec], Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of arrays, or a method of a Flax module, run where arrays lie on a mesh of
    Explicit axes: they are Auto within.

    JAX checks the sharding of each operation on Explicit axes, which is the default of
    jax.make_mesh, and asks where it cannot tell; we leave that to the compiler. `out_specs` gives
    the specs of the results (a prefix of their tree) from that of the first argument.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            mesh, spec = _explicit_mesh(args, kwargs)
            if mesh is None:
                return function(*args, **kwargs)
            if not hasattr(args[0], "unbind"):
                return _call_on_auto_axes(function, mesh, out_specs(spec), *args, **kwargs)
            module, *args = args
            if module.is_initializing():  # on copies of whole arrays no sharding is in doubt
                args, kwargs = jax.tree.map(
                    functools.partial(_copy_everywhere, mesh), (args, kwargs)
                )
                return function(module, *args, **kwargs)
            module, variables = module.unbind()
            apply = functools.partial(module.apply, method=function.__name__)
            return _call_on_auto_axes(apply, mesh, out_specs(spec), variables, *args, **kwargs)

        return run

    return decorate


def _explicit_mesh(*tree: Any) -> tuple[Any, PartitionSpec | None]:
    """The mesh with Explicit axes that the arrays of a tree lie on, and the spec of the first that
    it splits; None where none is.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(tree) if _is_array(x)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:  # arrays bring their mesh along
        mesh = next((sharding.mesh for sharding in shardings if not sharding.mesh.empty), mesh)
    if AxisType.Explicit not in mesh.axis_types:
        return None, None
    return mesh, next(
        (sharding.spec for sharding in shardings if any(sharding.spec)), PartitionSpec()
    )


def _call_on_auto_axes(
    function: Callable[..., Any], mesh: Any, out_specs: Any, *args: Any, **kwargs: Any
) -> Any:
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def call(arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            structure, [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
        )
        return function(*args, **kwargs)

    axes = tuple(
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )

    @jax.jit  # outside of it shard_map takes no mesh of other axis types than the arrays'
    def on_auto_axes(arrays: list[jax.Array]) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(call, axes=axes, out_sharding=out_specs)(arrays)

    return on_auto_axes(arrays)


def _copy_everywhere(mesh: Any, x: Any) -> Any:
    """An array with the same value whole on each device of the mesh; anything else as it is."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())) if _is_array(x) else x


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def axis_size(axis: str) -> int:
    """Devices along a mesh axis inside shard_map; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(axis) == AxisType.Manual
    return mesh.shape[axis] if manual else 1


def chip(mesh: Any) -> str | None:
    """The kind of a mesh's devices ("TPU v5p", "NVIDIA H200", "cpu"), which need not be here; None
    for a mesh that does not know.
    """
    device = mesh.abstract_mesh.abstract_device
    return None if device is None else device.device_kind


def _is_auto(mesh: Any) -> bool:
    """Whether `mesh` has an axis of ours and leaves layouts to the compiler: not so inside
    shard_map, nor without a mesh.
    """
    return bool(set(AXES).intersection(mesh.shape)) and all(
        kind == AxisType.Auto for kind in mesh.axis_types
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each array of a tree of shapes: by its dimensions where it is Declared,
    else copied to every device.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if is_declared(leaf):
            return NamedSharding(mesh, spec(leaf.dims, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, tree, is_leaf=is_declared)


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, in ascending order."""
    sharding = NamedSharding(mesh, spec("B", (batch_size,), mesh))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def global_batch(
    rows: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int, dims: Mapping[str, str]
) -> dict[str, jax.Array]:
    """Joins every process's `host_rows` of a batch into global arrays.

    `dims` has the dimension letters of each field, the first of which is B. The mesh splits a
    field by these letters.
    """
    held = host_rows(mesh, batch_size)

    def join(name: str, local: np.ndarray) -> jax.Array:
        if dims[name][:1] != "B":
            raise ValueError(f"dims[{name!r}]={dims[name]!r} does not start with B, the rows")
        shape = (batch_size, *local.shape[1:])
        sharding = NamedSharding(mesh, spec(dims[name], shape, mesh))

        def read(index: tuple[slice, ...]) -> np.ndarray:
            """Returns a device's part of the array, which lies in the rows of this process."""
            asked = np.arange(batch_size)[index[0]]
            return local[np.searchsorted(held, asked)][:, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, read)

    return {name: join(name, local) for name, local in rows.items()}
