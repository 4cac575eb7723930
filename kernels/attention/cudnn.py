"""Attention by cuDNN, through jax.nn: for NVIDIA GPUs older or newer than Hopper, and what cuDNN
knows (see choice.py).
"""

import jax

from moe.kernels.attention.masks import Options


def attend(options: Options, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Causal attention, with its own gradient: [B, T, N, H]. Programs that hold it compile for
    NVIDIA GPUs alone.
    """
    window = None if options.left is None else (options.left, 0)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=options.scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )
