"""Gathers the weights that fsdp splits, and sums their gradients, for each pass that uses them.

A weight is gathered once in the forward pass and once in the backward pass, in the dtype of the
activations. A matmul's backward pass reads the gathered weight, but no layer stores it until then:
remat gathers it again, as a part of recomputing everything ("full"), or as all that is recomputed
(`save_all_but_gathered`).

`gather` and `scatter` run inside shard_map. A TPU's network is a torus, and its compiler gathers
and scatters over two dimensions of it at most. Over three it would add up whole arrays, which sends
twice as much. So on TPUs both functions take one axis of the mesh at a time.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from moe.config import RULES
from moe.parallel.mesh import axis_size, chip, constrain, per_shard, splitting_axes

_GATHERED = "gathered weight"
_TOKENS = "gathered tokens"
_CUBES = ("TPU v4", "TPU v5", "TPU7x")  # the kinds of TPUs whose torus has three dimensions


def lay_out_whole(w: jax.Array, dtype: jax.typing.DTypeLike, dims: str) -> jax.Array:
    """Returns a weight in `dtype`, whole along D. `dims` are its dimensions."""
    w, axes = w.astype(dtype), _width_axes(w, dims)
    # Without D, an axis that split it would split the next dimension that lists the axis: the
    # experts of a router's weight.
    whole_dims = "".join(
        "-" if dim == "D" or set(RULES.get(dim, ())) & set(axes) else dim for dim in dims
    )
    if _needs_own_collectives(axes):
        run = lambda w: (gather(w, axes, dims.index("D")),)
        (w,) = per_shard(run, (dims,), (whole_dims,), w)
    else:
        w = constrain(w, whole_dims)
    return checkpoint_name(w, _GATHERED)


def sum_products(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    factor_dims: tuple[str, str],
    dims: str,
    *factors: jax.Array,
) -> jax.Array:
    """Returns a weight's gradient, the product of two arrays of tokens, split as the weight is.

    `factor_dims` are the dimensions of the two arrays, and `dims` those of the weight.
    """
    shape = jax.eval_shape(multiply, *factors)
    width_axes, dim = _width_axes(shape, dims), dims.index("D")
    if not _needs_own_collectives(width_axes):
        return constrain(multiply(*factors), dims)
    rows, time, *_ = splitting_axes(factor_dims[0], factors[0].shape)
    run = lambda *factors: (sum_gradient(multiply(*factors), dim, width_axes, rows + time),)
    return per_shard(run, factor_dims, (dims,), *factors)[0]


def sum_gradient(
    gradient: jax.Array, dim: int, width_axes: tuple[str, ...], token_axes: tuple[str, ...]
) -> jax.Array:
    """Sums a gradient that is whole along D over all tokens, and splits it as the weight is.

    The width of the weight is split over `width_axes`, and the tokens over `token_axes`.
    """
    axes = manual_axes(width_axes)
    # An axis that splits the weight and no tokens has devices with equal gradients.
    copies = math.prod(axis_size(axis) for axis in axes if axis not in token_axes)
    gradient = gradient / copies if copies > 1 else gradient
    gradient = scatter(gradient, axes, dim)
    # What is left to sum over the other axes is this device's part alone.
    return sum_over(gradient, tuple(axis for axis in token_axes if axis not in axes))


def manual_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of some axes that a shard_map has made Manual and that have several devices."""
    return tuple(axis for axis in axes if axis_size(axis) > 1)


def sum_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sums an array over the devices of those axes that are Manual here."""
    axes = manual_axes(axes)
    return jax.lax.psum(x, axes) if axes else x


def gather(w: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Joins the parts of a weight along a dimension, which some mesh axes split."""
    for axes_at_once in reversed(_steps(manual_axes(axes))):
        # The compiler gathers over a cube of 8 at once, though it does not scatter over one.
        for groups in reversed(_rounds(axes_at_once, smallest=16)):
            w = jax.lax.all_gather(w, axes_at_once, axis=dim, tiled=True, axis_index_groups=groups)
    return w


def scatter(gradient: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Adds up the devices' gradients over some mesh axes, which then split the dimension."""
    for axes_at_once in _steps(manual_axes(axes)):
        for groups in _rounds(axes_at_once, smallest=8):
            gradient = _scatter_once(gradient, axes_at_once, dim, groups)
    return gradient


def _scatter_once(
    gradient: jax.Array, axes: tuple[str, ...], dim: int, groups: list[list[int]] | None
) -> jax.Array:
    """Adds up and splits over some axes at once, or over groups of the devices of one axis."""
    leading, after = gradient.shape[:dim], gradient.shape[dim + 1 :]
    parts = len(groups[0]) if groups else math.prod(map(axis_size, axes))
    size = gradient.shape[dim] // parts
    # The compiler of TPUs adds up whole arrays where a size of 1 stands in front of the dimension,
    # and for some sizes of a matrix, such as 128,256. Parts with a dimension of their own avoid it.
    # It also does so for stacked arrays with several dimensions after this one.
    if _is_on_tpus() and math.prod(leading) == 1:
        gradient, dim = gradient.reshape(parts, size, *after), 0
    elif _is_on_tpus() and not after:
        gradient, dim = gradient.reshape(-1, parts, size), 1
    elif _is_on_tpus():
        gradient = gradient.reshape(*leading, parts * size, math.prod(after))
    gradient = jax.lax.psum_scatter(
        gradient, axes, scatter_dimension=dim, tiled=True, axis_index_groups=groups
    )
    return gradient.reshape(*leading, size, *after)


def _steps(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the axes that each step of a scatter takes at once. A gather reverses the steps."""
    if _is_on_tpus():
        return [(axis,) for axis in axes]
    return [axes] if axes else []


def _is_on_tpus() -> bool:
    """Returns whether the devices of the mesh that is set are TPUs."""
    return (chip(jax.sharding.get_abstract_mesh()) or "").startswith("TPU")


def _rounds(axes: tuple[str, ...], smallest: int) -> list[list[list[int]] | None]:
    """Returns the groups of devices of each round of a scatter over some axes.

    An axis of all devices of a cube takes two rounds, if they are `smallest` or more: devices
    scatter with distant ones first, and then, in groups of `number`, with their neighbours. Other
    axes take one round, in which None stands for one group of all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = axis_size(axes[0])
    if chip(mesh) not in _CUBES or size < max(mesh.size, smallest):
        return [None]
    number = 2 ** (size.bit_length() // 2)  # about the square root, so that rounds are alike
    far = [list(range(place, size, number)) for place in range(number)]
    near = [list(range(start, start + number)) for start in range(0, size, number)]
    return [far, near]


def _width_axes(w: Any, dims: str) -> tuple[str, ...]:
    """Returns the mesh axes that split the width D of a weight."""
    return splitting_axes(dims, w.shape)[dims.index("D")]


def _needs_own_collectives(axes: tuple[str, ...]) -> bool:
    """Returns whether the partitioner would send much more over these axes than `gather` does.

    One axis of a whole cube of 8 TPUs is left to the partitioner: it sends a seventh more, but
    piece by piece while it multiplies. Over more devices it would send twice as much.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_large_cube = chip(mesh) in _CUBES and 8 < mesh.size == math.prod(mesh.shape[a] for a in axes)
    return len(_steps(axes)) > 1 or is_large_cube


def name_gathered_tokens(x: jax.Array) -> jax.Array:
    """Names activations that were gathered, so that `save_all_but_gathered` saves them."""
    return checkpoint_name(x, _TOKENS)


def weights_are_split(width: int) -> bool:
    """Returns whether the mesh splits weights along D, of this width."""
    (axes,) = splitting_axes("D", (width,))
    return bool(axes)


def save_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Returns whether to save a result: a policy of jax.checkpoint, for all but gathered weights.

    It is not enough to refuse their name, since the gather's own result would be saved instead. So
    no result of a gather is saved, unless it has another name, as gathered tokens have.
    """
    gathers = ("sharding_constraint", "all_gather")
    return primitive.name not in gathers and params.get("name") != _GATHERED
