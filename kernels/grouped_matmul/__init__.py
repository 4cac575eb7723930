"""Provides the experts' SwiGLU on rows that are grouped by expert, as functions of arrays.

    choice = choose(chip, Shapes(num_assignments, num_experts, dtype))
    inputs = Inputs(x, w_gate, w_up, w_down, tokens, experts)  # rows in blocks of choice.block_rows
    outputs = grouped_swiglu(inputs, choice.name)

`moe.model.dispatch.dropless` arranges the rows, and adds up what they give.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.grouped_matmul.choice import (
    IMPLEMENTATIONS,
    Choice,
    Name,
    Shapes,
    choose,
    why_not,
    with_blocks,
)
from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs
from moe.kernels.settings import own_settings

__all__ = [
    "Choice",
    "Gradients",
    "Inputs",
    "Name",
    "Outputs",
    "Shapes",
    "choose",
    "grouped_swiglu",
    "grouped_swiglu_backward",
    "why_not",
    "with_blocks",
]


def grouped_swiglu(inputs: Inputs, implementation: Name = "blockwise") -> Outputs:
    """Returns `(silu(x w_gate) * (x w_up)) w_down` for each row, and what the backward pass needs.

    x is the row's token, and the weights are those of its block's expert. Results are in the dtype
    of `x_ND`, and sums are taken in float32 (float64 for float64). A block without an expert gives
    zeros. A row that only fills up its block gives any numbers, so the caller gives it weight 0.
    """
    with own_settings(inputs.x_ND.dtype):
        return IMPLEMENTATIONS[implementation].forward(_check(inputs))


def grouped_swiglu_backward(
    inputs: Inputs,
    gate_up: jax.Array,
    weights_I: jax.Array,
    grad_y_ND: jax.Array,
    implementation: Name = "blockwise",
) -> Gradients:
    """Returns the gradients of the inputs and of `weights_I`, given the gradient of y.

    y [N, D] is each token's sum of its rows' outputs times `weights_I`, and `grad_y_ND` its
    gradient. `gate_up` comes from the forward pass. The rows' gradient is in the dtype of `x_ND`,
    all others are in float32 (float64 for float64). If a row only fills up its block, the gradient
    of its weight may be any number.
    """
    with own_settings(inputs.x_ND.dtype):
        weights_I = jnp.asarray(weights_I).astype(np.promote_types(inputs.x_ND.dtype, np.float32))
        backward = IMPLEMENTATIONS[implementation].backward
        return backward(_check(inputs), gate_up, weights_I, grad_y_ND)


def _check(inputs: Inputs) -> Inputs:
    """Returns the inputs with 32-bit indices. Raises ValueError unless the rows fill the blocks."""
    tokens_I, experts_G = (
        jnp.asarray(x).astype(jnp.int32) for x in (inputs.tokens_I, inputs.experts_G)
    )
    if tokens_I.size % experts_G.size:
        raise ValueError(
            f"{tokens_I.size} rows are not a multiple of {experts_G.size} blocks: pad the rows"
        )
    return inputs._replace(tokens_I=tokens_I, experts_G=experts_G)
