"""Computes attention by blocks of queries and blocks of keys, in plain JAX on any platform.

The softmax is taken online (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm
1): a block of scores lives for one step of a loop, and blocks that the mask rules out are never
visited, so memory is linear in T and S. The backward pass computes the probabilities again, from
the log-sum-exp.

The rows of the batch are computed one after the other, since each visits blocks of its own. The N/K
query heads that share a key/value head are stacked: a block of queries is [K, R, H], where R counts
the positions of the first head, then those of the next.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention.inputs import Gradients, Inputs, Options
from moe.kernels.attention.masks import BlockRange, key_blocks, make_mask


class Keys(NamedTuple):
    """The keys of one row of the batch in blocks, and what else its scores need."""

    blocks: jax.Array  # [S / kv_block, K, kv_block, H]
    q_ids: jax.Array | None  # [T / q_block, q_block]
    kv_ids: jax.Array | None  # [S / kv_block, kv_block]
    shift: jax.Array | int
    q_block: int
    kv_length: int  # without the padding of the last block


def forward(
    options: Options, inputs: Inputs, *, blocks: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, N, H], and lse [B, T, N] in float32, or float64 for float64 arrays."""
    blocks = _limit_blocks(blocks, inputs)
    q, k, v, sinks_N = inputs[:4]
    visited = _visited_key_blocks(options, blocks, inputs)

    def attend(row: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q_TNH, k_SKH, v_SKH, q_ids, kv_ids, visited = row
        row_inputs = Inputs(q_TNH, k_SKH, v_SKH, sinks_N, q_ids, kv_ids, inputs.shift)
        return _forward_row(options, blocks, row_inputs, visited)

    return jax.lax.map(attend, (q, k, v, *inputs.segment_ids, visited))


def backward(
    options: Options,
    inputs: Inputs,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
    *,
    blocks: tuple[int, int],
) -> Gradients:
    """Returns the gradients of q, k and v."""
    blocks = _limit_blocks(blocks, inputs)
    q, k, v = inputs[:3]
    visited = _visited_key_blocks(options, blocks, inputs)

    def differentiate(row: tuple[Any, ...]) -> Gradients:
        q_TNH, k_SKH, v_SKH, q_ids, kv_ids, visited, *rows = row
        row_inputs = Inputs(q_TNH, k_SKH, v_SKH, None, q_ids, kv_ids, inputs.shift)
        return _backward_row(options, blocks, row_inputs, visited, *rows)

    arrays = (q, k, v, *inputs.segment_ids, visited, lse_BTN, dout_BTNH, delta_BTN)
    return jax.lax.map(differentiate, arrays)


def _limit_blocks(blocks: tuple[int, int], inputs: Inputs) -> tuple[int, int]:
    """Returns the sizes of blocks, limited to the number of queries and of keys."""
    q_block, kv_block = (min(pair) for pair in zip(blocks, inputs.lengths, strict=True))
    return q_block, kv_block


def _visited_key_blocks(options: Options, blocks: tuple[int, int], inputs: Inputs) -> BlockRange:
    """Returns `key_blocks` with a range for each row of the batch."""
    visited = key_blocks(options, inputs.shift, inputs.lengths, blocks, *inputs.segment_ids)
    batch = inputs.q_BTNH.shape[0]
    return BlockRange(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in visited))


def _split_row(blocks: tuple[int, int], inputs: Inputs) -> tuple[Keys, jax.Array]:
    """Cuts one row into blocks; returns its `Keys`, and its values, which are cut like the keys."""
    q_block, kv_block = blocks
    _, k, v, _, q_ids, kv_ids, shift = inputs
    keys, values = _split_keys(k, kv_block), _split_keys(v, kv_block)
    q_ids = None if q_ids is None else _split(q_ids, q_block)
    kv_ids = None if kv_ids is None else _split(kv_ids, kv_block)
    return Keys(keys, q_ids, kv_ids, shift, q_block, len(k)), values


def _forward_row(
    options: Options, blocks: tuple[int, int], inputs: Inputs, visited: BlockRange
) -> tuple[jax.Array, jax.Array]:
    """Returns output [T, N, H] and lse [T, N] of one row of the batch."""
    q, k, v, sinks_N = inputs[:4]
    q_block = blocks[0]
    keys, values = _split_row(blocks, inputs)
    dtype = sum_dtype(q)
    sinks = jnp.full(q.shape[1], -jnp.inf, dtype) if sinks_N is None else sinks_N.astype(dtype)
    sinks_KR = jnp.repeat(sinks, q_block).reshape(k.shape[1], -1)

    def attend(block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, queries, first, end = block
        # A sink is a logit like that of a key, but without a value: the online softmax starts with
        # m = the sink's logit and l = exp(0) = 1. Without a sink it starts with m = -inf and l = 0.
        output = jnp.zeros((*queries.shape[:-1], v.shape[-1]), dtype)
        state = output, sinks_KR, jnp.isfinite(sinks_KR).astype(dtype)
        visit = functools.partial(_visit_forward, options, keys, values, i, queries)
        output, running_max, denominator = jax.lax.fori_loop(first, end, visit, state)
        # O = O / l and lse = m + log(l). A query that sees nothing has l = 0.
        safe_denominator = jnp.where(denominator > 0, denominator, 1.0)
        output = (output / safe_denominator[..., None]).astype(options.result_dtype(q.dtype))
        lse = jnp.where(denominator > 0, running_max + jnp.log(safe_denominator), -jnp.inf)
        return output, lse

    queries = _split_queries(q, k.shape[1], q_block)
    output, lse = jax.lax.map(attend, (jnp.arange(len(queries)), queries, *visited))
    output = _join_queries(output, len(q), q.shape[1])
    return output, _join_queries(lse[..., None], len(q), q.shape[1])[..., 0]


def _visit_forward(
    options: Options,
    keys: Keys,
    values: jax.Array,
    i: jax.Array,
    queries: jax.Array,
    j: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds block j of keys to the online softmax of block i of queries."""
    output, running_max, denominator = state
    logits, _ = _scores(options, keys, i, j, queries)
    new_max = jnp.maximum(running_max, jnp.max(logits, axis=-1))
    # m_new = max(m, rowmax(S)). Where nothing is visible yet it is minus infinity, and with 0 in
    # its place all weights are exp(-inf) = 0 instead of NaN.
    base = jnp.where(jnp.isfinite(new_max), new_max, 0.0)
    # P = exp(S - m_new); O and l, summed relative to m, are rescaled by exp(m - m_new).
    weights, rescale = jnp.exp(logits - base[..., None]), jnp.exp(running_max - base)
    product = matmul("krs,ksh->krh", weights.astype(values.dtype), values[j])
    output = output * rescale[..., None] + product
    return output, new_max, denominator * rescale + jnp.sum(weights, axis=-1)


def _backward_row(
    options: Options,
    blocks: tuple[int, int],
    inputs: Inputs,
    visited: BlockRange,
    lse: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
) -> Gradients:
    """Returns the gradients of one row of the batch."""
    q, k, v = inputs[:3]
    keys, values = _split_row(blocks, inputs)

    def differentiate(
        dkv: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        i, first, end, queries, dout, lse, delta = block
        # A query that sees nothing has an lse of minus infinity, and so are its logits. With any
        # finite number in place of this lse, its probabilities become 0.
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        visit = functools.partial(
            _visit_backward, options, keys, values, i, queries, (dout, lse, delta)
        )
        dq = jnp.zeros(queries.shape, sum_dtype(q))
        dq, dk, dv = jax.lax.fori_loop(first, end, visit, Gradients(dq, *dkv))
        return (dk, dv), dq.astype(options.result_dtype(q.dtype))

    rows = [
        _split_queries(x, k.shape[1], blocks[0])
        for x in (q, dout, lse[..., None], delta[..., None])
    ]
    # dk and dv are summed as [K, H, S], transposed: see `_visit_backward`.
    dk, dv = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, sum_dtype(q)) for x in (keys.blocks, values))
    steps = (jnp.arange(len(visited.first)), *visited, *rows)
    (dk, dv), dq = jax.lax.scan(differentiate, (dk, dv), steps)
    dtype = options.result_dtype(q.dtype)
    dq = _join_queries(dq, len(q), q.shape[1])
    return Gradients(dq, _join_keys(dk, k).astype(dtype), _join_keys(dv, v).astype(dtype))


def _visit_backward(
    options: Options,
    keys: Keys,
    values: jax.Array,
    i: jax.Array,
    queries: jax.Array,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    j: jax.Array,
    gradients: Gradients,
) -> Gradients:
    """Adds what block i of queries and block j of keys contribute to the gradients.

    `rows` are dout, lse and delta of the queries.
    """
    (dout, lse, delta), (dq, dk, dv) = rows, gradients
    logits, slopes = _scores(options, keys, i, j, queries)
    # P = exp(S - lse), dP = dO Vᵀ, dS = P * (dP - delta).
    probs = jnp.exp(logits - lse)
    dprobs = matmul("krh,ksh->krs", dout, values[j])
    dscores = (probs * (dprobs - delta) * (options.scale * slopes)).astype(queries.dtype)
    # dk and dv are summed as [K, H, S]: then dS and P, the largest operands, are multiplied without
    # being transposed.
    return Gradients(
        dq + matmul("krs,ksh->krh", dscores, keys.blocks[j]),
        dk.at[j].add(matmul("krh,krs->khs", queries, dscores)),
        dv.at[j].add(matmul("krh,krs->khs", dout, probs.astype(values.dtype))),
    )


def _scores(
    options: Options, keys: Keys, i: jax.Array, j: jax.Array, queries: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """Returns logits [K, R, S] of block i of queries and j of keys, and softcap's slopes at them.

    Logits are minus infinity where a key is masked. The slope is the derivative of a logit by its
    score.
    """
    logits, slopes = matmul("krh,ksh->krs", queries, keys.blocks[j]) * options.scale, 1.0
    if options.softcap is not None:
        capped = jnp.tanh(logits / options.softcap)
        logits, slopes = options.softcap * capped, 1 - capped * capped
    q_block, kv_block = keys.q_block, keys.blocks.shape[2]
    k_positions = j * kv_block + jnp.arange(kv_block)
    q_ids = None if keys.q_ids is None else keys.q_ids[i]
    kv_ids = None if keys.kv_ids is None else keys.kv_ids[j]
    q_positions = keys.shift + i * q_block + jnp.arange(q_block)
    mask = make_mask(options, q_positions, k_positions, q_ids, kv_ids)
    if keys.kv_length % kv_block:
        in_row = k_positions < keys.kv_length
        mask = in_row if mask is None else mask & in_row
    if mask is None:
        return logits, slopes
    # All heads that share the keys have the same mask.
    heads = queries.shape[1] // q_block
    mask = jnp.broadcast_to(mask, (heads, q_block, kv_block)).reshape(-1, kv_block)
    return jnp.where(mask, logits, -jnp.inf), slopes


def _split(x: jax.Array, block: int) -> jax.Array:
    """Cuts [T, ...] into [T / block, block, ...], with zeros after the end of the last block."""
    padded = jnp.pad(x, ((0, -len(x) % block),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, block, *x.shape[1:])


def _split_keys(x: jax.Array, block: int) -> jax.Array:
    """Cuts [S, K, H] into [S / block, K, block, H]."""
    return jnp.swapaxes(_split(x, block), 1, 2)


def _join_keys(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Turns [S / block, K, H, block] into [S, K, H], the shape of `like`."""
    return jnp.moveaxis(blocks, 3, 1).reshape(-1, *like.shape[1:])[: len(like)]


def _split_queries(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """Cuts [T, N, H] into [T / block, K, R, H]."""
    blocks = _split(x, block)
    groups = blocks.reshape(*blocks.shape[:2], kv_heads, -1, x.shape[-1])
    return jnp.moveaxis(groups, 1, 3).reshape(len(blocks), kv_heads, -1, x.shape[-1])


def _join_queries(rows: jax.Array, length: int, heads: int) -> jax.Array:
    """Turns [T / block, K, R, H] back into [T, N, H]."""
    blocks, kv_heads, _, width = rows.shape
    groups = rows.reshape(blocks, kv_heads, heads // kv_heads, -1, width)
    return jnp.moveaxis(groups, 3, 1).reshape(-1, heads, width)[:length]


def matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies with sums in float32, or float64 for float64 arrays."""
    return jnp.einsum(equation, x, y, preferred_element_type=sum_dtype(x))


def sum_dtype(x: jax.Array) -> np.dtype:
    return np.promote_types(x.dtype, np.float32)
