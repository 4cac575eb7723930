"""Attention as its equations say it, all scores at once: the oracle of the other implementations,
in float32 or float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention.masks import Options, visible


def forward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in the dtype of the queries or of a part, and lse [B, T, N];
    differentiable in q, k, v and sinks.
    """
    q, k, v = _grouped(q_BTNH, k_BSKH, v_BSKH)
    logits = _logits(options, q, k, q_ids_BT, kv_ids_BS, shift)
    sinks = (
        jnp.full(q_BTNH.shape[2], -jnp.inf, q.dtype) if sinks_N is None else sinks_N.astype(q.dtype)
    )
    sinks = jnp.broadcast_to(sinks.reshape(q.shape[2], -1, 1), (*logits.shape[:-1], 1))
    logits = jnp.concatenate([logits, sinks], axis=-1)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    # Where twice, so that no gradient passes through what is minus infinity.
    weights = jnp.where(
        jnp.isfinite(logits), jnp.exp(jnp.where(jnp.isfinite(logits), logits, 0.0) - highest), 0.0
    )
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    output = _einsum("btkgs,bskh->btkgh", (weights / some)[..., :-1], v)
    lse = jnp.where(total > 0, highest + jnp.log(some), -jnp.inf)
    return output.reshape(*q_BTNH.shape[:3], -1).astype(
        options.result_dtype(q_BTNH.dtype)
    ), lse.reshape(q_BTNH.shape[:3])


def backward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
    lse_BTN: jax.Array,
    g_BTNH: jax.Array,
    row_sums_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, by Dao et al. 2022, appendix B.2. `row_sums_BTN`: see
    `attention_backward`.
    """
    arrays = (q_BTNH, k_BSKH, v_BSKH)
    q, k, v = _grouped(*arrays)
    by_group = lambda x: x.astype(q.dtype).reshape(*q.shape[:4], -1)
    g, lse, row_sums = (by_group(x) for x in (g_BTNH, lse_BTN, row_sums_BTN))
    logits, to_q_and_k = jax.vjp(
        lambda q, k: _logits(options, q, k, q_ids_BT, kv_ids_BS, shift), q, k
    )
    probs = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0))
    gradients = (
        *to_q_and_k(probs * (_einsum("btkgh,bskh->btkgs", g, v) - row_sums)),
        _einsum("btkgs,btkgh->bskh", probs, g),
    )
    return tuple(
        gradient.reshape(x.shape).astype(options.result_dtype(x.dtype))
        for gradient, x in zip(gradients, arrays, strict=True)
    )


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """q [B, T, K, N/K, H], k and v [B, S, K, H], in float32 or float64."""
    dtype = np.promote_types(q.dtype, np.float32)
    groups = (*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    return q.astype(dtype).reshape(groups), k.astype(dtype), v.astype(dtype)


def _logits(
    options: Options, q: jax.Array, k: jax.Array, q_ids: Any, kv_ids: Any, shift: Any
) -> jax.Array:
    """[B, T, K, N/K, S], minus infinity where a key is not seen."""
    logits = _einsum("btkgh,bskh->btkgs", q, k) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    seen = visible(options, jnp.arange(q.shape[1]) + shift, jnp.arange(k.shape[1]), q_ids, kv_ids)
    if seen is None:
        return logits
    seen = jnp.broadcast_to(seen, (q.shape[0], q.shape[1], k.shape[1]))
    return jnp.where(seen[:, :, None, None], logits, -jnp.inf)


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision="highest")
