"""Gathers the weights that fsdp splits, and sums their gradients, for each pass that uses them.

A weight is gathered once in the forward pass and once in the backward pass, in the dtype of the
activations. So whoever multiplies by it keeps the gathered weight for its gradient, and the layer
forgets it after the forward pass and gathers it again: by recomputing everything (remat "full"), or
by recomputing the gathers alone (`forget_gathered`).

`gather` and `scatter` run inside shard_map. A TPU's network is a torus, on which the compiler knows
gathers over two of its dimensions at most, and scatters as well. Where more are asked of it, it
adds up whole arrays, which sends twice as much. So on TPUs both go one axis of the mesh at a time.
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
    if _goes_in_steps(axes):
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
    if not _goes_in_steps(width_axes):
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
    axes = present(width_axes)
    # An axis that splits the weight and no tokens has devices with equal gradients.
    copies = math.prod(axis_size(axis) for axis in axes if axis not in token_axes)
    gradient = gradient / copies if copies > 1 else gradient
    gradient = scatter(gradient, axes, dim)
    # The other axes sum what is left, a part of it.
    others = tuple(axis for axis in present(token_axes) if axis not in axes)
    return jax.lax.psum(gradient, others) if others else gradient


def present(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the axes that have several devices here. Outside of shard_map there are none."""
    return tuple(axis for axis in axes if axis_size(axis) > 1)


def gather(w: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Joins the parts of a weight along a dimension, which some mesh axes split."""
    for step in reversed(_one_by_one(present(axes))):
        # The compiler gathers over a cube of 8 at once, though it does not scatter.
        for groups in reversed(_groups(step, smallest=16)):
            w = jax.lax.all_gather(w, step, axis=dim, tiled=True, axis_index_groups=groups)
    return w


def scatter(gradient: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Adds up the devices' gradients over some mesh axes, which then split the dimension."""
    for step in _one_by_one(present(axes)):
        for groups in _groups(step, smallest=8):
            gradient = _scatter_once(gradient, step, dim, groups)
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


def _one_by_one(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the axes that a gather or scatter takes at once, in the order of a scatter."""
    if _is_on_tpus():
        return [(axis,) for axis in axes]
    return [axes] if axes else []


def _is_on_tpus() -> bool:
    """Returns whether the devices of the mesh that is set are TPUs."""
    return (chip(jax.sharding.get_abstract_mesh()) or "").startswith("TPU")


def _groups(axes: tuple[str, ...], smallest: int) -> list[list[list[int]] | None]:
    """Returns the groups of devices that scatter with one another, in turn. None is all at once.

    An axis of all devices of a cube takes two turns, if they are `smallest` or more. First devices
    scatter that are as many places apart as there are in a group of neighbours, then neighbours.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = axis_size(axes[0])
    if chip(mesh) not in _CUBES or size < max(mesh.size, smallest):
        return [None]
    number = 2 ** (size.bit_length() // 2)  # of devices in a group of the second turn
    far = [list(range(place, size, number)) for place in range(number)]
    near = [list(range(start, start + number)) for start in range(0, size, number)]
    return [far, near]


def _width_axes(w: Any, dims: str) -> tuple[str, ...]:
    """Returns the mesh axes that split the width D of a weight."""
    return splitting_axes(dims, w.shape)[dims.index("D")]


def _goes_in_steps(axes: tuple[str, ...]) -> bool:
    """Returns whether the compiler, left alone, would send much more than it must over these axes.

    One axis of a whole cube of 8 TPUs is left to it: it sends a seventh more, but piece by piece
    while it multiplies. Over more devices it would send twice as much.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_large_cube = chip(mesh) in _CUBES and 8 < mesh.size == math.prod(mesh.shape[a] for a in axes)
    return len(_one_by_one(axes)) > 1 or is_large_cube


def name_gathered_tokens(x: jax.Array) -> jax.Array:
    """Names activations that were gathered, so that `forget_gathered` keeps them."""
    return checkpoint_name(x, _TOKENS)


def weights_are_split(width: int) -> bool:
    """Returns whether the mesh splits weights along D, of this width."""
    (axes,) = splitting_axes("D", (width,))
    return bool(axes)


def forget_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Returns whether a backward pass keeps a result: a policy of jax.checkpoint.

    It keeps everything but gathered weights. To refuse their name alone would not do, because then
    the result of the gather is kept, which the name was given to. So no result of a gather is kept
    that has no name of its own, as gathered tokens have.
    """
    gathers = ("sharding_constraint", "all_gather")
    return primitive.name not in gathers and params.get("name") != _GATHERED
