"""Computes attention by its equations, with all scores at once, in float32 or float64.

The other implementations are tested against this one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention.inputs import Gradients, Inputs, Options
from moe.kernels.attention.masks import make_mask


def forward(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, N, H] and lse [B, T, N], differentiable in q, k, v and sinks."""
    q_BTNH = inputs.q_BTNH
    q, k, v = _group_heads(inputs)
    logits = _logits(options, inputs, q, k)
    no_sinks = jnp.full(q_BTNH.shape[2], -jnp.inf, q.dtype)
    sinks_N = no_sinks if inputs.sinks_N is None else inputs.sinks_N.astype(q.dtype)
    # A sink is one more logit of each query, whose weight is not multiplied by a value.
    sinks = jnp.broadcast_to(sinks_N.reshape(q.shape[2], -1, 1), (*logits.shape[:-1], 1))
    logits = jnp.concatenate([logits, sinks], axis=-1)
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    maximum = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
    # Two selections, so that no gradient passes through a logit of minus infinity.
    finite_logits = jnp.where(jnp.isfinite(logits), logits, 0.0)
    weights = jnp.where(jnp.isfinite(logits), jnp.exp(finite_logits - maximum), 0.0)
    denominator = jnp.sum(weights, axis=-1, keepdims=True)
    safe_denominator = jnp.where(denominator > 0, denominator, 1.0)
    output = _einsum("btkgs,bskh->btkgh", (weights / safe_denominator)[..., :-1], v)
    lse = jnp.where(denominator > 0, maximum + jnp.log(safe_denominator), -jnp.inf)
    output = output.reshape(*q_BTNH.shape[:3], -1).astype(options.result_dtype(q_BTNH.dtype))
    return output, lse.reshape(q_BTNH.shape[:3])


def backward(
    options: Options,
    inputs: Inputs,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
) -> Gradients:
    """Returns the gradients of q, k and v, by Dao et al. 2022, appendix B.2."""
    q, k, v = _group_heads(inputs)
    group = lambda x: x.astype(q.dtype).reshape(*q.shape[:4], -1)
    dout, lse, delta = (group(x) for x in (dout_BTNH, lse_BTN, delta_BTN))
    logits, logits_vjp = jax.vjp(lambda q, k: _logits(options, inputs, q, k), q, k)
    # P = exp(S - lse), dP = dO Vᵀ, dS = P * (dP - delta), dV = Pᵀ dO.
    probs = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0))
    dprobs = _einsum("btkgh,bskh->btkgs", dout, v)
    dq, dk = logits_vjp(probs * (dprobs - delta))
    dv = _einsum("btkgs,btkgh->bskh", probs, dout)
    like = lambda gradient, x: gradient.reshape(x.shape).astype(options.result_dtype(x.dtype))
    return Gradients(like(dq, inputs.q_BTNH), like(dk, inputs.k_BSKH), like(dv, inputs.v_BSKH))


def _group_heads(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q [B, T, K, N/K, H], k and v [B, S, K, H], in float32 or float64."""
    q, k, v = inputs[:3]
    dtype = np.promote_types(q.dtype, np.float32)
    groups = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    return q.astype(dtype).reshape(groups), k.astype(dtype), v.astype(dtype)


def _logits(options: Options, inputs: Inputs, q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns logits [B, T, K, N/K, S], minus infinity where a key is masked."""
    logits = _einsum("btkgh,bskh->btkgs", q, k) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    q_positions, k_positions = jnp.arange(q.shape[1]) + inputs.shift, jnp.arange(k.shape[1])
    mask = make_mask(options, q_positions, k_positions, *inputs.segment_ids)
    if mask is None:
        return logits
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
    return jnp.where(mask[:, :, None, None], logits, -jnp.inf)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision="highest")
