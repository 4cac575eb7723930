"""Makes a run's mesh, and lays arrays out on it by the table `moe.config.layout.RULES`."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe.config import AXES, RULES, ConfigError, MeshConfig, RunConfig, check_layout, split_axes
from moe.parameters import is_declared

AnyMesh = Mesh | AbstractMesh


def make_mesh(
    config: RunConfig,
    devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # an alias
) -> Mesh:
    """Returns the mesh of a run over `devices`, or over all that there are.

    Raises ConfigError where batch or model cannot be split over it.
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
            "model.moe.exchange='ragged_all_to_all' does not exist on CPUs: "
            "set model.moe.exchange to 'all_gather'"
        )
    return Mesh(arrange_devices(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange_devices(sizes: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in the shape of the mesh, in an order that follows the network.

    The later an axis, the more its devices send each other, so the last axes get the neighbours: of
    a TPU's torus, or within a host of GPUs. Slices of TPUs have only a slow network between them,
    and only the data axis spans it. Raises ConfigError if that axis cannot.
    """
    slice_of = lambda device: getattr(device, "slice_index", 0)
    if devices[0].platform == "gpu":
        # JAX numbers GPUs by their processes, which SLURM may deal out to the hosts in turn. The
        # GPUs of a host, or of several hosts that NVLink connects, are a slice.
        near = lambda device: (slice_of(device), device.process_index, device.id)
        return np.array(sorted(devices, key=near)).reshape(sizes.sizes)
    num_slices = len(set(map(slice_of, devices)))
    if devices[0].platform != "tpu" or num_slices == 1:
        # An axis of 8 on 4x4x4 chips takes one dimension of the torus and a half of another.
        return mesh_utils.create_device_mesh(sizes.sizes, devices, allow_split_physical_axes=True)
    if sizes.data % num_slices:
        raise ConfigError(
            f"mesh.data={sizes.data} cannot span the {num_slices} slices that there are: "
            f"set mesh.data to a multiple of {num_slices}"
        )
    within = (sizes.data // num_slices, *sizes.sizes[1:])
    across = (num_slices, *(1 for _ in sizes.sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def spec(dims: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Returns which axes of `mesh` split each dimension of an array, by RULES.

    Four dimensions stay whole where their size cannot be split: key/value heads (K), if they are
    fewer than the tensor axis has devices, a batch or a time (B, T) that is too small, as in the
    trace that makes the parameters or in decoding, and the layers (L) of a group that is no part of
    a pipeline's stages. The residual stream's time (t) is split as T is where tensor cannot split
    it as well. A run's own batch is checked by `check_layout`. Raises ValueError where another
    dimension's size cannot be split.
    """
    return _spec_over(dims, shape, mesh.shape)


def _spec_over(dims: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the spec of an array over the axes in `sizes` alone."""
    return PartitionSpec(*_axes_over(dims, shape, sizes))


def _axes_over(
    dims: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Returns which of the axes in `sizes` split each dimension of an array."""
    entries: list[tuple[str, ...]] = []
    # If a dimension has to stay whole, its axes split no other dimension either: an axis that
    # cannot split an activation's B must not split its D instead.
    for dim, size, axes in zip(dims, shape, split_axes(dims, sizes), strict=True):
        num_parts = math.prod(sizes[axis] for axis in axes)
        if dim == "t" and size % num_parts:
            axes = tuple(axis for axis in axes if axis in RULES["T"])
            num_parts = math.prod(sizes[axis] for axis in axes)
        if size % num_parts and dim not in "BTtKL":
            raise ValueError(
                f"dimension {dim} of {dims} has size {size}: "
                f"it cannot be split over {'*'.join(axes)}={num_parts}"
            )
        entries.append(() if size % num_parts else axes)
    return entries


def splitting_axes(dims: str, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Returns which Auto axes of several devices split each dimension, by RULES.

    They are those of the mesh that was set.
    """
    sizes = _auto_sizes(jax.sharding.get_abstract_mesh())
    found = _axes_over(dims, shape, sizes)
    return [tuple(axis for axis in axes if sizes[axis] > 1) for axes in found]


def num_parts(dim: str) -> int:
    """Returns into how many parts the Auto axes of the mesh that was set split a dimension."""
    sizes = _auto_sizes(jax.sharding.get_abstract_mesh())
    return math.prod(sizes[axis] for axis in RULES[dim] if axis in sizes)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Lays `x` out by RULES inside a program whose mesh was set.

    Only the Auto axes of the mesh split `x`. A shard_map makes its axes Manual, so inside it the
    remaining axes are used. Without an Auto axis, or without a mesh, nothing is done.
    """
    sizes = _auto_sizes(jax.sharding.get_abstract_mesh())
    if not sizes:
        return x
    # The mesh of another project may have none of a dimension's axes. Then the compiler decides how
    # to split this dimension: an empty entry would ask for copies.
    lacking = [dim in RULES and not sizes.keys() & set(RULES[dim]) for dim in dims]
    entries = [
        PartitionSpec.UNCONSTRAINED if is_lacking else entry
        for entry, is_lacking in zip(_spec_over(dims, x.shape, sizes), lacking, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def per_shard(
    function: Callable[..., Any],
    in_dims: tuple[str, ...],
    out_dims: tuple[str, ...],
    *arrays: jax.Array,
) -> Any:
    """Calls `function` on each device's part of the arrays, laid out by RULES (jax.shard_map).

    `in_dims` and `out_dims` hold the dimension letters of each array and of each result. The Auto
    axes of the mesh split the arrays. Along an axis that RULES do not name, each device gets the
    whole arrays, and without Auto axes so does `function`, outside of any shard_map. `function` is
    also traced on the whole arrays, to find the shapes of the whole results.

    Raises ValueError if RULES split a weight's experts or feed-forward width over an axis that a
    surrounding shard_map has made Manual. The collectives of `function` would run over that axis,
    although it does not split the weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _check_manual_axes(mesh, in_dims)
    # A kernel cannot be split by the compiler, so the axes with other names become Manual, too.
    axes = set(_axes_of_type(mesh, AxisType.Auto))
    if AxisType.Explicit in mesh.axis_types or not axes:
        return function(*arrays)
    sizes = _auto_sizes(mesh)
    results = jax.eval_shape(function, *arrays)
    in_specs, out_specs = (
        tuple(_spec_over(dims, x.shape, sizes) for dims, x in zip(all_dims, xs, strict=True))
        for all_dims, xs in ((in_dims, arrays), (out_dims, results))
    )
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )(*arrays)


def _check_manual_axes(mesh: AnyMesh, in_dims: tuple[str, ...]) -> None:
    """Raises ValueError if a Manual axis is one of those that split a weight among `in_dims`."""
    manual = {axis for axis in _axes_of_type(mesh, AxisType.Manual) if mesh.shape[axis] > 1}
    for dims in in_dims:
        for dim, axes in zip(dims, split_axes(dims, mesh.shape), strict=True):
            wrong = manual.intersection(axes)
            if wrong and dim in "EF":
                axis = min(wrong)
                own = f", give each device its own experts (P({axis!r}))" if dim == "E" else ""
                raise ValueError(
                    f"dimension {dim} of {dims} is to be split over the mesh axis {axis!r}, which "
                    f"a jax.shard_map around this has made Manual: leave {axis!r} out of its "
                    f"axis_names{own}, or give that axis of your mesh another name"
                )


def on_auto_axes(
    out_specs: Callable[[PartitionSpec], Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes Explicit axes Auto within a function of arrays, or a method of a Flax module.

    Explicit axes are the default of jax.make_mesh. On these JAX checks the sharding of each
    operation, and raises an error where it cannot infer one. On Auto axes the compiler decides.
    `out_specs` makes the specs of the results (a prefix of their tree) from the spec of the first
    argument that is split.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            placement = _explicit_placement(args, kwargs)
            if placement is None:
                return function(*args, **kwargs)
            mesh, specs = placement.mesh, out_specs(placement.spec)
            if not hasattr(args[0], "unbind"):
                return _call_on_auto_axes(function, mesh, specs, *args, **kwargs)
            module, arrays = args[0], args[1:]
            if module.is_initializing():  # JAX can infer all shardings from whole copies
                copy = functools.partial(_copy_everywhere, mesh)
                arrays, kwargs = jax.tree.map(copy, (arrays, kwargs))
                return function(module, *arrays, **kwargs)
            module, variables = module.unbind()
            apply = functools.partial(module.apply, method=function.__name__)
            return _call_on_auto_axes(apply, mesh, specs, variables, *arrays, **kwargs)

        return run

    return decorate


class _Placement(NamedTuple):
    """Holds the mesh that arrays lie on, and the spec of the first array that it splits."""

    mesh: AnyMesh
    spec: PartitionSpec


def _explicit_placement(*tree: Any) -> _Placement | None:
    """Returns the placement of a tree's arrays, or None if no axis of their mesh is Explicit."""
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(tree) if _is_array(x)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:  # arrays bring their mesh along
        mesh = next((sharding.mesh for sharding in shardings if not sharding.mesh.empty), mesh)
    if AxisType.Explicit not in mesh.axis_types:
        return None
    specs = (sharding.spec for sharding in shardings if any(sharding.spec))
    return _Placement(mesh, next(specs, PartitionSpec()))


def _call_on_auto_axes(
    function: Callable[..., Any], mesh: Any, out_specs: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls `function` with the Explicit axes of `mesh` made Auto.

    Arguments that are not arrays reach `function` unchanged, outside of the traced arguments.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def call(arrays: list[jax.Array]) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            structure, [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
        )
        return function(*args, **kwargs)

    axes = tuple(_axes_of_type(mesh, AxisType.Explicit))

    @jax.jit  # outside of jit, shard_map needs a mesh with the arrays' own axis types
    def run_jitted(arrays: list[jax.Array]) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(call, axes=axes, out_sharding=out_specs)(arrays)

    return run_jitted(arrays)


def _copy_everywhere(mesh: Any, x: Any) -> Any:
    """Returns a copy of an array that is whole on each device, and anything else as it is."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())) if _is_array(x) else x


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def axis_size(axis: str) -> int:
    """Returns the number of devices along a mesh axis inside shard_map, and 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in _axes_of_type(mesh, AxisType.Manual) else 1


def chip(mesh: AnyMesh) -> str | None:
    """Returns the kind of a mesh's devices ("TPU v5p", "NVIDIA H200", "cpu").

    They need not be on this machine. The result is None for a mesh without devices.
    """
    device = mesh.abstract_mesh.abstract_device
    return None if device is None else device.device_kind


def _axes_of_type(mesh: AnyMesh, axis_type: AxisType) -> list[str]:
    return [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == axis_type
    ]


def _auto_sizes(mesh: AnyMesh) -> dict[str, int]:
    """Returns the sizes of those of our axes whose layouts the compiler decides.

    On a mesh that still has Explicit axes there are none. Modules make these axes Auto
    (`on_auto_axes`) before they lay out arrays.
    """
    if AxisType.Explicit in mesh.axis_types:
        return {}
    return {axis: mesh.shape[axis] for axis in _axes_of_type(mesh, AxisType.Auto) if axis in AXES}


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for each array of a tree of shapes.

    A Declared array is split by its dimensions. Any other is copied to every device. An optimizer
    that leaves a parameter to another one has a node without arrays in its declaration. Raises
    ValueError for an array that lacks a dimension of its parameter, as a factored moment does.
    """

    def sharding(leaf: Any) -> Any:
        if not is_declared(leaf):
            return NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(functools.partial(split, leaf.dims), leaf.value)

    def split(dims: str, x: Any) -> NamedSharding:
        if len(x.shape) != len(dims):
            raise ValueError(
                f"an array of shape {x.shape} stands for a parameter of dimensions {dims}: "
                "take an optimizer whose state has the shapes of the parameters"
            )
        return NamedSharding(mesh, spec(dims, x.shape, mesh))

    return jax.tree.map(sharding, tree, is_leaf=is_declared)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of the shards that one device holds of a tree of arrays or shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


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
    field by these letters. Raises ValueError for a field that does not start with B.
    """
    local_rows = host_rows(mesh, batch_size)

    def join(name: str, local: np.ndarray) -> jax.Array:
        if dims[name][:1] != "B":
            raise ValueError(f"dims[{name!r}]={dims[name]!r} does not start with B, the rows")
        shape = (batch_size, *local.shape[1:])
        sharding = NamedSharding(mesh, spec(dims[name], shape, mesh))

        def read(index: Any) -> np.ndarray:
            """Returns a device's part, given by a slice for each dimension of the whole array."""
            device_rows = np.arange(batch_size)[index[0]]
            places = np.searchsorted(local_rows, device_rows)  # in this process's part
            return local[places][:, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, read)

    return {name: join(name, local) for name, local in rows.items()}
