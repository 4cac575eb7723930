"""Holds a tile of keys and visits blocks of queries: what dkv.py and fused.py share.

Scores are [keys, queries], so that S, P, dP and dS are the transposes of those in the papers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.hopper import common
from moe.kernels.attention.hopper.common import (
    BY_COLUMN,
    LOG2E,
    ROWS,
    TILE,
    Index,
    Operands,
    Ref,
    StaticArgs,
    TileBlocks,
    matrices,
)
from moe.kernels.attention.inputs import Gradients, Inputs, Options
from moe.kernels.attention.masks import full_query_blocks, query_blocks

# The queries of a block: scores and gradients of 64 x 64 take 64 registers of each thread.
BLOCK = 64
# The same where heads are at most 64 wide, whose sums of gradients leave more registers free. A
# product of 64 x 64 x 64 would end before the next one is issued.
NARROW_BLOCK = 128


def query_block(options: Options, operands: Operands) -> int:
    """Returns the number of queries in a block of dkv.py. Softcap's slopes take registers too."""
    widest = max(operands.k.shape[3], operands.v.shape[3])
    return NARROW_BLOCK if widest <= 64 and options.softcap is None else BLOCK


def prepare_backward(
    inputs: Inputs, lse_BTN: jax.Array, dout_BTNH: jax.Array, delta_BTN: jax.Array
) -> Operands:
    """Returns the operands in whole tiles, without the ranges of blocks to visit."""
    # A query that sees nothing has an lse of minus infinity. Its scores are, too, so that any
    # finite number in place of the lse makes P = exp(S - lse) = 0. Queries that are padding have
    # dO = delta = 0, so they add nothing to a gradient.
    lse_BTN = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0) * LOG2E
    lse, delta = (
        common.pad(jnp.moveaxis(x.astype(jnp.float32), 2, 1), 2, TILE) for x in (lse_BTN, delta_BTN)
    )
    dout = common.pad(common.pad(dout_BTNH.astype(inputs.v_BSKH.dtype), 1, TILE), 3, 64)
    operands = common.prepare((TILE, TILE), None, inputs)
    return operands._replace(dout=dout, lse=lse, delta=delta)


def prepare_over_queries(
    options: Options, inputs: Inputs, operands: Operands, block: int
) -> tuple[StaticArgs, Operands]:
    """Returns the static arguments, and the operands with the ranges of queries to visit.

    A block has `block` queries.
    """
    mask = options, inputs.shift, inputs.lengths, (block, TILE)
    visited = query_blocks(*mask, *inputs.segment_ids)
    full = full_query_blocks(*mask, visited, *inputs.segment_ids)
    ranges = common.stack_ranges(visited, full, len(operands.q))
    static = backward_static_args(options, (block, TILE), inputs, operands)
    return static, operands._replace(ranges=ranges)


def backward_static_args(
    options: Options, blocks: tuple[int, int], inputs: Inputs, operands: Operands
) -> StaticArgs:
    q_block, kv_block = blocks
    kv_length = inputs.k_BSKH.shape[1]
    return StaticArgs(
        options,
        q_block,
        kv_block,
        stages=2,
        kv_length=kv_length,
        group=operands.q.shape[2] // operands.k.shape[2],
        masked=common.needs_mask(options, kv_length, min(blocks), inputs.q_segment_ids_BT),
    )


def without_padding(dq: jax.Array, dk: jax.Array, dv: jax.Array, inputs: Inputs) -> Gradients:
    """Returns the parts of the gradients that lie within the inputs."""
    cut = lambda gradient, x: gradient[:, : x.shape[1], :, : x.shape[3]]
    return Gradients(cut(dq, inputs.q_BTNH), cut(dk, inputs.k_BSKH), cut(dv, inputs.v_BSKH))


class KeyTileScratch(NamedTuple):
    """The shared memory and the barriers of a kernel that holds a tile of keys.

    At the end dk and dv take the places of keys and values.
    """

    k: Ref
    v: Ref
    q: Ref
    dout: Ref
    lse: Ref
    delta: Ref
    q_ids: Ref
    kv_ids: Ref
    kv_full: Ref
    q_full: Ref  # queries, their log-sum-exps and ids
    dout_full: Ref  # dout and delta
    q_free: Ref
    dout_free: Ref


def key_tile_scratch(static: StaticArgs, operands: Operands, columns: int = 64) -> KeyTileScratch:
    """Returns the scratch; matrices lie in tiles of `columns` columns."""
    width, value_width = operands.k.shape[3], operands.v.shape[3]
    has_ids, stages = operands.q_ids is not None, static.stages
    keys, queries = (2, ROWS), (stages, static.q_block)
    swizzled = functools.partial(matrices, dtype=operands.k.dtype, columns=columns)
    return KeyTileScratch(
        k=swizzled((*keys, width)),
        v=swizzled((*keys, value_width)),
        q=swizzled((*queries, width)),
        dout=swizzled((*queries, value_width)),
        lse=plgpu.SMEM(queries, jnp.float32),
        delta=plgpu.SMEM(queries, jnp.float32),
        q_ids=plgpu.SMEM(queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(keys, jnp.int32) if has_ids else None,
        # A barrier named "full" completes when all the copies that share it have arrived, and one
        # named "free" when both warpgroups have.
        kv_full=plgpu.Barrier(num_barriers=2, num_arrivals=2 + has_ids),
        q_full=plgpu.Barrier(num_barriers=stages, num_arrivals=2 + has_ids),
        dout_full=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        q_free=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        dout_free=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
    )


def load_own_keys(
    operands: Operands, smem: KeyTileScratch, b: Index, n: Index, warpgroup: Index, rows: Index
) -> None:
    """Copies the keys and values that a warpgroup holds (by TMA), and waits for them."""
    copies = [(operands.k.at[b, rows, n], smem.k), (operands.v.at[b, rows, n], smem.v)]
    if operands.kv_ids is not None:
        copies.append((operands.kv_ids.at[b, rows], smem.kv_ids))
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target.at[warpgroup], smem.kv_full.at[warpgroup])
    plgpu.barrier_wait(smem.kv_full.at[warpgroup])


def copy_queries(
    static: StaticArgs,
    operands: Operands,
    smem: KeyTileScratch,
    b: Index,
    n: Index,
    blocks: TileBlocks,
) -> None:
    """Copies the blocks of queries that a tile of keys visits into their rings.

    The third warpgroup, the producer, does nothing else.
    """

    def copy_block(_: bool, head: Index, step: Index, count: Index) -> Index:
        rows = pl.ds(blocks.block(step) * static.q_block, static.q_block)
        slot, head = jax.lax.rem(count, jnp.int32(static.stages)), n * static.group + head
        copy = lambda source, target, full: plgpu.copy_gmem_to_smem(
            source, target.at[slot], full.at[slot]
        )
        # From the second round of the ring on, a buffer must be free before it is written again.
        is_reused = count >= static.stages
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.q_free.at[slot]))
        copy(operands.q.at[b, rows, head], smem.q, smem.q_full)
        copy(operands.lse.at[b, head, rows], smem.lse, smem.q_full)
        if operands.q_ids is not None:
            copy(operands.q_ids.at[b, rows], smem.q_ids, smem.q_full)
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.dout_free.at[slot]))
        copy(operands.dout.at[b, rows, head], smem.dout, smem.dout_full)
        copy(operands.delta.at[b, head, rows], smem.delta, smem.dout_full)
        return count + 1

    visit_heads(static, blocks, copy_block)
    num_steps = blocks.steps * static.group
    common.await_last_phases(static.stages, num_steps, smem.q_free, smem.dout_free)


def visit_heads(static: StaticArgs, blocks: TileBlocks, visit: Callable[..., Index]) -> None:
    """Calls visit(masked, head, step, count), which returns count + 1, for all heads of a group.

    The steps that need a mask come first, those of all heads, and then the others. Queries that are
    padding need no mask, since they have no gradient. So where `static.masked` is false, blocks
    that are not full are visited without a mask, too.
    """

    def visit_steps(masked: bool, first: Index, end: Index, count: Index) -> Index:
        visit_head = lambda head, count: jax.lax.fori_loop(
            first, end, functools.partial(visit, masked, head), count
        )
        return jax.lax.fori_loop(0, static.group, visit_head, count)

    if static.masked:
        count = visit_steps(True, 0, blocks.num_masked, jnp.int32(0))
        visit_steps(False, blocks.num_masked, blocks.steps, count)
    else:
        visit_steps(False, 0, blocks.steps, jnp.int32(0))


def compute_scores(smem: KeyTileScratch, keys: Index, slot: Index, scores: Ref) -> jax.Array:
    """Returns S = K Qᵀ [keys, queries] of a warpgroup's keys and a block of queries."""
    plgpu.barrier_wait(smem.q_full.at[slot])
    plgpu.wgmma(scores, smem.k.at[keys], smem.q.at[slot].T)
    return scores[...]


def compute_probs(
    static: StaticArgs,
    smem: KeyTileScratch,
    warpgroup: Index,
    slot: Index,
    distance: Index | None,
    scores: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns P = exp(S - lse) [keys, queries] times softcap's slopes, and P rounded.

    `distance` is from the first query to the first key, None where no mask is needed.
    """
    logits = static.unscaled_logits(scores)
    if distance is not None:
        ids = None if smem.q_ids is None else (smem.kv_ids.at[warpgroup], smem.q_ids.at[slot])
        # Rows are keys here, so the limits before and after a query change places.
        limits = static.options.right, static.options.left
        logits = common.mask_logits(logits, distance, 0, limits, None, ids)
    slopes = common.softcap_slopes(static, logits)
    probs = jnp.exp2(logits * static.logit_factor - to_rows(smem.lse.at[slot], logits.shape))
    # P is rounded before the next wgmma starts, since the registers of its operands must not change
    # while it runs. Multiplying P with the slopes here frees the registers of the slopes.
    rounded = probs.astype(smem.dout.dtype)
    return jax.lax.optimization_barrier((common.multiply(probs, slopes), rounded))


def compute_dprobs(smem: KeyTileScratch, keys: Index, slot: Index, products: Ref) -> jax.Array:
    """Returns dP - delta [keys, queries], where dP = V dOᵀ.

    The product starts from -delta, since there are no registers to hold delta beside it.
    """
    products[...] = -to_rows(smem.delta.at[slot], products.shape)
    plgpu.wgmma(products, smem.v.at[keys], smem.dout.at[slot].T)
    return products[...]


def hide_index(index: Index, step: Index) -> Index:
    """Returns `index`, written so that the compiler takes it for a new one in each step.

    A compiler that saw the same index in each step would compute all addresses of a matrix once and
    keep them in registers, which wide matrices do not leave free.
    """
    return index + jnp.minimum(step, 0)


def to_rows(numbers: Ref, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a number for each column, read from shared memory, to the rows of a matrix."""
    return jax.lax.broadcast_in_dim(plgpu.layout_cast(numbers[...], BY_COLUMN), shape, [1])
