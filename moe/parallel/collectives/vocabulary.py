"""Provides the collectives of a loss over a large vocabulary, which run inside shard_map.

Each device holds some positions of the batch, and a part of the weight that turns hidden states
into logits: fsdp and expert split the weight along D, and tensor along V. Devices with the same
positions and other parts of V work together on the logits. The weight is gathered along D once, and
its gradient is summed over all positions once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.parallel.collectives.weights import manual_axes, sum_over
from moe.parallel.mesh import axis_size, splitting_axes
from moe.parallel.sequence import splits_time


class Split(NamedTuple):
    """Says which mesh axes split the positions of a batch, and the weight along D and along V."""

    positions: tuple[str, ...]
    width: tuple[str, ...]
    vocabulary: tuple[str, ...]
    splits_time: bool  # whether the residual stream's time is split over tensor, which splits V


def split_of(hidden_BTD: jax.Array, weight: jax.Array, dims: str) -> Split:
    """Returns how RULES split hidden states, and a weight of the dimensions "DV" or "VD"."""
    rows, time, _ = splitting_axes("BTD", hidden_BTD.shape)
    weight_axes = dict(zip(dims, splitting_axes(dims, weight.shape), strict=True))
    splits = splits_time(hidden_BTD.shape[1])
    return Split(rows + time, weight_axes["D"], weight_axes["V"], splits)


def sum_hidden(grad_BTD: jax.Array, split: Split) -> jax.Array:
    """Sums the gradient of hidden states over the parts of V, and splits it as the stream is."""
    if split.splits_time and axis_size("tensor") > 1:
        return jax.lax.psum_scatter(grad_BTD, "tensor", scatter_dimension=1, tiled=True)
    return sum_over(grad_BTD, split.vocabulary)


def max_over_vocabulary(x: jax.Array, split: Split) -> jax.Array:
    """Returns the maximum over the devices that hold other parts of V."""
    axes = manual_axes(split.vocabulary)
    return jax.lax.pmax(x, axes) if axes else x


def own_tokens(size: int, split: Split) -> jax.Array:
    """Returns the numbers of the `size` tokens that this device's part of V stands for."""
    tokens = jnp.arange(size, dtype=jnp.int32)
    axes = manual_axes(split.vocabulary)
    return tokens + jax.lax.axis_index(axes) * size if axes else tokens


def num_tokens(size: int, split: Split) -> int:
    """Returns the size of the whole vocabulary, of which this device has `size` tokens."""
    for axis in split.vocabulary:
        size *= axis_size(axis)
    return size
