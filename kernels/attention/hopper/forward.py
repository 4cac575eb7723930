"""Computes attention's output on Hopper GPUs by FlashAttention-3's schedule.

A program takes 128 queries of one head, 64 to a warpgroup. In a step a warpgroup issues two
products, S_j = Q K_jᵀ and O += P_(j-1) V_(j-1), and hands the tensor cores to the other warpgroup.
While both products run it computes P_j, the softmax of S_j (Shah et al. 2024, sections 3.1, 3.2).

The blocks that a tile visits come as int32 in global memory (`TileBlocks`): first those that need a
mask, then the full ones, which run without masking code. A tile whose queries see nothing visits
one block, masked, so that no loop is ever empty.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.hopper import common
from moe.kernels.attention.hopper.common import (
    FEW_REGISTERS,
    LOG2E,
    MANY_REGISTERS,
    ROWS,
    TILE,
    Index,
    Operands,
    Ref,
    StaticArgs,
    TileBlocks,
    fill_rows,
    matrices,
    to_columns,
)
from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import full_key_blocks, key_blocks


def forward(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns output [B, T, N, H] in the dtype of the queries, and lse [B, T, N] in float32.

    With `options.partial` the output is float32, with twice the digits of the queries' dtype: the
    kernel writes the rounded output and the remainder, since shared memory holds no float32.
    """
    q, v = inputs.q_BTNH, inputs.v_BSKH
    static, operands = _prepare(options, inputs)
    (batch, length, heads, width), value_width = operands.q.shape, operands.v.shape[3]
    rounded = jax.ShapeDtypeStruct((batch, length, heads, value_width), q.dtype)
    output, lse, *remainder = plgpu.kernel(
        functools.partial(_forward_kernel, static),
        out_type=(
            rounded,
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
            *[rounded] * options.partial,
        ),
        scratch_types=_scratch(static, width, value_width, q.dtype, operands.q_ids is not None),
        # Heads that share keys run at the same time and find them in the cache; tiles that visit
        # the most blocks come first.
        grid=(batch, length // TILE, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_forward",
        compiler_params=common.PARAMS,
    )(operands)
    if options.partial:
        output = output.astype(jnp.float32) + remainder[0].astype(jnp.float32)
    lse = jnp.moveaxis(lse, 1, 2)[:, : q.shape[1]]
    return output[:, : q.shape[1], :, : v.shape[3]], lse


def _prepare(options: Options, inputs: Inputs) -> tuple[StaticArgs, Operands]:
    q, k, v, sinks_N = inputs[:4]
    kv_block, stages = _block_and_stages(q.shape[3], v.shape[3])
    blocks, kv_length = (TILE, kv_block), k.shape[1]
    mask = options, inputs.shift, inputs.lengths, blocks
    visited = key_blocks(*mask, *inputs.segment_ids)
    full = full_key_blocks(*mask, visited, *inputs.segment_ids)
    static = StaticArgs(
        options,
        q_block=TILE,
        kv_block=kv_block,
        stages=stages,
        kv_length=kv_length,
        group=q.shape[2] // k.shape[2],
        masked=common.needs_mask(options, kv_length, kv_block, inputs.q_segment_ids_BT),
    )
    operands = common.prepare(blocks, common.stack_ranges(visited, full, len(q)), inputs)
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32)
    return static, operands._replace(sinks=sinks)


def _block_and_stages(width: int, value_width: int) -> tuple[int, int]:
    """Returns the number of keys in a block and the number of stages in a ring.

    They are the most that registers and 227 KiB of shared memory hold.
    """
    widest = max(width, value_width)
    if widest <= 128:
        return 128, 2
    return (64, 3) if widest <= 192 else (64, 2)


class Scratch(NamedTuple):
    """The shared memory of the forward kernel, and its barriers."""

    q: Ref
    k: Ref
    v: Ref
    output: Ref  # None where the output takes the place of the queries
    lse: Ref
    q_ids: Ref
    kv_ids: Ref
    q_full: Ref
    k_full: Ref
    v_full: Ref
    k_free: Ref
    v_free: Ref
    turn: Ref  # one for each warpgroup, which waits here for its turn to issue products


def _scratch(
    static: StaticArgs, width: int, value_width: int, dtype: Any, has_ids: bool
) -> Scratch:
    queries, keys = (2, ROWS), (static.stages, static.kv_block)
    return Scratch(
        q=matrices((*queries, width), dtype),
        k=matrices((*keys, width), dtype),
        v=matrices((*keys, value_width), dtype),
        output=None if value_width == width else matrices((*queries, value_width), dtype),
        lse=plgpu.SMEM(queries, jnp.float32),
        q_ids=plgpu.SMEM(queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(keys, jnp.int32) if has_ids else None,
        # A barrier named "full" completes when all the copies that share it have arrived.
        q_full=plgpu.Barrier(num_barriers=2, num_arrivals=1 + has_ids),
        k_full=plgpu.Barrier(num_barriers=static.stages, num_arrivals=1 + has_ids),
        v_full=plgpu.Barrier(num_barriers=static.stages),
        # A buffer is free when both warpgroups have read it.
        k_free=plgpu.Barrier(num_barriers=static.stages, num_arrivals=2),
        v_free=plgpu.Barrier(num_barriers=static.stages, num_arrivals=2),
        turn=plgpu.Barrier(num_barriers=2),
    )


def _forward_kernel(
    static: StaticArgs, operands: Operands, output: Ref, lse: Ref, *refs: Ref
) -> None:
    """Computes a tile of the output; with `partial`, `refs` begin with that of the remainder."""
    remainders, smem = refs[: static.options.partial], Scratch(*refs[static.options.partial :])
    b, n, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    # Under a causal mask the last tile visits the most blocks, so it comes first.
    tile = operands.ranges.shape[1] - 1 - jax.lax.axis_index("tile")
    blocks = common.read_tile_blocks(operands.ranges, b, tile, least=1)

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
        q_full = smem.q_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(operands.q.at[b, rows, n], smem.q.at[warpgroup], q_full)
        if operands.q_ids is not None:
            plgpu.copy_gmem_to_smem(operands.q_ids.at[b, rows], smem.q_ids.at[warpgroup], q_full)
        plgpu.barrier_wait(q_full)
        position = start + operands.shift[0]
        mask = functools.partial(
            common.mask_block_of_keys, static, smem, warpgroup, position, blocks
        )
        sink = -jnp.inf if operands.sinks is None else operands.sinks[n] * LOG2E
        attend = functools.partial(_attend, static, smem, warpgroup, blocks, mask, sink)
        accumulator, running_max, denominator = pl.run_scoped(
            attend, plgpu.ACC((ROWS, output.shape[3]), jnp.float32)
        )
        # O = O / l. A query that sees nothing has l = 0.
        safe_denominator = jnp.where(denominator > 0, denominator, 1.0)
        staged = (smem.q if smem.output is None else smem.output).at[warpgroup]
        accumulator = accumulator * to_columns(1 / safe_denominator, accumulator.shape)
        rounded = accumulator.astype(output.dtype)
        rest = rounded
        # The remainder is computed before anything is stored. From then on registers hold two
        # 16-bit arrays, instead of the float32 output beside a 16-bit one.
        if remainders:
            rest = (accumulator - rounded.astype(jnp.float32)).astype(output.dtype)
            rounded, rest = jax.lax.optimization_barrier((rounded, rest))
        staged[...] = rounded
        # lse = m + log(l), where m is in base 2.
        log_sum = running_max / LOG2E + jnp.log(safe_denominator)
        smem.lse[warpgroup] = jnp.where(denominator > 0, log_sum, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, output.at[b, rows, n])
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], lse.at[b, n, rows])
        # Warpgroup 1 has passed the turn on once more than warpgroup 0 has taken it. A barrier must
        # not be left with a phase that nobody waited for.
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(smem.turn.at[0]))
        if remainders:
            # The remainder is staged in the same buffer, after the output has been copied from it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = rest
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, remainders[0].at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(
    static: StaticArgs,
    smem: Scratch,
    warpgroup: Index,
    blocks: TileBlocks,
    mask: Any,
    sink: Any,
    accumulator: Ref,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a warpgroup's O, m and l of FlashAttention-2, before O is divided by l.

    m, the running maximum of each row, is in base 2, and l is the softmax's denominator.
    """
    scores_type = plgpu.ACC((ROWS, static.kv_block), jnp.float32)

    def await_keys(step: Index) -> None:
        slot = static.slot(step)
        pl.when(step < blocks.steps)(lambda: plgpu.barrier_wait(smem.k_full.at[slot]))

    def first_scores(scores: Ref) -> jax.Array:
        plgpu.wgmma(scores, smem.q.at[warpgroup], smem.k.at[0].T)
        return scores[...]

    def visit(masked: bool, step: Index, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weights, running_max, denominator = carry
        slot, last_slot = static.slot(step), static.slot(step - 1)
        plgpu.barrier_wait(smem.turn.at[warpgroup])

        def issue_products(scores: Ref) -> jax.Array:
            # S_j = Q K_jᵀ and O += P_(j-1) V_(j-1): then the other warpgroup may issue its own.
            plgpu.wgmma(scores, smem.q.at[warpgroup], smem.k.at[slot].T)
            plgpu.barrier_wait(smem.v_full.at[last_slot])
            plgpu.wgmma(accumulator, weights, smem.v.at[last_slot])
            plgpu.barrier_arrive(smem.turn.at[1 - warpgroup])
            # Wait for S_j alone. A mask needs the registers of P_(j-1), so a masked step waits for
            # the product with the values, too.
            return plgpu.wgmma_accumulator_load(scores, wait_n=0 if masked else 1)

        logits = static.unscaled_logits(pl.run_scoped(issue_products, scores_type))
        if masked:
            logits = mask(step, slot, logits)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        # P_j is to be computed while the product with the values runs. The compiler would sink the
        # exponentials to where they are used, behind the wait for that product. In LLVM,
        # `optimization_barrier` keeps them in place. In ptxas, which moves no instruction between
        # basic blocks, the branch of `await_keys` does. The weights are rounded after the wait,
        # since a product's operands must not change while it runs.
        weights, rescale, running_max, denominator = jax.lax.optimization_barrier(
            _online_softmax(static, logits, running_max, denominator, masked)
        )
        await_keys(step + 1)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.v_free.at[last_slot])
        # O = exp(m_old - m_new) O.
        sums = plgpu.wgmma_accumulator_load(accumulator, wait_n=None)
        accumulator[...] = sums * to_columns(rescale, sums.shape)
        return weights.astype(smem.v.dtype), running_max, denominator

    # Before the loop: S_0 and P_0.
    plgpu.barrier_wait(smem.k_full.at[0])
    logits = static.unscaled_logits(pl.run_scoped(first_scores, scores_type))
    if static.masked:
        logits = mask(0, 0, logits)
    plgpu.barrier_arrive(smem.k_free.at[0])
    # A sink is a logit like that of a key, but without a value: m starts as the sink, l as 1.
    has_sink = jnp.where(sink > -jnp.inf, 1.0, 0.0)
    running_max, denominator = fill_rows(sink), fill_rows(has_sink)
    weights, _, running_max, denominator = _online_softmax(
        static, logits, running_max, denominator, static.masked
    )
    carry = weights.astype(smem.v.dtype), running_max, denominator
    await_keys(1)
    # Warpgroup 0 has the first turn to issue products.
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(smem.turn.at[0]))
    return _visit_blocks(static, smem, blocks, visit, carry, accumulator)


def _visit_blocks(
    static: StaticArgs,
    smem: Scratch,
    blocks: TileBlocks,
    visit: Any,
    carry: tuple[jax.Array, ...],
    accumulator: Ref,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Visits the blocks after the first, and adds the last product with values."""
    num_masked = jnp.maximum(blocks.num_masked, 1)  # the first block was visited as masked
    if static.masked:
        carry = jax.lax.fori_loop(1, num_masked, functools.partial(visit, True), carry)
    weights, running_max, denominator = jax.lax.fori_loop(
        num_masked, blocks.steps, functools.partial(visit, False), carry
    )
    # The values of the last block: O += P V.
    last_slot = static.slot(blocks.steps - 1)
    plgpu.barrier_wait(smem.v_full.at[last_slot])
    plgpu.wgmma(accumulator, weights, smem.v.at[last_slot])
    output = plgpu.wgmma_accumulator_load(accumulator)
    plgpu.barrier_arrive(smem.v_free.at[last_slot])
    return output, running_max, denominator


def _online_softmax(
    static: StaticArgs,
    logits: jax.Array,
    running_max: jax.Array,
    denominator: jax.Array,
    masked: bool,
) -> tuple[jax.Array, ...]:
    """Returns P, exp(m_old - m_new), m_new and l_new of FlashAttention-2, in base 2."""
    # m_new = max(m, rowmax(S)).
    new_max = jnp.maximum(running_max, jnp.max(logits, axis=1) * static.logit_factor)
    # Where nothing is visible yet, it is minus infinity. With 0 in its place all weights are
    # exp(-inf) = 0 instead of NaN.
    base = jnp.where(new_max > -jnp.inf, new_max, 0.0) if masked else new_max
    # P = exp(S - m_new), and l_new = exp(m - m_new) l + rowsum(P).
    weights = jnp.exp2(logits * static.logit_factor - to_columns(base, logits.shape))
    rescale = jnp.exp2(running_max - base)
    return weights, rescale, new_max, denominator * rescale + jnp.sum(weights, axis=1)
