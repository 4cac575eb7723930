"""Sums the gradients of a weight that several parts of a model use, before devices exchange them.

A tied table makes embeddings at one end of a model, and logits at the other. Autodiff adds the two
gradients up, but only after each was summed over the devices, which sends them twice. JAX has no
array on Auto axes whose parts are still to be summed over the devices. So a shared weight has a
companion of zeros [P, ...], of which each device holds one part. The zeros are never read. They
exist for their gradient:

    gradients of a device's own tokens -> its part of the companion's gradient, added up over uses
    gradient of the companion          -> summed over the devices once: gradient of the weight
"""

import functools
import math

import jax
import jax.numpy as jnp

from moe.parallel.collectives.weights import sum_gradient
from moe.parallel.mesh import axis_size, constrain, num_parts, per_shard, splitting_axes


def share(w: jax.Array, dims: str) -> jax.Array | None:
    """Returns the companion of a weight, whose gradient becomes that of the weight.

    It is None where no Auto axis splits tokens, so that there is nothing to sum over devices.
    """
    return _companion(w, dims) if num_parts("P") > 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _companion(w: jax.Array, dims: str) -> jax.Array:
    """Returns zeros [P, ...], in float32 or the weight's dtype if that is wider."""
    zeros = jnp.zeros((num_parts("P"), *w.shape), jnp.promote_types(w.dtype, jnp.float32))
    return constrain(zeros, f"P{dims}")


def _companion_forward(w: jax.Array, dims: str) -> tuple[jax.Array, jax.Array]:
    return _companion(w, dims), jnp.zeros((0,), w.dtype)


def _companion_backward(dims: str, like_w: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Sums the parts of all devices, and splits the sum as the weight is."""
    width_axes = splitting_axes(dims, gradient.shape[1:])[dims.index("D")]
    axes = part_axes()

    def sum_parts(parts: jax.Array) -> tuple[jax.Array]:
        return (sum_gradient(parts[0], dims.index("D"), width_axes, axes),)

    (total,) = per_shard(sum_parts, (f"P{dims}",), (dims,), gradient)
    return (total.astype(like_w.dtype),)


_companion.defvjp(_companion_forward, _companion_backward)


def part_axes() -> tuple[str, ...]:
    """Returns the Auto axes along which devices have parts of their own."""
    return splitting_axes("P", (num_parts("P"),))[0]


def as_part(gradient: jax.Array, axes: tuple[str, ...], token_axes: tuple[str, ...]) -> jax.Array:
    """Returns a device's gradient as its part [1, ...] of the companion's, inside of `per_shard`.

    `axes` are the `part_axes` outside of it. `token_axes` split the tokens of the gradient. Along
    other axes devices have equal gradients, which are divided by the number of these devices.
    """
    copies = math.prod(axis_size(axis) for axis in axes if axis not in token_axes)
    # In the trace on whole arrays, which finds the shape of the result, all parts are here.
    return jnp.broadcast_to(gradient / copies, (num_parts("P"), *gradient.shape))
