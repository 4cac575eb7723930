"""Calls cuDNN's attention, through jax.nn, on NVIDIA GPUs.

`table.py` says what cuDNN cannot do. cuDNN has a backward pass of its own.

Segments become a mask of [B, 1, T, S], which JAX turns into a bias of as many numbers. cuDNN then
computes the whole causal half, whatever the mask leaves of it. cuDNN also knows the offsets of
packed documents, but for a number of documents that is fixed when a program is compiled, and only
JAX's private functions give them to it.
"""

import jax
import jax.numpy as jnp

from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import make_mask


def forward(options: Options, inputs: Inputs) -> tuple[jax.Array, None]:
    """Returns the output [B, T, N, H] of causal attention, and None for the log-sum-exp.

    JAX can differentiate it. Programs that hold it compile for NVIDIA GPUs alone.
    """
    q_ids_BT, kv_ids_BS = inputs.segment_ids
    mask_B1TS = None
    if q_ids_BT is not None and kv_ids_BS is not None:
        mask_B1TS = (q_ids_BT[:, :, None] == kv_ids_BS[:, None])[:, None]
    output = jax.nn.dot_product_attention(
        inputs.q_BTNH,
        inputs.k_BSKH,
        inputs.v_BSKH,
        mask=mask_B1TS,
        scale=options.scale,
        is_causal=True,
        local_window_size=None if options.left is None else (options.left, 0),
        implementation="cudnn",
    )
    if mask_B1TS is not None:
        output = jnp.where(_sees_a_key(options, inputs)[..., None, None], output, 0)
    return output, None


def _sees_a_key(options: Options, inputs: Inputs) -> jax.Array:
    """Returns whether each query sees a key, [B, T].

    The bias that stands for a mask is a large number, so that a query which sees no key would get
    the mean of all values.
    """
    q_positions, k_positions = (jnp.arange(length) for length in inputs.lengths)
    mask_BTS = make_mask(options, q_positions, k_positions, *inputs.segment_ids)
    assert mask_BTS is not None  # a causal mask is a mask
    return jnp.any(mask_BTS, axis=-1)
