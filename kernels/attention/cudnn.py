"""Calls cuDNN's attention, through jax.nn, on NVIDIA GPUs.

`table.py` says what cuDNN cannot do. cuDNN has a backward pass of its own.
"""

import jax

from moe.kernels.attention.inputs import Inputs, Options


def forward(options: Options, inputs: Inputs) -> tuple[jax.Array, None]:
    """Returns the output [B, T, N, H] of causal attention, and None for the log-sum-exp.

    JAX can differentiate it. Programs that hold it compile for NVIDIA GPUs alone.
    """
    output = jax.nn.dot_product_attention(
        inputs.q_BTNH,
        inputs.k_BSKH,
        inputs.v_BSKH,
        scale=options.scale,
        is_causal=True,
        local_window_size=None if options.left is None else (options.left, 0),
        implementation="cudnn",
    )
    return output, None
