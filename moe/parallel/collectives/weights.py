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
_TOKENS = "gathered tokens"


def lay_out_whole(w: jax.Array, dtype: jax.typing.DTypeLike, dims: str) -> jax.Array:
    """Returns a weight in `dtype`, whole along D. `dims` are its dimensions."""
    return checkpoint_name(constrain(w.astype(dtype), dims.replace("D", "-")), _GATHERED)


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
