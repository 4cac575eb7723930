"""Computes dq on Hopper GPUs: a program holds 128 queries and visits blocks of keys.

It issues three products for each block: S = Q Kᵀ, dP = dO Vᵀ, and dQ += dS K.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.hopper import common
from moe.kernels.attention.hopper.common import (
    BY_ROW,
    FEW_REGISTERS,
    MANY_REGISTERS,
    ROWS,
    TILE,
    Index,
    Operands,
    Ref,
    StaticArgs,
    TileBlocks,
    matrices,
    to_columns,
)
from moe.kernels.attention.hopper.over_queries import backward_static_args, hide_index
from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import full_key_blocks, key_blocks


def prepare_over_keys(
    options: Options, inputs: Inputs, operands: Operands
) -> tuple[StaticArgs, Operands]:
    """Returns the static arguments, and the operands with the ranges of keys to visit."""
    blocks = TILE, _kv_block(operands.q.shape[3], operands.v.shape[3])
    mask = options, inputs.shift, inputs.lengths, blocks
    visited = key_blocks(*mask, *inputs.segment_ids)
    full = full_key_blocks(*mask, visited, *inputs.segment_ids)
    ranges = common.stack_ranges(visited, full, len(operands.q))
    static = backward_static_args(options, blocks, inputs, operands)
    return static, operands._replace(ranges=ranges)


def _kv_block(width: int, value_width: int) -> int:
    """Returns the number of keys in a block, the most for which registers hold S, dP and dQ.

    Beside a sum of 64 x 256 for dQ they have no room for S and dP larger than 64 x 32. Shared
    memory holds 128 keys beside narrow values alone.
    """
    if max(width, value_width) <= 64:
        return 128
    return 64 if width <= 192 else 32


class Scratch(NamedTuple):
    """The shared memory and the barriers. At the end dq takes the place of the queries."""

    q: Ref
    dout: Ref
    rows: Ref  # the log-sum-exp and the delta of each query
    k: Ref
    v: Ref
    q_ids: Ref
    kv_ids: Ref
    q_full: Ref
    k_full: Ref
    v_full: Ref
    k_free: Ref
    v_free: Ref


def compute_dq(static: StaticArgs, operands: Operands) -> jax.Array:
    batch, length, heads, width = operands.q.shape
    # As many stages as 227 KiB of shared memory hold beside queries and dout.
    static = dataclasses.replace(static, stages=3 if width <= 128 else 2)
    return plgpu.kernel(
        functools.partial(_dq_kernel, static),
        out_type=jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
        scratch_types=_scratch(static, operands),
        grid=(batch, length // TILE, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_dq",
        compiler_params=common.PARAMS,
    )(operands)


def _scratch(static: StaticArgs, operands: Operands) -> Scratch:
    width, value_width = operands.q.shape[3], operands.v.shape[3]
    has_ids, stages = operands.q_ids is not None, static.stages
    queries, keys = (2, ROWS), (stages, static.kv_block)
    columns = min(64, static.kv_block)
    swizzled = functools.partial(matrices, dtype=operands.q.dtype, columns=columns)
    return Scratch(
        q=swizzled((*queries, width)),
        dout=swizzled((*queries, value_width)),
        rows=plgpu.SMEM((2, *queries), jnp.float32),
        k=swizzled((*keys, width)),
        v=swizzled((*keys, value_width)),
        q_ids=plgpu.SMEM(queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(keys, jnp.int32) if has_ids else None,
        # A barrier named "full" completes when all the copies that share it have arrived, and one
        # named "free" when both warpgroups have.
        q_full=plgpu.Barrier(num_barriers=2, num_arrivals=4 + has_ids),
        k_full=plgpu.Barrier(num_barriers=stages, num_arrivals=1 + has_ids),
        v_full=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        v_free=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
    )


def _dq_kernel(static: StaticArgs, operands: Operands, output: Ref, *scratch: Ref) -> None:
    smem = Scratch(*scratch)
    b, n, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    # Under a causal mask the last tile visits the most blocks, so it comes first.
    tile = operands.ranges.shape[1] - 1 - jax.lax.axis_index("tile")
    blocks = common.read_tile_blocks(operands.ranges, b, tile)

    # The warpgroup that copies.
    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        common.copy_keys_and_values(static, operands, smem, b, n, blocks)

    # The warpgroups that compute, each with 64 of the tile's queries.
    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        copies = [
            (operands.q.at[b, rows, n], smem.q.at[warpgroup]),
            (operands.dout.at[b, rows, n], smem.dout.at[warpgroup]),
            (operands.lse.at[b, n, rows], smem.rows.at[0, warpgroup]),
            (operands.delta.at[b, n, rows], smem.rows.at[1, warpgroup]),
        ]
        if operands.q_ids is not None:
            copies.append((operands.q_ids.at[b, rows], smem.q_ids.at[warpgroup]))
        # All copies (TMA) arrive at one barrier. Then lse and delta, two numbers for each query,
        # move to registers.
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, smem.q_full.at[warpgroup])
        plgpu.barrier_wait(smem.q_full.at[warpgroup])
        lse, delta = (plgpu.layout_cast(smem.rows[i, warpgroup], BY_ROW) for i in range(2))
        mask = functools.partial(
            common.mask_block_of_keys, static, smem, warpgroup, start + operands.shift[0], blocks
        )
        visit_keys = functools.partial(
            _visit_keys, static, smem, warpgroup, blocks, mask, lse, delta
        )
        dq = pl.run_scoped(visit_keys, plgpu.ACC((ROWS, output.shape[3]), jnp.float32))
        # dq is rounded into the place of q in shared memory, and copied out from there (TMA).
        smem.q[warpgroup] = (dq * static.options.scale).astype(output.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.q.at[warpgroup], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _visit_keys(
    static: StaticArgs,
    smem: Scratch,
    warpgroup: Index,
    blocks: TileBlocks,
    mask: Any,
    lse: jax.Array,
    delta: jax.Array,
    accumulator: Ref,
) -> jax.Array:
    """Returns dq of a warpgroup's queries, before it is multiplied with the scale."""
    products_type = plgpu.ACC((ROWS, static.kv_block), jnp.float32)

    def await_keys(step: Index) -> None:
        slot = static.slot(step)
        pl.when(step < blocks.steps)(lambda: plgpu.barrier_wait(smem.k_full.at[slot]))

    def visit(masked: bool, step: Index, _: None) -> None:
        slot = static.slot(step)
        is_wide = smem.q.shape[-1] > 128
        queries = hide_index(warpgroup, step) if is_wide else warpgroup

        def compute_probs_and_dprobs(scores: Ref, dprobs: Ref) -> tuple[jax.Array, jax.Array]:
            # S = Q Kᵀ and dP = dO Vᵀ are both issued; then P is computed while dP runs.
            plgpu.wgmma(scores, smem.q.at[queries], smem.k.at[slot].T)
            plgpu.barrier_wait(smem.v_full.at[slot])
            plgpu.wgmma(dprobs, smem.dout.at[queries], smem.v.at[slot].T)
            logits = static.unscaled_logits(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            if masked:
                logits = mask(step, slot, logits)
            # P = exp(S - lse), times the derivative of softcap.
            slopes = common.softcap_slopes(static, logits)
            probs = jnp.exp2(logits * static.logit_factor - to_columns(lse, logits.shape))
            probs = common.multiply(probs, slopes)
            # As in the forward kernel, this barrier and a branch keep the exponentials before the
            # wait for the product that they overlap with.
            probs = jax.lax.optimization_barrier(probs)
            await_keys(step + 1)
            return probs, plgpu.wgmma_accumulator_load(dprobs)

        probs, dprobs = pl.run_scoped(compute_probs_and_dprobs, products_type, products_type)
        # Nothing reads the values of this block any more.
        plgpu.barrier_arrive(smem.v_free.at[slot])
        # dS = P * (dP - delta), and dQ += dS K.
        dscores = probs * (dprobs - to_columns(delta, dprobs.shape))
        plgpu.wgmma(accumulator, dscores.astype(smem.k.dtype), smem.k.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.k_free.at[slot])

    # The blocks that need a mask come first, in a loop of their own.
    await_keys(0)
    if static.masked:
        jax.lax.fori_loop(0, blocks.num_masked, functools.partial(visit, True), None)
    jax.lax.fori_loop(blocks.num_masked, blocks.steps, functools.partial(visit, False), None)
    return plgpu.wgmma_accumulator_load(accumulator)
