"""Attention over a sequence that a mesh axis splits: around a ring, or by all-to-all over heads.
Everything here is inside shard_map.

Rank r of the axis's P holds tokens r T/P to (r + 1) T/P - 1 of each array, as every other part of a
model has them, and gets its output so. docs/context.md draws both ways and says when to take which.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention import (
    Implementation,
    able_implementation,
    attention_backward,
    attention_forward,
    flash_attention,
    round_output,
    sinks_gradient,
    sum_rows,
)
from moe.kernels.attention.choice import Name, check, describe
from moe.kernels.attention.masks import Options, Window


def ring_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    axis_name: str,
    causal: bool,
    window: Window | None = None,
    segment_ids: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    implementation: Name | Implementation | None = None,
) -> jax.Array:
    """`flash_attention` of the whole sequence, of which each rank holds a part: keys and values go
    around, queries stay (Liu et al. 2023).

    This rank's part of q is [B, T/P, N, H], of k and v [B, T/P, K, H], of `segment_ids` (of queries
    and keys) [B, T/P]; `sinks` is [N]. The result is this rank's [B, T/P, N, H]. The mask counts
    tokens of the whole sequence; for all other arguments see `flash_attention`. Gradients are of
    this rank's inputs, and that of the sinks is what its queries add to it: shard_map adds up the
    ranks'.

    Nothing of size T is held, in the backward pass either. Ranks get equal work under a causal mask
    (see `chunk_order`). Raises ValueError for arguments that do not agree, and for a T/P that
    cannot be halved where that order needs it; NotImplementedError for an implementation that
    cannot do a ring.
    """
    mask = {
        "causal": causal,
        "window": window,
        "q_segment_ids": segment_ids,
        "kv_segment_ids": segment_ids,
    }
    call = describe(
        q_BTNH, k_BSKH, v_BSKH, **mask, softcap=softcap, sinks=sinks, scale=scale, return_lse=True
    )
    if q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise ValueError(
            f"q {q_BTNH.shape} and k {k_BSKH.shape} must hold the same tokens (T/P) of one sequence"
        )
    implementation, options = (
        able_implementation(implementation, call),
        dataclasses.replace(call.options, partial=True),
    )
    order = chunk_order(options, jax.lax.axis_size(axis_name), q_BTNH.shape[1])
    q, k, v, ids = (
        None if x is None else _deal(axis_name, order, x)
        for x in (q_BTNH, k_BSKH, v_BSKH, segment_ids)
    )
    return _collect(
        axis_name,
        order,
        _ring(_Ring(axis_name, implementation, options, order), q, k, v, sinks, ids),
    )


def ulysses_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    axis_name: str,
    causal: bool,
    window: Window | None = None,
    segment_ids: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    implementation: Name | Implementation | None = None,
) -> jax.Array:
    """The same result as `ring_attention`'s, by handing each rank all tokens of N/P of the heads
    (Jacobs et al. 2023).

    Shapes and gradients are those of `ring_attention`. A rank that reads a key/value head is sent
    it: where K is no multiple of P, some go to several. Raises ValueError for arguments that do not
    agree, and where N is no multiple of P.
    """
    check(q_BTNH, k_BSKH, v_BSKH, sinks, segment_ids, segment_ids, window, softcap, scale)
    size, heads, kv_heads = jax.lax.axis_size(axis_name), q_BTNH.shape[2], k_BSKH.shape[2]
    if heads % size:
        raise ValueError(
            f"q {q_BTNH.shape} has {heads} heads, which cannot be divided over {axis_name}={size}: use ring attention"
        )
    # Query head n then reads copy n // (N / copies), of head n // (N / K): the least number of
    # copies of which each rank has as many.
    copies = math.lcm(kv_heads, size) // kv_heads
    k, v = (_copy_heads(x, copies) if copies > 1 else x for x in (k_BSKH, v_BSKH))
    q, k, v = (
        jax.lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)
        for x in (q_BTNH, k, v)
    )
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    if sinks is not None:
        sinks = jax.lax.dynamic_slice_in_dim(
            sinks, jax.lax.axis_index(axis_name) * (heads // size), heads // size
        )
    mask = {
        "causal": causal,
        "window": window,
        "q_segment_ids": segment_ids,
        "kv_segment_ids": segment_ids,
    }
    output = flash_attention(
        q, k, v, **mask, softcap=softcap, sinks=sinks, scale=scale, implementation=implementation
    )
    return jax.lax.all_to_all(output, axis_name, split_axis=1, concat_axis=2, tiled=True)


def _copy_heads(x_BSKH: jax.Array, copies: int) -> jax.Array:
    """Repeats each head, as float32, so that autodiff adds up the copies' gradients in float32."""
    return jnp.repeat(
        x_BSKH.astype(np.promote_types(x_BSKH.dtype, np.float32)), copies, axis=2
    ).astype(x_BSKH.dtype)


Order = tuple[tuple[int, ...], ...]  # the chunks that each rank computes with


class Step(NamedTuple):
    """A stop of the keys on their way around."""

    distance: int  # ranks that they have come: rank r has those of rank r - distance
    onward: int  # ranks to the next stop; 0 at the last
    # int32 [calls, P, 3]: each rank's chunk of queries, the visitors' chunk of keys, and the shift
    # between, in tokens
    calls: np.ndarray


def chunk_order(options: Options, size: int, length: int) -> Order:
    """The chunks of the sequence that each rank computes with: one, as it comes, or two in zig-zag:
    chunks r and 2P - 1 - r for rank r.

    `length` is T/P. Under a causal mask the last tokens see most: as they come, the last rank would
    do twice the mean. Under a window of at most T/2 it does as much in both orders, and keys travel
    less in the first. Raises ValueError for an odd length in zig-zag.
    """
    if (
        size == 1
        or options.right != 0
        or (options.left is not None and 2 * options.left <= size * length)
    ):
        return tuple((rank,) for rank in range(size))
    if length % 2:
        raise ValueError(
            f"{length} tokens on each of {size} ranks: causal ring attention halves them, so their number must be even"
        )
    # The even chunk first: of each rank's tokens, as they come, the first half is an even chunk.
    return tuple(
        tuple(sorted((rank, 2 * size - 1 - rank), key=lambda chunk: chunk % 2))
        for rank in range(size)
    )


def plan(options: Options, order: Order, length: int) -> list[Step]:
    """The steps of a ring, less those that no rank's mask needs, each with as many calls as its
    busiest rank needs.

    `length` is a chunk's. A rank that needs fewer calls makes up the number by some in which it
    sees nothing: no block is computed in them.
    """

    def sees_nothing(call: tuple[int, int, int]) -> bool:
        before, after = (
            call[2] - (length - 1),
            -call[2] - (length - 1),
        )  # the least distances of a query from a key
        return (options.left is not None and before > options.left) or (
            options.right is not None and after > options.right
        )

    stops = {}
    for distance in range(len(order)):
        ranks = []
        for rank, queries in enumerate(order):
            pairs = itertools.product(
                enumerate(queries), enumerate(order[rank - distance])
            )  # an index below 0 goes around too
            ranks.append(
                sorted(
                    ((i, j, (query - key) * length) for (i, query), (j, key) in pairs),
                    key=sees_nothing,
                )
            )
        if needed := max(sum(not sees_nothing(call) for call in calls) for calls in ranks):
            stops[distance] = np.array([calls[:needed] for calls in ranks], np.int32).swapaxes(0, 1)
    onward = np.diff([*stops, max(stops)]).tolist()
    return [Step(*step) for step in zip(stops, onward, stops.values(), strict=True)]


def _deal(axis_name: str, order: Order, x: jax.Array) -> jax.Array:
    """[B, T/P, ...] to the rank's chunks, [chunks, B, T/P/chunks, ...]."""
    if len(order[0]) == 1:
        return x[None]
    return jnp.stack(
        [
            jax.lax.ppermute(half, axis_name, to)
            for half, to in zip(jnp.split(x, 2, axis=1), _moves(order), strict=True)
        ]
    )


def _collect(axis_name: str, order: Order, chunks: jax.Array) -> jax.Array:
    """The inverse of `_deal`."""
    if len(order[0]) == 1:
        return chunks[0]
    back = [[(to, home) for home, to in moves] for moves in _moves(order)]
    return jnp.concatenate(
        [jax.lax.ppermute(x, axis_name, to) for x, to in zip(chunks, back, strict=True)], axis=1
    )


def _moves(order: Order) -> list[list[tuple[int, int]]]:
    """From which rank to which the even chunks go, and the odd ones: each a permutation, since a
    rank gets one of both.
    """
    return [
        [(chunk // 2, rank) for rank, chunk in enumerate(chunks)]
        for chunks in zip(*order, strict=True)
    ]


class _Ring(NamedTuple):
    """What is static in a ring."""

    axis_name: str
    implementation: Name | Implementation | None
    options: Options
    order: Order

    def send(self, tree: Any, distance: int) -> Any:
        """To the rank that is `distance` further on."""
        size = len(self.order)
        if distance == 0:
            return tree
        return jax.lax.ppermute(
            tree, self.axis_name, [(rank, (rank + distance) % size) for rank in range(size)]
        )

    def calls(self, step: Step) -> list[jax.Array]:
        """This rank's: chunk of queries, chunk of keys, shift."""
        return [jnp.asarray(call)[jax.lax.axis_index(self.axis_name)] for call in step.calls]


# By hand, since autodiff would keep every visitor. Kept are the rank's own chunks, its output, what
# rounding took from that, and its log-sum-exp.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    ring: _Ring,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks_N: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    return _ring_forward(ring, q, k, v, sinks_N, ids)[0]


# All calls of a ring have the same shapes: they are traced and lowered once.
_attend = jax.jit(attention_forward, static_argnums=(0, 1))
_differentiate = jax.jit(attention_backward, static_argnums=(0, 1))


def _ring_forward(
    ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, sinks_N: Any, ids: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    dtype = np.promote_types(q.dtype, np.float32)
    total = jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype), jnp.full(q.shape[:-1], -jnp.inf, dtype)
    visitors = k, v, ids
    for step in plan(ring.options, ring.order, q.shape[2]):
        following, calls = ring.send(visitors, step.onward), ring.calls(step)
        parts = [
            _attend(ring.implementation, ring.options, *_arrays(i, j, q, *visitors, ids), shift)
            for i, j, shift in calls
        ]
        following, total, parts = _together(following, total, parts)
        for (i, _, _), part in zip(calls, parts, strict=True):
            merged = _merge(*(x[i] for x in total), *part)
            total = tuple(_put(x, i, value) for x, value in zip(total, merged, strict=True))
        visitors, total = _together(following, total)
    if sinks_N is not None:  # once, for a query: every part would count it again
        total = _merge(*total, 0.0, jnp.broadcast_to(sinks_N.astype(dtype), total[1].shape))
    output, lost = round_output(total[0], q.dtype)
    return output, (q, k, v, sinks_N, ids, output, lost, total[1])


def _ring_backward(ring: _Ring, residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    """A second ring, in which the gradients of keys and values go around with them and come home in
    the end.
    """
    q, k, v, sinks_N, ids, output, lost, lse = residuals
    # Lest the compiler take the first ring's sends for these, and keep what they brought.
    visitors, g = _together((k, v, ids), g)
    row_sums = sum_rows(output, lost, g, lse.dtype)
    of_q, *of_kv = (jnp.zeros(x.shape, lse.dtype) for x in (q, k, v))
    steps = plan(ring.options, ring.order, q.shape[2])
    for step in steps:
        following, calls = ring.send(visitors, step.onward), ring.calls(step)
        parts = []
        for i, j, shift in calls:
            rows = {"lse_BTN": lse[i], "g_BTNH": g[i], "row_sums_BTN": row_sums[i]}
            parts.append(
                _differentiate(
                    ring.implementation,
                    ring.options,
                    *_arrays(i, j, q, *visitors, ids),
                    shift,
                    **rows,
                )
            )
        following, of_q, of_kv, parts = _together(following, of_q, of_kv, parts)
        for (i, j, _), part in zip(calls, parts, strict=True):
            of_q, *of_kv = (
                _put(x, at, x[at] + value)
                for x, at, value in zip((of_q, *of_kv), (i, j, j), part, strict=True)
            )
        visitors, of_q, of_kv = _together(following, of_q, of_kv)
        of_kv = ring.send(
            of_kv, step.onward
        )  # to be added to when the next calls are done, and to travel meanwhile
    of_k, of_v = ring.send(of_kv, -steps[-1].distance)
    return (
        of_q.astype(q.dtype),
        of_k.astype(k.dtype),
        of_v.astype(v.dtype),
        sinks_gradient(sinks_N, lse, row_sums),
        None,
    )


_ring.defvjp(_ring_forward, _ring_backward)


def _arrays(
    i: jax.Array, j: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, kv_ids: Any, q_ids: Any
) -> tuple[Any, ...]:
    """What `attention_forward` takes, of a chunk of queries and one of keys; sinks are not for a
    part.
    """
    return q[i], k[j], v[j], None, *((None, None) if q_ids is None else (q_ids[i], kv_ids[j]))


def _together(*trees: Any) -> Any:
    """All before any of what follows. Between two of these are a step's sends and calls, or its
    sums, and nothing else.

    XLA's scheduler starts a send as late as it can, behind whatever takes long enough. Beside the
    sums it would choose them, which take as long as a send by its own estimate; so it has only the
    calls. It would also put off the sums, and hold what every visitor adds to them.
    """
    return jax.lax.optimization_barrier(trees)


def _merge(
    output: jax.Array, lse: jax.Array, part: jax.Array | float, part_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the keys of two ranges, from the output and the log-sum-exp of each."""
    both = jnp.logaddexp(lse, part_lse)
    base = jnp.where(jnp.isfinite(both), both, 0)  # of a query that has seen nothing yet
    return output * jnp.exp(lse - base)[..., None] + part * jnp.exp(part_lse - base)[
        ..., None
    ], both


def _put(x: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)
