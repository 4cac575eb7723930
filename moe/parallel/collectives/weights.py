"""Gathers the weights that fsdp splits, for each pass that multiplies by them.

A weight is gathered once in the forward pass and once in the backward pass, in the dtype of the
activations. So whoever multiplies by it keeps the gathered weight for its gradient, and the layer
forgets it after the forward pass and gathers it again: by recomputing everything (remat "full"), or
by recomputing the gathers alone (`forget_gathered`).
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from moe.parallel.mesh import constrain, splitting_axes

_GATHERED = "gathered weight"


def gather_weight(w: jax.Array, dtype: jax.typing.DTypeLike, dims: str) -> jax.Array:
    """Returns a weight in `dtype`, whole along D, by a layout (outside of shard_map)."""
    return name_gathered(constrain(w.astype(dtype), dims.replace("D", "-")))


def name_gathered(w: jax.Array) -> jax.Array:
    """Names a gathered weight, so that `forget_gathered` knows it."""
    return checkpoint_name(w, _GATHERED)


def are_split(width: int) -> bool:
    """Returns whether the mesh splits weights along D, of this width."""
    (axes,) = splitting_axes("D", (width,))
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes[axis] > 1 for axis in axes)


def forget_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Lets a backward pass keep everything but gathered weights: a policy of jax.checkpoint.

    A name alone would not do, because then the result of the gather is kept, which is what the name
    was given to.
    """
    gathers = ("sharding_constraint", "all_gather")
    return primitive.name not in gathers and params.get("name") != _GATHERED
