"""Computes attention over a sequence that a mesh axis splits, by a ring or by all-to-all (Ulysses).

All functions here are called inside shard_map. Rank r of the axis's P ranks holds tokens r T/P to
(r + 1) T/P - 1 of each array, as in every other part of a model, and gets the output of these
tokens. docs/context.md describes both ways and says when to take which.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.attention import (
    Choice,
    Gradients,
    Inputs,
    able_choice,
    attention_backward,
    attention_forward,
    compute_delta,
    flash_attention,
    name_residuals,
    round_output,
    sinks_gradient,
)
from moe.kernels.attention.inputs import Options, Window, check_inputs, make_options, make_request
from moe.parallel.context.ring_steps import Order, RingStep, chunk_order, ring_steps


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
    implementation: str | Choice | None = None,
) -> jax.Array:
    """Returns `flash_attention` of the whole sequence, in a ring that keys go around.

    This rank's part of q is [B, T/P, N, H], of k and v [B, T/P, K, H], of `segment_ids` (of queries
    and keys) [B, T/P]; `sinks` is [N]. The result is this rank's [B, T/P, N, H] (Liu et al. 2023).
    The mask counts tokens of the whole sequence; for the other arguments see `flash_attention`.
    Gradients are those of this rank's inputs. Each rank returns what its own queries contribute to
    the gradient of the sinks, and shard_map adds these contributions up.

    Neither pass holds an array of size T. Ranks get equal work under a causal mask (see
    `chunk_order`). Raises ValueError for arguments that do not agree, and for a T/P that cannot be
    halved where that order needs it. Raises NotImplementedError for an implementation that cannot
    do a ring.
    """
    inputs = Inputs(q_BTNH, k_BSKH, v_BSKH, sinks, segment_ids, segment_ids)
    ring = _make_ring(inputs, axis_name, causal, window, softcap, scale, implementation)
    q, k, v, ids = (
        None if x is None else _deal(axis_name, ring.order, x)
        for x in (q_BTNH, k_BSKH, v_BSKH, segment_ids)
    )
    return _collect(axis_name, ring.order, _ring(ring, q, k, v, sinks, ids))


def _make_ring(
    inputs: Inputs,
    axis_name: str,
    causal: bool,
    window: Window | None,
    softcap: float | None,
    scale: float | None,
    implementation: str | Choice | None,
) -> "_Ring":
    """Checks the arguments of a ring, and returns the static ones."""
    check_inputs(inputs)
    q, k = inputs.q_BTNH, inputs.k_BSKH
    options = make_options(q.shape[3], causal, window, softcap, scale)
    request = make_request(inputs, options, offsets=(0, 0), lse=True)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must hold the same tokens (T/P) of one sequence"
        )
    choice = able_choice(implementation, request)
    partial_options = dataclasses.replace(options, partial=True)
    order = chunk_order(partial_options, jax.lax.axis_size(axis_name), q.shape[1])
    return _Ring(axis_name, choice, partial_options, order)


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
    implementation: str | Choice | None = None,
) -> jax.Array:
    """Returns what `ring_attention` does, by giving each rank all tokens of N/P of the heads.

    Shapes and gradients are those of `ring_attention` (Jacobs et al. 2023). Raises ValueError for
    arguments that do not agree, and where N is no multiple of P.
    """
    check_inputs(Inputs(q_BTNH, k_BSKH, v_BSKH, sinks, segment_ids, segment_ids))
    make_options(q_BTNH.shape[3], causal, window, softcap, scale)
    qkv = _scatter_heads(axis_name, q_BTNH, k_BSKH, v_BSKH)
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    if sinks is not None:
        num_heads = qkv[0].shape[2]
        first_head = jax.lax.axis_index(axis_name) * num_heads
        sinks = jax.lax.dynamic_slice_in_dim(sinks, first_head, num_heads)
    output = flash_attention(
        *qkv,
        causal=causal,
        window=window,
        q_segment_ids=segment_ids,
        kv_segment_ids=segment_ids,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        implementation=implementation,
    )
    return jax.lax.all_to_all(output, axis_name, split_axis=1, concat_axis=2, tiled=True)


def _scatter_heads(
    axis_name: str, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sends all tokens of N/P query heads, and the key/value heads that they read, to each rank.

    Where K is no multiple of P, several ranks read the same key/value head: it is copied.
    """
    size, heads, kv_heads = jax.lax.axis_size(axis_name), q.shape[2], k.shape[2]
    if heads % size:
        raise ValueError(
            f"q {q.shape} has {heads} heads, which cannot be divided over {axis_name}={size}: "
            "use ring attention"
        )
    # `copies` is the smallest number of copies of each head with which all ranks get equally many.
    # This makes K * copies heads. Query head n reads number n // (N / (K * copies)), which is a
    # copy of n // (N / K).
    copies = math.lcm(kv_heads, size) // kv_heads
    if copies > 1:
        k, v = _copy_heads(k, copies), _copy_heads(v, copies)
    scatter = lambda x: jax.lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)
    return scatter(q), scatter(k), scatter(v)


def _copy_heads(x_BSKH: jax.Array, copies: int) -> jax.Array:
    """Repeats each head, as float32, so that autodiff adds up the copies' gradients in float32."""
    in_float32 = x_BSKH.astype(np.promote_types(x_BSKH.dtype, np.float32))
    return jnp.repeat(in_float32, copies, axis=2).astype(x_BSKH.dtype)


class _TracedCall(NamedTuple):
    """The `ChunkCall` of the rank that runs the program, as traced int32."""

    q_index: jax.Array
    kv_index: jax.Array
    shift: jax.Array


def _deal(axis_name: str, order: Order, x: jax.Array) -> jax.Array:
    """Exchanges the tokens that this rank holds for the chunks that it computes with.

    Tokens are [B, T/P, ...], and chunks [chunks, B, T/P/chunks, ...].
    """
    if len(order[0]) == 1:
        return x[None]
    halves = zip(jnp.split(x, 2, axis=1), _moves(order), strict=True)
    return jnp.stack([jax.lax.ppermute(half, axis_name, moves) for half, moves in halves])


def _collect(axis_name: str, order: Order, chunks: jax.Array) -> jax.Array:
    """Sends chunks back to the ranks that hold their tokens: the inverse of `_deal`."""
    if len(order[0]) == 1:
        return chunks[0]
    moves_back = [[(computer, holder) for holder, computer in moves] for moves in _moves(order)]
    halves = zip(chunks, moves_back, strict=True)
    return jnp.concatenate(
        [jax.lax.ppermute(half, axis_name, moves) for half, moves in halves], axis=1
    )


def _moves(order: Order) -> list[list[tuple[int, int]]]:
    """Returns pairs of the rank that holds a chunk and the rank that computes with it.

    There is one list for the even chunks and one for the odd ones. Each is a permutation, since
    every rank gets one of both.
    """
    return [
        [(chunk // 2, rank) for rank, chunk in enumerate(chunks)]
        for chunks in zip(*order, strict=True)
    ]


class _Ring(NamedTuple):
    """The static arguments of a ring."""

    axis_name: str
    choice: Choice | None
    options: Options
    order: Order

    def send(self, tree: Any, distance: int) -> Any:
        """Sends a pytree to the rank that is `distance` further on."""
        size = len(self.order)
        if distance == 0:
            return tree
        moves = [(rank, (rank + distance) % size) for rank in range(size)]
        return jax.lax.ppermute(tree, self.axis_name, moves)

    def calls(self, step: RingStep) -> list[_TracedCall]:
        """Returns the chunks of this rank's calls."""
        rank = jax.lax.axis_index(self.axis_name)
        return [_TracedCall(*jnp.asarray(calls)[rank]) for calls in step.calls]


class _KeyValues(NamedTuple):
    """The keys, values and segment ids of one rank, which go around the ring."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None


class _Residuals(NamedTuple):
    """What the backward pass needs, all of it this rank's own: its size does not grow with P."""

    q: jax.Array
    kv: _KeyValues  # this rank's own
    sinks_N: jax.Array | None
    output: jax.Array
    remainder: jax.Array | None  # what rounding took from the output
    lse: jax.Array


# The gradient is written by hand, since autodiff would save the keys of every step.
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


# All calls of a ring have the same shapes, so they are traced and lowered once.
_attend = jax.jit(attention_forward, static_argnums=(0, 1))
_differentiate = jax.jit(attention_backward, static_argnums=(0, 1))


def _ring_forward(
    ring: _Ring,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks_N: jax.Array | None,
    ids: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    dtype = np.promote_types(q.dtype, np.float32)
    # The output and the log-sum-exp over the keys of the steps so far.
    total = jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype), jnp.full(q.shape[:-1], -jnp.inf, dtype)
    own_kv = kv = _KeyValues(k, v, ids)
    for step in ring_steps(ring.options, ring.order, q.shape[2]):
        next_kv, calls = ring.send(kv, step.hop), ring.calls(step)
        parts = [
            _attend(ring.choice, ring.options, _chunk_inputs(q, ids, kv, call)) for call in calls
        ]
        next_kv, total, parts = _barrier(next_kv, total, parts)
        for (i, _, _), part in zip(calls, parts, strict=True):
            merged = _merge(*(x[i] for x in total), *part)
            total = tuple(_put(x, i, value) for x, value in zip(total, merged, strict=True))
        kv, total = _barrier(next_kv, total)
    output, lse = total
    if sinks_N is not None:
        # A sink counts once for each query, so it is merged after all parts.
        output, lse = _merge(output, lse, 0.0, jnp.broadcast_to(sinks_N.astype(dtype), lse.shape))
    output, remainder, lse = name_residuals(*round_output(output, q.dtype), lse)
    return output, _Residuals(q, own_kv, sinks_N, output, remainder, lse)


def _ring_backward(ring: _Ring, residuals: _Residuals, dout: jax.Array) -> tuple[Any, ...]:
    """Sends keys and values around the ring again, together with their gradients."""
    q, kv, sinks_N, output, remainder, lse = residuals
    q_ids = kv.ids
    # Without a barrier the compiler would merge these sends with those of the first ring, and keep
    # all keys that the first ring received.
    kv, dout = _barrier(kv, dout)
    delta = compute_delta(output, remainder, dout, lse.dtype)
    gradients = Gradients(*(jnp.zeros(x.shape, lse.dtype) for x in (q, kv.k, kv.v)))
    steps = ring_steps(ring.options, ring.order, q.shape[2])
    for step in steps:
        next_kv, calls = ring.send(kv, step.hop), ring.calls(step)
        parts = []
        for call in calls:
            i = call.q_index
            rows = {"lse_BTN": lse[i], "dout_BTNH": dout[i], "delta_BTN": delta[i]}
            chunk = _chunk_inputs(q, q_ids, kv, call)
            parts.append(_differentiate(ring.choice, ring.options, chunk, **rows))
        next_kv, gradients, parts = _barrier(next_kv, gradients, parts)
        for call, part in zip(calls, parts, strict=True):
            gradients = _add_chunk(gradients, part, call)
        kv, gradients = _barrier(next_kv, gradients)
        # dk and dv are sent while the next calls compute, before the gradients of those are added.
        dk, dv = ring.send(gradients[1:], step.hop)
        gradients = Gradients(gradients.dq, dk, dv)
    # After the last step each rank's dk and dv go back to the rank that holds the keys.
    dk, dv = ring.send(gradients[1:], -steps[-1].distance)
    dq, dk, dv = gradients.dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)
    return dq, dk, dv, sinks_gradient(sinks_N, lse, delta), None


_ring.defvjp(_ring_forward, _ring_backward)


def _chunk_inputs(
    q: jax.Array, q_ids: jax.Array | None, kv: _KeyValues, call: _TracedCall
) -> Inputs:
    """Returns the inputs of one call, without sinks, which are merged once at the end."""
    i, j, shift = call
    q_ids = None if q_ids is None else q_ids[i]
    kv_ids = None if kv.ids is None else kv.ids[j]
    return Inputs(q[i], kv.k[j], kv.v[j], None, q_ids, kv_ids, shift)


def _add_chunk(gradients: Gradients, part: Gradients, call: _TracedCall) -> Gradients:
    """Adds the gradients of one call to those of its chunks."""
    i, j, _ = call
    added = (
        _put(x, chunk, x[chunk] + value)
        for x, chunk, value in zip(gradients, (i, j, j), part, strict=True)
    )
    return Gradients(*added)


def _barrier(*trees: Any) -> Any:
    """Computes all of the trees before anything that follows.

    These barriers separate a step's sends and kernel calls from its sums. XLA's scheduler starts a
    send as late as it can, beside any work that it estimates to take as long. Without the barriers
    it would hide sends behind the sums instead of the kernel calls. It would also put off the sums,
    and until then hold the parts of every step.
    """
    return jax.lax.optimization_barrier(trees)


def _merge(
    output: jax.Array, lse: jax.Array, part: jax.Array | float, part_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and lse of two ranges of keys, given those of each."""
    both_lse = jnp.logaddexp(lse, part_lse)
    # A query that has seen nothing yet has a lse of minus infinity.
    base = jnp.where(jnp.isfinite(both_lse), both_lse, 0)
    weight, part_weight = jnp.exp(lse - base)[..., None], jnp.exp(part_lse - base)[..., None]
    return output * weight + part * part_weight, both_lse


def _put(x: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)
