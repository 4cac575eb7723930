"""What the kernels share that find gradients on Hopper GPUs: those that hold a tile of keys, and
walk over queries, most of all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention import hopper
from moe.kernels.attention.hopper import BY_COLUMN, LOG2E, ROWS, Call, Inputs, Plan, matrices
from moe.kernels.attention.masks import Options, clear_query_blocks, query_blocks

TILE = 2 * ROWS
# The copying warpgroup has more addresses to keep than in the forward kernel.
FEW_REGISTERS, MANY_REGISTERS = 24, 240
# of what a tile meets: the scores and the gradients of 64 x 64 take 64 registers of a thread
BLOCK = 64


def prepare(
    shift: jax.Array | int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    kv_ids: Any,
    lse: jax.Array,
    g: jax.Array,
    row_sums: Any,
) -> Inputs:
    """The arrays in whole tiles, less the blocks that these meet."""
    # A query that sees nothing has scores of minus infinity, and queries that fill up a block have
    # no gradient: any finite number does.
    lse = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E
    lse, row_sums = (
        hopper.pad(jnp.moveaxis(x.astype(jnp.float32), 2, 1), 2, TILE) for x in (lse, row_sums)
    )
    g = hopper.pad(hopper.pad(g.astype(v.dtype), 1, TILE), 3, 64)
    return hopper.prepare((TILE, TILE), None, shift, q, k, v, q_ids, kv_ids)._replace(
        g=g, lse=lse, row_sums=row_sums
    )


def for_keys(
    options: Options, shift: Any, lengths: tuple[int, int], ids: tuple[Any, Any], inputs: Inputs
) -> tuple[Call, Inputs]:
    """What a kernel takes that holds a tile of keys."""
    of_mask = options, shift, lengths, (BLOCK, TILE)
    met = query_blocks(*of_mask, *ids)
    ranges = hopper.ranges_of(met, clear_query_blocks(*of_mask, met, *ids), len(inputs.q))
    return call_of(options, (BLOCK, TILE), lengths, ids, inputs), inputs._replace(ranges=ranges)


def call_of(
    options: Options,
    blocks: tuple[int, int],
    lengths: tuple[int, int],
    ids: tuple[Any, Any],
    inputs: Inputs,
) -> Call:
    """Of blocks of queries and of keys, two of them in flight."""
    masked = hopper.needs_mask(options, lengths[1], min(blocks), ids[0])
    return Call(options, *blocks, 2, lengths[1], inputs.q.shape[2] // inputs.k.shape[2], masked)


def without_padding(
    gradients: tuple[jax.Array, ...], arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Of the gradients, what lies within their arrays."""
    return tuple(
        gradient[:, : x.shape[1], :, : x.shape[3]]
        for gradient, x in zip(gradients, arrays, strict=True)
    )


class KVScratch(NamedTuple):
    """Shared memory and barriers of a kernel that holds keys. Keys' and values' places take their
    gradients.
    """

    k: Any
    v: Any
    q: Any
    g: Any
    lse: Any
    row_sums: Any
    q_ids: Any
    kv_ids: Any
    kv_full: Any
    q_full: Any
    g_full: Any
    q_free: Any
    g_free: Any


def kv_scratch(call: Call, inputs: Inputs, columns: int = 64) -> KVScratch:
    """`columns` are those of the tiles of matrices."""
    width, value_width, has_ids = inputs.k.shape[3], inputs.v.shape[3], inputs.q_ids is not None
    of_keys, of_queries = (2, ROWS), (call.stages, BLOCK)
    swizzled = functools.partial(matrices, dtype=inputs.k.dtype, columns=columns)
    return KVScratch(
        k=swizzled((*of_keys, width)),
        v=swizzled((*of_keys, value_width)),
        q=swizzled((*of_queries, width)),
        g=swizzled((*of_queries, value_width)),
        lse=plgpu.SMEM(of_queries, jnp.float32),
        row_sums=plgpu.SMEM(of_queries, jnp.float32),
        q_ids=plgpu.SMEM(of_queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(of_keys, jnp.int32) if has_ids else None,
        kv_full=plgpu.Barrier(num_barriers=2, num_arrivals=2 + has_ids),
        q_full=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2 + has_ids),
        g_full=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
        q_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
        g_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
    )


def copy_keys(x: Inputs, at: KVScratch, b: Any, n: Any, me: Any, rows: Any) -> None:
    """A warpgroup's keys and values, awaited."""
    copies = [(y.at[b, rows, n], place.at[me]) for y, place in ((x.k, at.k), (x.v, at.v))]
    copies += [] if x.kv_ids is None else [(x.kv_ids.at[b, rows], at.kv_ids.at[me])]
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, at.kv_full.at[me])
    plgpu.barrier_wait(at.kv_full.at[me])


def copy_queries(call: Call, x: Inputs, at: KVScratch, b: Any, n: Any, plan: Plan) -> None:
    """What the warpgroup that copies does."""

    def copy(_: bool, head: Any, step: Any, count: Any) -> Any:
        rows = pl.ds(plan.block(step) * BLOCK, BLOCK)
        slot, head = jax.lax.rem(count, jnp.int32(call.stages)), n * call.group + head
        pl.when(count >= call.stages)(lambda: plgpu.barrier_wait(at.q_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.q.at[b, rows, head], at.q.at[slot], at.q_full.at[slot])
        plgpu.copy_gmem_to_smem(x.lse.at[b, head, rows], at.lse.at[slot], at.q_full.at[slot])
        if x.q_ids is not None:
            plgpu.copy_gmem_to_smem(x.q_ids.at[b, rows], at.q_ids.at[slot], at.q_full.at[slot])
        pl.when(count >= call.stages)(lambda: plgpu.barrier_wait(at.g_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.g.at[b, rows, head], at.g.at[slot], at.g_full.at[slot])
        plgpu.copy_gmem_to_smem(
            x.row_sums.at[b, head, rows], at.row_sums.at[slot], at.g_full.at[slot]
        )
        return count + 1

    over_heads(call, plan, copy)
    hopper.drain(call.stages, plan.steps * call.group, at.q_free, at.g_free)


def over_heads(call: Call, plan: Plan, visit: Any) -> None:
    """Calls visit(masked, head, step, count), which returns count + 1: the steps that need a mask,
    of all heads, before the clear ones.

    Queries that fill up a block need none, having no gradient, so there may be a block that is not
    clear in a call without masks.
    """

    def run(masked: bool, first: Any, end: Any, count: Any) -> Any:
        of_head = lambda head, count: jax.lax.fori_loop(
            first, end, functools.partial(visit, masked, head), count
        )
        return jax.lax.fori_loop(0, call.group, of_head, count)

    if call.masked:
        run(False, plan.masked, plan.steps, run(True, 0, plan.masked, jnp.int32(0)))
    else:
        run(False, 0, plan.steps, jnp.int32(0))


def scores_of(at: KVScratch, mine: Any, slot: Any, products: Any) -> jax.Array:
    """A warpgroup's scores [keys, queries] of a block of queries."""
    plgpu.barrier_wait(at.q_full.at[slot])
    plgpu.wgmma(products, at.k.at[mine], at.q.at[slot].T)
    return products[...]


def weights_of(
    call: Call, at: KVScratch, me: Any, slot: Any, distance: Any, scores: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights [keys, queries] times the slopes of softcap, and weights rounded.

    `distance` is from the first query to the first key, None where no mask is needed.
    """
    logits = call.bounded(scores)
    if distance is not None:
        ids = None if at.q_ids is None else (at.kv_ids.at[me], at.q_ids.at[slot])
        logits = hopper.mask(logits, distance, 0, call.options.right, call.options.left, None, ids)
    slopes = slopes_of(call, logits)
    probs = jnp.exp2(logits * call.factor - down(at.lse.at[slot], logits.shape))
    # Rounded before the next product starts, since no operand may change while one runs; with
    # slopes, which need not be kept then.
    return jax.lax.optimization_barrier((times(probs, slopes), probs.astype(at.g.dtype)))


def gradient_of(at: KVScratch, mine: Any, slot: Any, products: Any) -> jax.Array:
    """The gradient of weights, less row sums: where the product starts, for want of registers to
    hold them beside.
    """
    products[...] = -down(at.row_sums.at[slot], products.shape)
    plgpu.wgmma(products, at.v.at[mine], at.g.at[slot].T)
    return products[...]


def unseen(at: Any, me: Any, step: Any) -> Any:
    """`me`, but not seen to be the same in each step where matrices are so wide that their
    addresses, kept, would fill the registers.
    """
    return me if at.q.shape[-1] <= 128 else me + jnp.minimum(step, 0)


def slopes_of(call: Call, logits: jax.Array) -> jax.Array | None:
    """Those of softcap at logits less their factor, and 0 where a mask has made these infinite."""
    return None if call.options.softcap is None else jnp.maximum(1.0 - logits * logits, 0.0)


def times(probs: jax.Array, slopes: jax.Array | None) -> jax.Array:
    return probs if slopes is None else probs * slopes


def down(numbers: Any, shape: tuple[int, int]) -> jax.Array:
    """A number to a column, from shared memory, for each of its rows."""
    return jax.lax.broadcast_in_dim(plgpu.layout_cast(numbers[...], BY_COLUMN), shape, [1])
