"""Computes dq, dk and dv on Hopper GPUs in one kernel, with 5 products a block instead of 7.

A program holds 128 keys and visits blocks of 64 queries, as dkv.py does. As FlashAttention-3 (Shah
et al. 2024) does, it also computes what its keys contribute to dq, and adds that to float32 sums in
global memory, by a copy (TMA) that adds. Programs add in any order, so a sum's last bits differ
from run to run.

A warpgroup has 64 keys. Both warpgroups write their dS to shared memory. Then each multiplies the
dS of all 128 keys with one half of the columns of the keys.
"""

import functools
from collections.abc import Callable

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
    matrices,
)
from moe.kernels.attention.hopper.over_queries import (
    BLOCK,
    KeyTileScratch,
    compute_dprobs,
    compute_probs,
    compute_scores,
    copy_queries,
    hide_index,
    key_tile_scratch,
    load_own_keys,
    prepare_backward,
    prepare_over_queries,
    visit_heads,
    without_padding,
)
from moe.kernels.attention.inputs import Gradients, Inputs, Options


def backward(
    options: Options,
    inputs: Inputs,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    delta_BTN: jax.Array,
) -> Gradients:
    """Returns the gradients of q, k and v, for head widths of up to 128."""
    operands = prepare_backward(inputs, lse_BTN, dout_BTNH, delta_BTN)
    static, operands = prepare_over_queries(options, inputs, operands, BLOCK)
    batch, length, heads, _ = operands.k.shape
    zeros = jnp.zeros(operands.q.shape, jnp.float32)
    dq_sums = jax.new_ref(zeros, memory_space=plgpu.GMEM)
    dk, dv = pl.kernel(
        functools.partial(_allocate_and_run, static),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.k, operands.v)),
        mesh=plgpu.Mesh(
            grid=(batch, length // TILE, heads),
            grid_names=("batch", "tile", "head"),
            num_threads=3,
            thread_name="warpgroup",
            kernel_name="attention_gradients",
        ),
        compiler_params=common.PARAMS,
    )(operands, dq_sums)  # pyright: ignore[reportCallIssue] JAX types it as a decorator
    dq = (jax.freeze(dq_sums) * options.scale).astype(inputs.q_BTNH.dtype)
    return without_padding(dq, dk, dv, inputs)


def _allocate_and_run(static: StaticArgs, operands: Operands, *refs: Ref) -> None:
    """Allocates shared memory and runs the kernel.

    `plgpu.kernel` would allocate it, but takes no reference to an array that is added to.
    """
    # Tiles are as wide as the half of the columns that a warpgroup takes.
    half = operands.k.shape[3] // 2
    pl.run_scoped(
        functools.partial(_kernel, static, operands, *refs),
        key_tile_scratch(static, operands, columns=half),
        # dS has a buffer for each stage, so that a warpgroup may fill the next one while the other
        # warpgroup still reads the last.
        matrices((static.stages, 2, ROWS, BLOCK), operands.k.dtype, columns=half),
        plgpu.SMEM(
            (2, BLOCK, half),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        ),
        plgpu.Barrier(num_barriers=1, num_arrivals=2),
        collective_axes="warpgroup",
    )


def _kernel(
    static: StaticArgs,
    operands: Operands,
    dq_sums: Ref,
    dk_output: Ref,
    dv_output: Ref,
    smem: KeyTileScratch,
    dscores_smem: Ref,
    dq_staged: Ref,
    dscores_written: Ref,
) -> None:
    names = ("batch", "tile", "head", "warpgroup")
    b, tile, n, warpgroup = (jax.lax.axis_index(name) for name in names)
    both_arrived = dscores_written.at[0]

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

        def add_to_dq(half_index: Index, head: Index, block: Index, dq: jax.Array) -> None:
            """Adds half of the columns to dq of a block of queries, in global memory."""
            half = dq.shape[1]
            # Wait until the last copy has read the staging buffer.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_staged[half_index] = dq
            plgpu.commit_smem()
            block_rows, columns = pl.ds(block * BLOCK, BLOCK), pl.ds(half_index * half, half)
            place = dq_sums.at[b, block_rows, n * static.group + head, columns]
            plgpu.copy_smem_to_gmem(dq_staged.at[half_index], place, reduction_op="add")

        visit_queries = functools.partial(
            _visit_queries,
            static,
            smem,
            dscores_smem,
            both_arrived,
            warpgroup,
            common.read_tile_blocks(operands.ranges, b, tile),
            start - operands.shift[0],
            add_to_dq,
        )
        dk, dv = pl.run_scoped(
            visit_queries,
            *(plgpu.ACC((ROWS, x.shape[3]), jnp.float32) for x in (operands.k, operands.v)),
        )
        # The other warpgroup also reads this warpgroup's keys, for its half of dq. So dk may take
        # their place in shared memory only after the last product of both.
        plgpu.barrier_arrive(both_arrived)
        plgpu.barrier_wait(both_arrived)
        smem.k[warpgroup] = (dk * static.options.scale).astype(smem.k.dtype)
        smem.v[warpgroup] = dv.astype(smem.v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.k.at[warpgroup], dk_output.at[b, rows, n])
        plgpu.copy_smem_to_gmem(smem.v.at[warpgroup], dv_output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _visit_queries(
    static: StaticArgs,
    smem: KeyTileScratch,
    dscores_smem: Ref,
    both_arrived: Ref,
    warpgroup: Index,
    blocks: TileBlocks,
    k_position: Index,
    add_to_dq: Callable[[Index, Index, Index, jax.Array], None],
    dk_accumulator: Ref,
    dv_accumulator: Ref,
) -> tuple[jax.Array, jax.Array]:
    """Returns dk of a warpgroup's keys, before it is multiplied with the scale, and dv."""
    products_type = plgpu.ACC((ROWS, BLOCK), jnp.float32)
    half = smem.k.shape[-1] // 2

    def visit(masked: bool, head: Index, step: Index, count: Index) -> Index:
        slot, own_index = static.slot(count), hide_index(warpgroup, count)
        dscores_of_both = dscores_smem.at[slot]
        # S = K Qᵀ and P = exp(S - lse).
        scores = pl.run_scoped(
            functools.partial(compute_scores, smem, own_index, slot), products_type
        )
        distance = k_position - blocks.masked_block(step) * BLOCK if masked else None
        probs, rounded = compute_probs(static, smem, own_index, slot, distance, scores)
        # dV += Pᵀ dO.
        plgpu.barrier_wait(smem.dout_full.at[slot])
        plgpu.wgmma(dv_accumulator, rounded, smem.dout.at[slot])
        if masked or static.options.softcap is not None:
            # The code below needs the registers of P, so the product must have read them.
            plgpu.wgmma_wait(0)
        # dS = P * (dP - delta), and dK += dSᵀ Q while the other warpgroup writes its dS.
        dprobs = pl.run_scoped(
            functools.partial(compute_dprobs, smem, own_index, slot), products_type
        )
        dscores = (probs * dprobs).astype(smem.q.dtype)
        dscores_of_both[own_index] = dscores
        plgpu.commit_smem()
        plgpu.barrier_arrive(both_arrived)
        plgpu.wgmma(dk_accumulator, dscores, smem.q.at[slot])
        plgpu.barrier_wait(both_arrived)

        def compute_half_of_dq(products: Ref) -> jax.Array:
            """Returns dQ = dS K over all 128 keys, in this warpgroup's half of the columns."""
            columns = pl.ds(own_index * half, half)
            for i in range(2):
                plgpu.wgmma(products, dscores_of_both.at[i].T, smem.k.at[i, :, columns])
            return products[...]

        dq = pl.run_scoped(compute_half_of_dq, plgpu.ACC((BLOCK, half), jnp.float32))
        plgpu.barrier_arrive(smem.q_free.at[slot])
        plgpu.barrier_arrive(smem.dout_free.at[slot])
        add_to_dq(own_index, head, blocks.masked_block(step) if masked else blocks.block(step), dq)
        return count + 1

    visit_heads(static, blocks, visit)
    dk, dv = dk_accumulator, dv_accumulator
    return plgpu.wgmma_accumulator_load(dk), plgpu.wgmma_accumulator_load(dv)
