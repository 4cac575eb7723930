"""Computes the experts' SwiGLU on TPUs by kernels.

Rows are gathered by XLA, so that the gathered rows exist as a whole. The equations, and what is
rounded where, are those of blockwise.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from moe.kernels.grouped_matmul.inputs import Gradients, Inputs, Outputs
from moe.kernels.grouped_matmul.tpu.blocks import LANES, map_blocks
from moe.kernels.grouped_matmul.tpu.gradient import grouped_weight_gradient, plan_visits
from moe.kernels.grouped_matmul.tpu.hidden import hidden_gradients
from moe.kernels.grouped_matmul.tpu.matmul import grouped_matmul
from moe.kernels.grouped_matmul.tpu.projections import project
from moe.kernels.grouped_matmul.widths import change_halves, gather_rows, pad, pad_widths


def run_on_platform(run: Callable[..., Any], *arrays: Any) -> Any:
    """Runs a pass on TPUs, or interpreted on CPUs, as a program's platform is when it is lowered.

    A program may be lowered for a platform that is not attached, so the attached one is not asked.
    """
    interpreted = functools.partial(run, interpret=True)
    return jax.lax.platform_dependent(*arrays, tpu=run, cpu=interpreted)


def forward(inputs: Inputs, interpret: Any = False) -> Outputs:
    """Returns each row's output and its gate and up projections, in the dtype of the tokens."""
    _, dim, width = inputs.w_gate_EDF.shape
    num_rows, padded = inputs.tokens_I.size, pad_widths(inputs, LANES)
    blocks = map_blocks(inputs.experts_G, inputs.num_experts)
    x_GbD = _in_blocks(gather_rows(padded.x_ND, inputs.tokens_I), inputs)
    gate_up, hidden = project(x_GbD, padded.w_gate_EDF, padded.w_up_EDF, blocks, interpret)
    rows_GbD = grouped_matmul((hidden,), (padded.w_down_EFD,), blocks, interpret=interpret)
    return Outputs(
        rows_GbD.reshape(num_rows, -1)[:, :dim],
        change_halves(gate_up.reshape(num_rows, -1), width),
    )


def backward(
    inputs: Inputs,
    gate_up: jax.Array,
    weights_I: jax.Array,
    grad_y_ND: jax.Array,
    interpret: Any = False,
) -> Gradients:
    """Returns the gradients, those of the weights in float32."""
    dtype, (num_experts, dim, width) = inputs.x_ND.dtype, inputs.w_gate_EDF.shape
    num_rows, padded = inputs.tokens_I.size, pad_widths(inputs, LANES)
    blocks = map_blocks(inputs.experts_G, num_experts)
    padded_grad_y = pad(grad_y_ND.astype(dtype), 1, multiple=LANES)
    grad_y_GbD = _in_blocks(gather_rows(padded_grad_y, inputs.tokens_I), inputs)
    back = hidden_gradients(
        grad_y_GbD,
        padded.w_down_EFD,
        _in_blocks(change_halves(gate_up, padded.w_gate_EDF.shape[2]), inputs),
        _in_blocks(weights_I, inputs),
        blocks,
        interpret,
    )
    grad_rows = grouped_matmul(
        (back.grad_gate, back.grad_up),
        (padded.w_gate_EDF, padded.w_up_EDF),
        blocks,
        transposed=True,
        interpret=interpret,
    )
    x_GbD = _in_blocks(gather_rows(padded.x_ND, inputs.tokens_I), inputs)
    visits = plan_visits(inputs.experts_G, num_experts)
    sum_rows = functools.partial(
        grouped_weight_gradient, visits=visits, num_experts=num_experts, interpret=interpret
    )
    return Gradients(
        grad_rows.reshape(num_rows, -1)[:, :dim],
        sum_rows(x_GbD, back.grad_gate)[:, :dim, :width],
        sum_rows(x_GbD, back.grad_up)[:, :dim, :width],
        sum_rows(back.weighted, grad_y_GbD)[:, :width, :dim],
        back.grad_weights.reshape(num_rows),
    )


def _in_blocks(rows: jax.Array, inputs: Inputs) -> jax.Array:
    """Views rows as blocks, [G, b, ...]."""
    return rows.reshape(inputs.experts_G.size, inputs.block_rows, *rows.shape[1:])
