"""Computes the experts' SwiGLU on Hopper GPUs by grouped matmuls, with XLA's steps in between.

Rows are gathered by XLA, so that the gathered rows exist as a whole. The equations, and what is
rounded where, are those of blockwise.py.
"""

import jax
import jax.numpy as jnp

from moe.kernels.grouped_matmul.activation import swiglu
from moe.kernels.grouped_matmul.hopper.gradient import grouped_weight_gradient
from moe.kernels.grouped_matmul.hopper.matmul import grouped_matmul
from moe.kernels.grouped_matmul.hopper.pipeline import TILE
from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs
from moe.kernels.grouped_matmul.widths import change_halves, gather_rows, pad, pad_widths

WIDTH = 64  # D and F are padded to multiples of this


def forward(inputs: Inputs) -> Outputs:
    """Returns each row's output and its gate and up projections, in the dtype of the tokens."""
    dtype, (_, dim, width) = inputs.x_ND.dtype, inputs.w_gate_EDF.shape
    inputs, experts_G = _prepare(inputs)
    x_ID = gather_rows(inputs.x_ND, inputs.tokens_I)
    gate_up = grouped_matmul(x_ID, (inputs.w_gate_EDF, inputs.w_up_EDF), experts_G)
    hidden = swiglu(gate_up)[0].astype(dtype)
    rows_ID = grouped_matmul(hidden, (inputs.w_down_EFD,), experts_G)
    return Outputs(rows_ID[:, :dim], change_halves(gate_up, width))


def backward(
    inputs: Inputs, gate_up: jax.Array, weights_I: jax.Array, grad_y_ND: jax.Array
) -> Gradients:
    """Returns the gradients, those of the weights in float32."""
    dtype, (num_experts, dim, width) = inputs.x_ND.dtype, inputs.w_gate_EDF.shape
    inputs, experts_G = _prepare(inputs)
    padded_width = inputs.w_gate_EDF.shape[2]
    x_ID = gather_rows(inputs.x_ND, inputs.tokens_I)
    grad_y_ID = gather_rows(pad(grad_y_ND.astype(dtype), 1, multiple=WIDTH), inputs.tokens_I)
    hidden, swiglu_backward = swiglu(change_halves(gate_up, padded_width))
    weights_I1 = weights_I[:, None]

    # y = weight * (hidden w_down). The gradient of `hidden` before the weight is applied also gives
    # the weight's own gradient: grad_y (hidden w_down) = (grad_y w_downᵀ) hidden.
    grad_unweighted = grouped_matmul(
        grad_y_ID, (inputs.w_down_EFD,), experts_G, transposed=True, dtype=jnp.float32
    )
    grad_weights_I = jnp.sum(grad_unweighted * hidden, axis=1)
    weighted = (hidden * weights_I1).astype(dtype)
    grad_w_down = grouped_weight_gradient(weighted, grad_y_ID, experts_G, num_experts)

    # Back through the activation, to the two projections, which lie side by side.
    grad_gate_up = swiglu_backward(grad_unweighted * weights_I1).astype(dtype)
    projections = (inputs.w_gate_EDF, inputs.w_up_EDF)
    grad_x_ID = grouped_matmul(grad_gate_up, projections, experts_G, transposed=True)
    grad_w_gate, grad_w_up = (
        grouped_weight_gradient(
            x_ID, grad_gate_up, experts_G, num_experts, columns=(first, padded_width)
        )
        for first in (0, padded_width)
    )
    return Gradients(
        grad_x_ID[:, :dim],
        grad_w_gate[:, :dim, :width],
        grad_w_up[:, :dim, :width],
        grad_w_down[:, :width, :dim],
        grad_weights_I,
    )


def _prepare(inputs: Inputs) -> tuple[Inputs, jax.Array]:
    """Returns the inputs with widths padded to multiples of 64, and the expert of each 128 rows."""
    if inputs.block_rows % TILE:
        raise ValueError(
            f"{inputs.block_rows} rows in a block are not a multiple of {TILE}, which 'hopper' "
            "multiplies at once: take blocks of choice.block_rows rows"
        )
    padded = pad_widths(inputs, WIDTH)
    return padded, jnp.repeat(inputs.experts_G, inputs.block_rows // TILE)
