"""Causal attention a block of queries at a time, on any platform.

Block i of the queries meets the keys up to its own end, so the blocks above the diagonal are never computed. What is kept for the backward
pass is linear in T, the output and the log-sum-exp of each row: the probabilities are made again (Dao et al. 2022, section 3.1, B.2).
"""

import jax
import jax.numpy as jnp

BLOCK = 256  # queries; their scores against a few thousand keys stay in a CPU's cache

Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query, in its own segment: [B, T, N, H] in the queries' dtype.

    N is a multiple of K: query head n reads key/value head n // (N / K). Scores, softmax and sums are float32.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, Residuals]:
    q, k, v = _group_queries(q_BTNH, k_BTKH), jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    outputs, lses = [], []
    for start, end in _blocks(q.shape[3]):
        scores = _masked_scores(q, k, segment_ids_BT, start, end)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outputs.append(_matmul("bkgts,bksh->bkgth", weights.astype(v.dtype), v[:, :, :end]) / total)
        lses.append(highest + jnp.log(total))
    output = jnp.concatenate(outputs, axis=3).astype(q.dtype)
    lse = jnp.concatenate(lses, axis=3)
    return _ungroup(output), (q, k, v, segment_ids_BT, output, lse)


def _backward(residuals: Residuals, gradient_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment_ids_BT, output, lse = residuals
    gradient = _group_queries(gradient_BTNH, jnp.moveaxis(k, 2, 1))
    # Each row's sum of probability times its gradient, from the output alone (appendix B.2, equation 4).
    row_sums = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    dq = []
    # Summed as [B, K, H, S]: the scores' gradients, the largest operands, are then multiplied without being transposed.
    dk, dv = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (k, v))
    for start, end in _blocks(q.shape[3]):
        block = (slice(None),) * 3 + (slice(start, end),)
        probs = jnp.exp(_masked_scores(q, k, segment_ids_BT, start, end) - lse[block])
        dprobs = _matmul("bkgth,bksh->bkgts", gradient[block], v[:, :, :end])
        dscores = (probs * (dprobs - row_sums[block]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq.append(_matmul("bkgts,bksh->bkgth", dscores, k[:, :, :end]))
        dk = dk.at[..., :end].add(_matmul("bkgth,bkgts->bkhs", q[block], dscores))
        dv = dv.at[..., :end].add(_matmul("bkgth,bkgts->bkhs", gradient[block], probs.astype(v.dtype)))
    dq = _ungroup(jnp.concatenate(dq, axis=3)).astype(q.dtype)
    return dq, jnp.moveaxis(dk, 3, 1).astype(k.dtype), jnp.moveaxis(dv, 3, 1).astype(v.dtype), None


causal_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _masked_scores(q: jax.Array, k: jax.Array, segment_ids_BT: jax.Array, start: int, end: int) -> jax.Array:
    """Scaled scores [B, K, N/K, end - start, end] of one block of queries, float32; the lowest float where a key is not to be seen."""
    scores = _matmul("bkgth,bksh->bkgts", q[:, :, :, start:end], k[:, :, :end]) * q.shape[-1] ** -0.5
    same_segment = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
    not_later = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    return jnp.where((same_segment & not_later)[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _group_queries(x_BTNH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
    """[B, T, N, H] to [B, K, N/K, T, H]."""
    batch, length, heads, width = x_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    return jnp.moveaxis(x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width), 1, 3)


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, K, N/K, T, H] to [B, T, N, H]."""
    batch, kv_heads, group, length, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, length, kv_heads * group, width)
