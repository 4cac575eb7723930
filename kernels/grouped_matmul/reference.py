"""Computes the experts' SwiGLU by its equations, with JAX's gradients.

The other implementations are tested against this one. It multiplies every row by every expert.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs


def forward(inputs: Inputs) -> Outputs:
    """Returns each row's output and its gate and up projections, in the dtype of the tokens."""
    x_ID, w_gate, w_up, w_down = _in_full_precision(inputs)
    experts_IE = _one_hot_experts(inputs, x_ID.dtype)
    gate_IF = _project(x_ID, w_gate, experts_IE)
    up_IF = _project(x_ID, w_up, experts_IE)
    rows_ID = _project(jax.nn.silu(gate_IF) * up_IF, w_down, experts_IE)
    gate_up = jnp.concatenate([gate_IF, up_IF], axis=1)
    return Outputs(rows_ID.astype(inputs.x_ND.dtype), gate_up.astype(inputs.x_ND.dtype))


def backward(
    inputs: Inputs, gate_up: jax.Array, weights_I: jax.Array, grad_y_ND: jax.Array
) -> Gradients:
    """Returns the gradients by automatic differentiation, so `gate_up` is computed once more."""
    x_ID, w_gate, w_up, w_down = _in_full_precision(inputs)
    experts_IE = _one_hot_experts(inputs, x_ID.dtype)

    def weighted_rows(
        x_ID: jax.Array,
        w_gate: jax.Array,
        w_up: jax.Array,
        w_down: jax.Array,
        weights_I: jax.Array,
    ) -> jax.Array:
        gate_IF, up_IF = (_project(x_ID, w, experts_IE) for w in (w_gate, w_up))
        rows_ID = _project(jax.nn.silu(gate_IF) * up_IF, w_down, experts_IE)
        return rows_ID * weights_I[:, None]

    weights_I = weights_I.astype(x_ID.dtype)
    _, pull_back = jax.vjp(weighted_rows, x_ID, w_gate, w_up, w_down, weights_I)
    gradients = Gradients(*pull_back(_gather_rows(grad_y_ND, inputs).astype(x_ID.dtype)))
    return gradients._replace(rows_ID=gradients.rows_ID.astype(inputs.x_ND.dtype))


def _in_full_precision(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the rows' tokens [I, D] and the three weights, in float32 or float64."""
    dtype = np.promote_types(inputs.x_ND.dtype, np.float32)
    return (
        _gather_rows(inputs.x_ND, inputs).astype(dtype),
        inputs.w_gate_EDF.astype(dtype),
        inputs.w_up_EDF.astype(dtype),
        inputs.w_down_EFD.astype(dtype),
    )


def _gather_rows(x_ND: jax.Array, inputs: Inputs) -> jax.Array:
    """Returns each row's token, [I, D], and zeros for a row without one."""
    return x_ND.at[inputs.tokens_I].get(mode="fill", fill_value=0)


def _one_hot_experts(inputs: Inputs, dtype: np.dtype) -> jax.Array:
    """Returns [I, E]: a 1 at each row's expert, or only zeros if its block has no expert."""
    experts_I = jnp.repeat(inputs.experts_G, inputs.block_rows)
    return jax.nn.one_hot(experts_I, inputs.num_experts, dtype=dtype)


def _project(x_IK: jax.Array, w_EKO: jax.Array, experts_IE: jax.Array) -> jax.Array:
    """Returns each row times the weight of its expert, [I, O]; 0 for a row without an expert."""
    return jnp.einsum("ik,eko,ie->io", x_IK, w_EKO, experts_IE, precision="highest")
