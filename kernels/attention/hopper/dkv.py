"""Computes dk and dv on Hopper GPUs: a program holds 128 keys and visits blocks of queries.

It visits the queries of all heads that share the keys, with four products for each block: S = K Qᵀ,
dV += Pᵀ dO, dP = V dOᵀ, and dK += dSᵀ Q.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.hopper import common
from moe.kernels.attention.hopper.common import (
    FEW_REGISTERS,
    MANY_REGISTERS,
    ROWS,
    TILE,
    Index,
    Operands,
    Ref,
    StaticArgs,
    TileBlocks,
)
from moe.kernels.attention.hopper.over_queries import (
    KeyTileScratch,
    compute_dprobs,
    compute_probs,
    compute_scores,
    copy_queries,
    hide_index,
    key_tile_scratch,
    load_own_keys,
)


class Wanted(NamedTuple):
    """Which gradients a run of the kernel computes."""

    dk: bool
    dv: bool


def compute_dkv(static: StaticArgs, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns dk and dv, computed at once or one after the other.

    Registers do not hold the sums of both for wide heads. With softcap, whose slopes
    they also hold, the limit is lower.
    """
    widest = 256 if static.options.softcap is None else 192
    if operands.k.shape[3] + operands.v.shape[3] <= widest:
        dk, dv = _run(static, operands, Wanted(dk=True, dv=True))
        return dk, dv
    (dk,) = _run(static, operands, Wanted(dk=True, dv=False))
    (dv,) = _run(static, operands, Wanted(dk=False, dv=True))
    return dk, dv


def _run(static: StaticArgs, operands: Operands, wanted: Wanted) -> tuple[jax.Array, ...]:
    batch, length, heads, width = operands.k.shape
    static = dataclasses.replace(static, stages=2 if width <= 192 else 1)
    arrays = [operands.k] * wanted.dk + [operands.v] * wanted.dv
    return plgpu.kernel(
        functools.partial(_dkv_kernel, static, wanted),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays),
        scratch_types=key_tile_scratch(static, operands),
        grid=(batch, length // TILE, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_dkv",
        compiler_params=common.PARAMS,
    )(operands)


def _dkv_kernel(static: StaticArgs, wanted: Wanted, operands: Operands, *refs: Ref) -> None:
    outputs, smem = refs[: sum(wanted)], KeyTileScratch(*refs[sum(wanted) :])
    names = ("batch", "tile", "head", "warpgroup")
    b, tile, n, warpgroup = (jax.lax.axis_index(name) for name in names)

    # The warpgroup that copies.
    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        blocks = common.read_tile_blocks(operands.ranges, b, tile)
        copy_queries(static, operands, smem, b, n, blocks)

    # The warpgroups that compute, each with 64 of the tile's keys.
    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        load_own_keys(operands, smem, b, n, warpgroup, rows)
        # At the end dk takes the place of the keys in shared memory, and dv that of the values.
        places = [smem.k] * wanted.dk + [smem.v] * wanted.dv
        sums = [plgpu.ACC((ROWS, place.shape[-1]), jnp.float32) for place in places]
        visit_queries = functools.partial(
            _visit_queries,
            static,
            wanted,
            smem,
            warpgroup,
            common.read_tile_blocks(operands.ranges, b, tile),
            start - operands.shift[0],
        )
        gradients = pl.run_scoped(visit_queries, *sums)
        for place, gradient, output in zip(places, gradients, outputs, strict=True):
            if place is smem.k:
                gradient = gradient * static.options.scale
            place[warpgroup] = gradient.astype(output.dtype)
        plgpu.commit_smem()
        for place, output in zip(places, outputs, strict=True):
            plgpu.copy_smem_to_gmem(place.at[warpgroup], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _visit_queries(
    static: StaticArgs,
    wanted: Wanted,
    smem: KeyTileScratch,
    warpgroup: Index,
    blocks: TileBlocks,
    k_position: Index,
    *accumulators: Ref,
) -> list[jax.Array]:
    """Returns dk of a warpgroup's keys, before it is multiplied with the scale, and dv, as wanted.

    `k_position` is that of the first key, counted from the first query.
    """
    products_type = plgpu.ACC((ROWS, static.q_block), jnp.float32)

    def visit(masked: bool, step: Index, count: Index) -> Index:
        slot = static.slot(count)
        is_wide = smem.q.shape[-1] > 128
        keys = hide_index(warpgroup, count) if is_wide else warpgroup
        # S = K Qᵀ and P = exp(S - lse).
        distance = k_position - blocks.masked_block(step) * static.q_block if masked else None
        scores = pl.run_scoped(functools.partial(compute_scores, smem, keys, slot), products_type)
        probs, rounded = compute_probs(static, smem, warpgroup, slot, distance, scores)
        plgpu.barrier_wait(smem.dout_full.at[slot])
        if wanted.dv:
            # dV += Pᵀ dO.
            plgpu.wgmma(accumulators[-1], rounded, smem.dout.at[slot])
            if masked or static.options.softcap is not None:
                # The code below needs the registers of P, so the product must have read them.
                plgpu.wgmma_wait(0)
        if wanted.dk:
            # dS = P * (dP - delta), and dK += dSᵀ Q.
            dprobs = pl.run_scoped(
                functools.partial(compute_dprobs, smem, keys, slot), products_type
            )
            dscores = (probs * dprobs).astype(smem.q.dtype)
            plgpu.wgmma(accumulators[0], dscores, smem.q.at[slot])
        # Both products have read their operands: the producer may fill these buffers again.
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.q_free.at[slot])
        plgpu.barrier_arrive(smem.dout_free.at[slot])
        return count + 1

    # The steps that need a mask come first, of all heads of the group.
    count = jnp.int32(0)
    if static.masked:
        visit_head = lambda _, count: jax.lax.fori_loop(
            0, blocks.num_masked, functools.partial(visit, True), count
        )
        count = jax.lax.fori_loop(0, static.group, visit_head, count)

    def visit_full(count: Index, _: None) -> None:
        visit(False, count, count)

    jax.lax.fori_loop(count, blocks.steps * static.group, visit_full, None)
    return [plgpu.wgmma_accumulator_load(x) for x in accumulators]
