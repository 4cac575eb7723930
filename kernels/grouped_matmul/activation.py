"""Computes the experts' activation and its gradient: what the implementations share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype of sums: float32 whatever the activations are, or float64 for float64."""
    return np.promote_types(dtype, np.float32)


def swiglu(gate_up: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns silu(gate) * up, and the function from its gradient to the gradient of `gate_up`."""
    hidden, backward = swiglu_of_pair(*jnp.split(gate_up, 2, axis=1))
    return hidden, lambda grad_hidden: jnp.concatenate(backward(grad_hidden), axis=1)


def swiglu_of_pair(
    gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, jax.Array]]]:
    """Returns silu(gate) * up, and the function from its gradient to those of gate and up."""
    gate, up = (x.astype(sum_dtype(x.dtype)) for x in (gate, up))
    sigmoid = jax.nn.sigmoid(gate)

    def backward(grad_hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        # silu(z) = z sigmoid(z), so silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z))).
        grad_gate = grad_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = grad_hidden * gate * sigmoid
        return grad_gate, grad_up

    return gate * sigmoid * up, backward
