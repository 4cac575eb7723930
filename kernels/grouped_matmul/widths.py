"""Fits widths to the tiles of kernels, and gathers rows: what Hopper GPUs and TPUs share."""

import jax
import jax.numpy as jnp

from moe.kernels.grouped_matmul.inputs import Inputs


def pad_widths(inputs: Inputs, multiple: int) -> Inputs:
    """Returns the inputs with zeros after D and F up to a multiple, the weights in x's dtype.

    A weight that needs zeros is copied.
    """
    dtype = inputs.x_ND.dtype
    return inputs._replace(
        x_ND=pad(inputs.x_ND, 1, multiple=multiple),
        w_gate_EDF=pad(inputs.w_gate_EDF.astype(dtype), 1, 2, multiple=multiple),
        w_up_EDF=pad(inputs.w_up_EDF.astype(dtype), 1, 2, multiple=multiple),
        w_down_EFD=pad(inputs.w_down_EFD.astype(dtype), 1, 2, multiple=multiple),
    )


def pad(x: jax.Array, *dims: int, multiple: int) -> jax.Array:
    """Adds zeros after the end of dimensions, up to a multiple. A copy, unless nothing is added."""
    more = [(0, -size % multiple if dim in dims else 0) for dim, size in enumerate(x.shape)]
    return jnp.pad(x, more) if any(after for _, after in more) else x


def change_halves(gate_up: jax.Array, width: int) -> jax.Array:
    """Returns gate and up, side by side, with `width` columns each: cut off, or padded by zeros."""
    old_width = gate_up.shape[1] // 2
    if old_width == width:
        return gate_up
    halves = (x[:, :width] for x in jnp.split(gate_up, 2, axis=1))
    more = [(0, 0), (0, max(0, width - old_width))]
    return jnp.concatenate([jnp.pad(half, more) for half in halves], axis=1)


def gather_rows(x_ND: jax.Array, tokens_I: jax.Array) -> jax.Array:
    """Returns the tokens of all rows, and any token for a row that only fills up its block."""
    return x_ND.at[tokens_I].get(mode="clip")
