"""Attention a block of queries and a block of keys at a time, on any platform, in memory linear in
T and S.

The softmax is taken online (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1): a block of
scores lives for one step of a loop, and blocks that the mask rules out are never reached. Kept for
the backward pass are output and log-sum-exp, which make the probabilities again.

Inside, the batch's rows are taken one after the other, since each meets blocks of its own. A block
of queries has a row R for each of its positions in each of the N/K heads that share a key: [K, R,
H].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention.masks import Options, key_blocks, visible


def forward(
    options: Options,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    q_ids_BT: jax.Array | None,
    kv_ids_BS: jax.Array | None,
    shift: jax.Array | int,
    *,
    blocks: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] in the dtype of the queries or of a part, and lse [B, T, N] in float32,
    or in float64 for float64 queries.
    """
    blocks = _at_most(blocks, q_BTNH, k_BSKH)
    arrays = (
        q_BTNH,
        k_BSKH,
        v_BSKH,
        q_ids_BT,
        kv_ids_BS,
        *_ranges(options, blocks, q_BTNH, k_BSKH, q_ids_BT, kv_ids_BS, shift),
    )
    return jax.lax.map(lambda row: _forward_row(options, blocks, sinks_N, shift, *row), arrays)


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
    *,
    blocks: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v. `row_sums_BTN` is each query's sum of output times `g_BTNH`, less
    the gradient of its lse.
    """
    blocks = _at_most(blocks, q_BTNH, k_BSKH)
    ranges = _ranges(options, blocks, q_BTNH, k_BSKH, q_ids_BT, kv_ids_BS, shift)
    arrays = (q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, *ranges, lse_BTN, g_BTNH, row_sums_BTN)
    return jax.lax.map(lambda row: _backward_row(options, blocks, shift, *row), arrays)


def _at_most(blocks: tuple[int, int], q: jax.Array, k: jax.Array) -> tuple[int, int]:
    return min(blocks[0], q.shape[1]), min(blocks[1], k.shape[1])


def _ranges(
    options: Options,
    blocks: tuple[int, int],
    q: jax.Array,
    k: jax.Array,
    q_ids: Any,
    kv_ids: Any,
    shift: Any,
) -> tuple[jax.Array, jax.Array]:
    ranges = key_blocks(options, shift, (q.shape[1], k.shape[1]), blocks, q_ids, kv_ids)
    return tuple(jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for x in ranges)


def _forward_row(
    options: Options,
    blocks: tuple[int, int],
    sinks_N: Any,
    shift: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    kv_ids: Any,
    *ranges: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    q_block, kv_block = blocks
    keys, values = _split_keys(k, kv_block), _split_keys(v, kv_block)
    scores = functools.partial(
        _scores,
        options,
        shift,
        keys,
        len(k),
        _split(q_ids, q_block),
        _split(kv_ids, kv_block),
        q_block,
    )
    dtype = sum_dtype(q)
    sinks = jnp.full(q.shape[1], -jnp.inf, dtype) if sinks_N is None else sinks_N.astype(dtype)
    sinks_KR = jnp.repeat(sinks, q_block).reshape(k.shape[1], -1)

    def attend(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, queries, first, end = inputs

        def meet(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output, highest, total = carry
            logits, _ = scores(i, j, queries)
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
            base = jnp.where(
                jnp.isfinite(new_highest), new_highest, 0.0
            )  # nothing is seen yet: all weights are zero
            weights, kept = jnp.exp(logits - base[..., None]), jnp.exp(highest - base)
            product = matmul("krs,ksh->krh", weights.astype(v.dtype), values[j])
            return (
                output * kept[..., None] + product,
                new_highest,
                total * kept + jnp.sum(weights, axis=-1),
            )

        # A sink is a logit as a key's is, with nothing to carry: the softmax begins with it.
        start = (
            jnp.zeros((*queries.shape[:-1], v.shape[-1]), dtype),
            sinks_KR,
            jnp.isfinite(sinks_KR).astype(dtype),
        )
        output, highest, total = jax.lax.fori_loop(first, end, meet, start)
        some = jnp.where(total > 0, total, 1.0)
        return (output / some[..., None]).astype(options.result_dtype(q.dtype)), jnp.where(
            total > 0, highest + jnp.log(some), -jnp.inf
        )

    queries = _split_queries(q, k.shape[1], q_block)
    output, lse = jax.lax.map(attend, (jnp.arange(len(queries)), queries, *ranges))
    return _join_queries(output, len(q), q.shape[1]), _join_queries(
        lse[..., None], len(q), q.shape[1]
    )[..., 0]


def _backward_row(
    options: Options,
    blocks: tuple[int, int],
    shift: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    kv_ids: Any,
    first: jax.Array,
    end: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    row_sums: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_block, kv_block = blocks
    keys, values = _split_keys(k, kv_block), _split_keys(v, kv_block)
    scores = functools.partial(
        _scores,
        options,
        shift,
        keys,
        len(k),
        _split(q_ids, q_block),
        _split(kv_ids, kv_block),
        q_block,
    )

    def attend(
        carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        i, first, end, queries, g, lse, row_sums = inputs
        lse = jnp.where(
            jnp.isfinite(lse), lse, 0.0
        )  # of a query that sees nothing, whose scores are all minus infinity

        def meet(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            gradient_q, gradient_k, gradient_v = carry
            logits, slopes = scores(i, j, queries)
            probs = jnp.exp(logits - lse)
            gradient = (
                probs * (matmul("krh,ksh->krs", g, values[j]) - row_sums) * (options.scale * slopes)
            )
            gradient = gradient.astype(q.dtype)
            # Summed as [K, H, S]: the scores' gradients, the largest operands, are then multiplied
            # without being transposed.
            return (
                gradient_q + matmul("krs,ksh->krh", gradient, keys[j]),
                gradient_k.at[j].add(matmul("krh,krs->khs", queries, gradient)),
                gradient_v.at[j].add(matmul("krh,krs->khs", g, probs.astype(v.dtype))),
            )

        gradient_q, *carry = jax.lax.fori_loop(
            first, end, meet, (jnp.zeros(queries.shape, sum_dtype(q)), *carry)
        )
        return tuple(carry), gradient_q.astype(options.result_dtype(q.dtype))

    rows = [
        _split_queries(x, k.shape[1], q_block) for x in (q, g, lse[..., None], row_sums[..., None])
    ]
    start = tuple(jnp.zeros(jnp.swapaxes(x, 2, 3).shape, sum_dtype(q)) for x in (keys, values))
    (gradient_k, gradient_v), gradient_q = jax.lax.scan(
        attend, start, (jnp.arange(len(first)), first, end, *rows)
    )
    dtype = options.result_dtype(q.dtype)
    join = lambda x, like: (
        jnp.moveaxis(x, 3, 1).reshape(-1, *like.shape[1:])[: len(like)].astype(dtype)
    )
    return _join_queries(gradient_q, len(q), q.shape[1]), join(gradient_k, k), join(gradient_v, v)


def _scores(
    options: Options,
    shift: Any,
    keys: jax.Array,
    kv_length: int,
    q_ids: jax.Array | None,
    kv_ids: jax.Array | None,
    q_block: int,
    i: jax.Array,
    j: jax.Array,
    queries: jax.Array,
) -> tuple[jax.Array, jax.Array | float]:
    """Logits [K, R, S] of block i of queries and j of keys, minus infinity where a key is not seen;
    and their slopes under softcap.
    """
    logits, slopes = matmul("krh,ksh->krs", queries, keys[j]) * options.scale, 1.0
    if options.softcap is not None:
        capped = jnp.tanh(logits / options.softcap)
        logits, slopes = options.softcap * capped, 1 - capped * capped
    index = j * keys.shape[2] + jnp.arange(keys.shape[2])
    ids = (None, None) if q_ids is None else (q_ids[i], kv_ids[j])
    seen = visible(options, shift + i * q_block + jnp.arange(q_block), index, *ids)
    if kv_length % keys.shape[2]:
        seen = index < kv_length if seen is None else seen & (index < kv_length)
    if seen is None:
        return logits, slopes
    seen = jnp.broadcast_to(seen, (queries.shape[1] // q_block, q_block, len(index))).reshape(
        -1, len(index)
    )
    return jnp.where(seen, logits, -jnp.inf), slopes


def _split(x: jax.Array | None, block: int) -> jax.Array | None:
    """[T, ...] to [T / block, block, ...], the last block filled up with zeros."""
    if x is None:
        return None
    padded = jnp.pad(x, ((0, -len(x) % block),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, block, *x.shape[1:])


def _split_keys(x: jax.Array, block: int) -> jax.Array:
    """[S, K, H] to [S / block, K, block, H]."""
    return jnp.swapaxes(_split(x, block), 1, 2)


def _split_queries(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[T, N, H] to [T / block, K, R, H]."""
    blocks = _split(x, block)
    groups = blocks.reshape(*blocks.shape[:2], kv_heads, -1, x.shape[-1])
    return jnp.moveaxis(groups, 1, 3).reshape(len(blocks), kv_heads, -1, x.shape[-1])


def _join_queries(rows: jax.Array, length: int, heads: int) -> jax.Array:
    """The inverse of `_split_queries`."""
    blocks, kv_heads, _, width = rows.shape
    groups = rows.reshape(blocks, kv_heads, heads // kv_heads, -1, width)
    return jnp.moveaxis(groups, 3, 1).reshape(-1, heads, width)[:length]


def matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=sum_dtype(x))


def sum_dtype(x: jax.Array) -> jnp.dtype:
    return np.promote_types(x.dtype, np.float32)
