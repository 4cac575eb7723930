"""Computes the gradients of attention on Hopper GPUs, in two kernels.

No program adds to what another one wrote, so that sums have one order.
"""

import jax

from moe.kernels.attention.hopper import dkv, dq
from moe.kernels.attention.hopper.over_queries import (
    prepare_backward,
    prepare_over_queries,
    query_block,
    without_padding,
)
from moe.kernels.attention.inputs import Gradients, Inputs, Options


def backward(
    options: Options,
    inputs: Inputs,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
) -> Gradients:
    """Returns the gradients of q, k and v."""
    operands = prepare_backward(inputs, lse_BTN, dout_BTNH, delta_BTN)
    gradient_q = dq.compute_dq(*dq.prepare_over_keys(options, inputs, operands))
    block = query_block(options, operands)
    gradients_kv = dkv.compute_dkv(*prepare_over_queries(options, inputs, operands, block))
    return without_padding(gradient_q, *gradients_kv, inputs)
