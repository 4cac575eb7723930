"""The gradients of attention on NVIDIA Hopper GPUs: one kernel for that of q, another for those of k and v.

Both have two warpgroups that compute and one that copies, as `hopper.py` has, whose masks and plans they share. No program adds to what
another one wrote, so sums have one order. The kernel for k and v holds 128 keys, and walks over the queries of all heads that share them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention import hopper
from moe.kernels.attention.hopper import BY_COLUMN, BY_ROW, LOG2E, ROWS, Call, Inputs, Plan, across, matrices
from moe.kernels.attention.masks import Options, clear_key_blocks, clear_query_blocks, key_blocks, query_blocks

TILE = 2 * ROWS
# The copying warpgroup has more addresses to keep than in the forward kernel.
FEW_REGISTERS, MANY_REGISTERS = 24, 240
BLOCK = 64  # of what a tile meets: the scores and the gradients of 64 x 64 take 64 registers of a thread


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v. `row_sums_BTN` is each query's sum of output times `g_BTNH`, less the gradient of its lse."""
    lengths = q_BTNH.shape[1], k_BSKH.shape[1]
    inputs = hopper.prepare((TILE, TILE), None, shift, q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS)
    # A query that sees nothing has scores of minus infinity, and queries that fill up a block have no gradient: any finite number does.
    lse = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0) * LOG2E
    lse, row_sums = (hopper.pad(jnp.moveaxis(x.astype(jnp.float32), 2, 1), 2, TILE) for x in (lse, row_sums_BTN))
    g = hopper.pad(hopper.pad(g_BTNH.astype(v_BSKH.dtype), 1, TILE), 3, 64)
    inputs = inputs._replace(g=g, lse=lse, row_sums=row_sums)
    group, ids = q_BTNH.shape[2] // k_BSKH.shape[2], (q_ids_BT, kv_ids_BS)
    blocks = TILE, _key_block(inputs.q.shape[3])
    of_mask = options, shift, lengths, blocks
    met = key_blocks(*of_mask, *ids)
    ranges = hopper.ranges_of(met, clear_key_blocks(*of_mask, met, *ids), len(q_BTNH))
    call = Call(options, *blocks, 2, lengths[1], group, hopper.needs_mask(options, lengths[1], blocks[1], q_ids_BT))
    of_q = _gradient_q(call, inputs._replace(ranges=ranges))
    of_mask = options, shift, lengths, (BLOCK, TILE)
    met = query_blocks(*of_mask, *ids)
    ranges = hopper.ranges_of(met, clear_query_blocks(*of_mask, met, *ids), len(q_BTNH))
    call = Call(options, BLOCK, TILE, 2, lengths[1], group, hopper.needs_mask(options, lengths[1], BLOCK, q_ids_BT))
    of_k, of_v = _gradients_kv(call, inputs._replace(ranges=ranges))
    results = zip((of_q, of_k, of_v), (q_BTNH, k_BSKH, v_BSKH), strict=True)
    return tuple(gradient[:, : x.shape[1], :, : x.shape[3]] for gradient, x in results)


def _key_block(width: int) -> int:
    """Keys at a time of the kernel for q: beside sums of 64 x 256, registers hold scores and gradients of 64 x 32."""
    return BLOCK if width <= 192 else BLOCK // 2


class QScratch(NamedTuple):
    """Shared memory and barriers of the kernel for q. Its queries' place takes their gradients."""

    q: Any
    g: Any
    rows: Any  # log-sum-exps and row sums
    k: Any
    v: Any
    q_ids: Any
    kv_ids: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


def _gradient_q(call: Call, inputs: Inputs) -> jax.Array:
    batch, length, heads, width = inputs.q.shape
    value_width, has_ids = inputs.v.shape[3], inputs.q_ids is not None
    # What 227 KiB of shared memory hold beside the queries and their gradients.
    call = dataclasses.replace(call, stages=3 if width <= 128 else 2)
    of_queries, of_keys = (2, ROWS), (call.stages, call.kv_block)
    swizzled = functools.partial(matrices, dtype=inputs.q.dtype, columns=call.kv_block)
    scratch = QScratch(
        q=swizzled((*of_queries, width)),
        g=swizzled((*of_queries, value_width)),
        rows=plgpu.SMEM((2, *of_queries), jnp.float32),
        k=swizzled((*of_keys, width)),
        v=swizzled((*of_keys, value_width)),
        q_ids=plgpu.SMEM(of_queries, jnp.int32) if has_ids else None,
        kv_ids=plgpu.SMEM(of_keys, jnp.int32) if has_ids else None,
        q_full=plgpu.Barrier(num_barriers=2, num_arrivals=4 + has_ids),
        k_full=plgpu.Barrier(num_barriers=call.stages, num_arrivals=1 + has_ids),
        v_full=plgpu.Barrier(num_barriers=call.stages),
        k_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
        v_free=plgpu.Barrier(num_barriers=call.stages, num_arrivals=2),
    )
    return plgpu.kernel(
        functools.partial(_q_kernel, call),
        out_type=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        scratch_types=scratch,
        grid=(batch, length // TILE, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=hopper.PARAMS,
    )(inputs)


def _q_kernel(call: Call, x: Inputs, output: Any, *scratch: Any) -> None:
    at = QScratch(*scratch)
    b, n, me = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    tile = x.ranges.shape[1] - 1 - jax.lax.axis_index("tile")
    plan = hopper.read_plan(x.ranges, b, tile)

    @pl.when(me == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        hopper.copy_keys(call, x, at, b, n, plan)

    @pl.when(me < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + me * ROWS
        rows = pl.ds(start, ROWS)
        copies = [(x.q.at[b, rows, n], at.q.at[me]), (x.g.at[b, rows, n], at.g.at[me])]
        copies += [(y.at[b, n, rows], at.rows.at[i, me]) for i, y in enumerate((x.lse, x.row_sums))]
        copies += [] if x.q_ids is None else [(x.q_ids.at[b, rows], at.q_ids.at[me])]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, at.q_full.at[me])
        plgpu.barrier_wait(at.q_full.at[me])
        lse, row_sums = (plgpu.layout_cast(at.rows[i, me], BY_ROW) for i in range(2))
        walk = functools.partial(_walk_over_keys, call, at, me, plan, start + x.shift[0], lse, row_sums)
        gradient = pl.run_scoped(walk, plgpu.ACC((ROWS, output.shape[3]), jnp.float32))
        at.q[me] = (gradient * call.options.scale).astype(output.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.q.at[me], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _walk_over_keys(
    call: Call, at: QScratch, me: Any, plan: Plan, position: Any, lse: jax.Array, row_sums: jax.Array, summed: Any
) -> jax.Array:
    """A warpgroup's gradients of queries, less the scale."""
    products = plgpu.ACC((ROWS, call.kv_block), jnp.float32)

    def await_keys(step: Any) -> None:
        pl.when(step < plan.steps)(lambda: plgpu.barrier_wait(at.k_full.at[call.slot(step)]))

    def meet(masked: bool, step: Any, _: None) -> None:
        slot = call.slot(step)

        mine = _mine(at, me, step)

        def both(scores: Any, gradient: Any) -> tuple[jax.Array, jax.Array]:
            plgpu.wgmma(scores, at.q.at[mine], plgpu.transpose_ref(at.k.at[slot], (1, 0)))
            plgpu.barrier_wait(at.v_full.at[slot])
            plgpu.wgmma(gradient, at.g.at[mine], at.v.at[slot].T)
            logits, slopes = _logits(call, plgpu.wgmma_accumulator_load(scores, wait_n=1))
            if masked:
                logits = hopper.mask_keys(call, at, me, position, plan, step, slot, logits)
            weights = _times(jnp.exp2(logits * call.factor - across(lse, logits.shape)), slopes)
            # As in the forward kernel, a branch keeps the exponentials before the wait for the product that they overlap with.
            weights = jax.lax.optimization_barrier(weights)
            await_keys(step + 1)
            return weights, plgpu.wgmma_accumulator_load(gradient)

        weights, gradient = pl.run_scoped(both, products, products)
        plgpu.barrier_arrive(at.v_free.at[slot])
        gradient = weights * (gradient - across(row_sums, gradient.shape))
        plgpu.wgmma(summed, gradient.astype(at.k.dtype), at.k.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(at.k_free.at[slot])

    await_keys(0)
    if call.masked:
        jax.lax.fori_loop(0, plan.masked, functools.partial(meet, True), None)
    jax.lax.fori_loop(plan.masked, plan.steps, functools.partial(meet, False), None)
    return plgpu.wgmma_accumulator_load(summed)


class KVScratch(NamedTuple):
    """Shared memory and barriers of the kernel for k and v. Keys' and values' places take their gradients."""

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


def _gradients_kv(call: Call, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Both at once, or, where registers do not hold the sums of both (and the slopes of softcap), one after the other."""
    if inputs.k.shape[3] + inputs.v.shape[3] <= (256 if call.options.softcap is None else 192):
        return _kv_call(call, inputs, (True, True))
    return *_kv_call(call, inputs, (True, False)), *_kv_call(call, inputs, (False, True))


def _kv_call(call: Call, inputs: Inputs, wanted: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    batch, length, heads, width = inputs.k.shape
    value_width, has_ids = inputs.v.shape[3], inputs.q_ids is not None
    call = dataclasses.replace(call, stages=2 if width <= 192 else 1)
    of_keys, of_queries = (2, ROWS), (call.stages, BLOCK)
    scratch = KVScratch(
        k=matrices((*of_keys, width), inputs.k.dtype),
        v=matrices((*of_keys, value_width), inputs.k.dtype),
        q=matrices((*of_queries, width), inputs.k.dtype),
        g=matrices((*of_queries, value_width), inputs.k.dtype),
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
    return plgpu.kernel(
        functools.partial(_kv_kernel, call, wanted),
        out_type=tuple(
            jax.ShapeDtypeStruct(y.shape, y.dtype) for y, is_wanted in zip((inputs.k, inputs.v), wanted, strict=True) if is_wanted
        ),
        scratch_types=scratch,
        grid=(batch, length // TILE, heads),
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=hopper.PARAMS,
    )(inputs)


def _kv_kernel(call: Call, wanted: tuple[bool, bool], x: Inputs, *refs: Any) -> None:
    outputs, at = refs[: sum(wanted)], KVScratch(*refs[sum(wanted) :])
    b, tile, n, me = (jax.lax.axis_index(name) for name in ("batch", "tile", "head", "warpgroup"))

    @pl.when(me == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        _copy_queries(call, x, at, b, n, hopper.read_plan(x.ranges, b, tile))

    @pl.when(me < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + me * ROWS
        rows = pl.ds(start, ROWS)
        copies = [(y.at[b, rows, n], place.at[me]) for y, place in ((x.k, at.k), (x.v, at.v))]
        copies += [] if x.kv_ids is None else [(x.kv_ids.at[b, rows], at.kv_ids.at[me])]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, at.kv_full.at[me])
        plgpu.barrier_wait(at.kv_full.at[me])
        places = [place for place, is_wanted in zip((at.k, at.v), wanted, strict=True) if is_wanted]
        sums = [plgpu.ACC((ROWS, place.shape[-1]), jnp.float32) for place in places]
        walk = functools.partial(_walk_over_queries, call, wanted, at, me, hopper.read_plan(x.ranges, b, tile), start - x.shift[0])
        gradients = pl.run_scoped(walk, *sums)
        for place, gradient, output in zip(places, gradients, outputs, strict=True):
            place[me] = (gradient * call.options.scale if place is at.k else gradient).astype(output.dtype)
        plgpu.commit_smem()
        for place, output in zip(places, outputs, strict=True):
            plgpu.copy_smem_to_gmem(place.at[me], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_queries(call: Call, x: Inputs, at: KVScratch, b: Any, n: Any, plan: Plan) -> None:
    """The warpgroup that copies: the blocks of all heads of the group that need a mask, then the clear ones."""
    steps = plan.steps * call.group

    def copy(head: Any, step: Any, count: Any) -> Any:
        rows = pl.ds(plan.block(step) * BLOCK, BLOCK)
        slot, head = jax.lax.rem(count, jnp.int32(call.stages)), n * call.group + head
        pl.when(count >= call.stages)(lambda: plgpu.barrier_wait(at.q_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.q.at[b, rows, head], at.q.at[slot], at.q_full.at[slot])
        plgpu.copy_gmem_to_smem(x.lse.at[b, head, rows], at.lse.at[slot], at.q_full.at[slot])
        if x.q_ids is not None:
            plgpu.copy_gmem_to_smem(x.q_ids.at[b, rows], at.q_ids.at[slot], at.q_full.at[slot])
        pl.when(count >= call.stages)(lambda: plgpu.barrier_wait(at.g_free.at[slot]))
        plgpu.copy_gmem_to_smem(x.g.at[b, rows, head], at.g.at[slot], at.g_full.at[slot])
        plgpu.copy_gmem_to_smem(x.row_sums.at[b, head, rows], at.row_sums.at[slot], at.g_full.at[slot])
        return count + 1

    count = jnp.int32(0)
    for first, end in ((0, plan.masked), (plan.masked, plan.steps)):
        of_head = lambda head, count, first=first, end=end: jax.lax.fori_loop(first, end, functools.partial(copy, head), count)  # noqa: E731
        count = jax.lax.fori_loop(0, call.group, of_head, count)
    hopper.drain(call.stages, steps, at.q_free, at.g_free)


def _walk_over_queries(
    call: Call, wanted: tuple[bool, bool], at: KVScratch, me: Any, plan: Plan, position: Any, *summed: Any
) -> list[jax.Array]:
    """A warpgroup's gradients of keys, less the scale, and of values, as wanted. Scores are [keys, queries]."""
    of_k, of_v = wanted
    products = plgpu.ACC((ROWS, BLOCK), jnp.float32)
    options = call.options

    def meet(masked: bool, step: Any, count: Any) -> Any:
        slot = call.slot(count)

        mine = _mine(at, me, count)

        def scores(products: Any) -> jax.Array:
            plgpu.barrier_wait(at.q_full.at[slot])
            plgpu.wgmma(products, at.k.at[mine], at.q.at[slot].T)
            return products[...]

        logits, slopes = _logits(call, pl.run_scoped(scores, products))
        if masked:
            ids = None if at.q_ids is None else (at.kv_ids.at[me], at.q_ids.at[slot])
            logits = hopper.mask(logits, position, plan.masked_block(step) * BLOCK, options.right, options.left, None, ids)
        probs = jnp.exp2(logits * call.factor - _down(at.lse.at[slot], logits.shape))
        # Rounded before the next product starts, since no operand may change while one runs; with slopes, which need not be kept then.
        weights, rounded = jax.lax.optimization_barrier((_times(probs, slopes), probs.astype(at.g.dtype)))
        plgpu.barrier_wait(at.g_full.at[slot])
        if of_v:
            plgpu.wgmma(summed[-1], rounded, at.g.at[slot])
            if masked or slopes is not None:
                plgpu.wgmma_wait(0)  # the registers of the operand are needed

        def gradient_less_row_sums(products: Any) -> jax.Array:
            # Row sums are where the products start, for want of registers to hold them beside.
            products[...] = -_down(at.row_sums.at[slot], products.shape)
            plgpu.wgmma(products, at.v.at[mine], at.g.at[slot].T)
            return products[...]

        if of_k:
            gradient = weights * pl.run_scoped(gradient_less_row_sums, products)
            plgpu.wgmma(summed[0], gradient.astype(at.q.dtype), at.q.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(at.q_free.at[slot])
        plgpu.barrier_arrive(at.g_free.at[slot])
        return count + 1

    count = jnp.int32(0)
    if call.masked:
        of_head = lambda _, count: jax.lax.fori_loop(0, plan.masked, functools.partial(meet, True), count)  # noqa: E731
        count = jax.lax.fori_loop(0, call.group, of_head, count)
    jax.lax.fori_loop(count, plan.steps * call.group, lambda count, _: (meet(False, count, count), None)[1], None)
    return [plgpu.wgmma_accumulator_load(x) for x in summed]


def _mine(at: Any, me: Any, step: Any) -> Any:
    """`me`, but not seen to be the same in each step where matrices are so wide that their addresses, kept, would fill the registers."""
    return me if at.q.shape[-1] <= 128 else me + jnp.minimum(step, 0)


def _logits(call: Call, scores: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Logits less their factor, and their slopes under softcap."""
    logits = call.bounded(scores)
    return logits, None if call.options.softcap is None else 1.0 - logits * logits


def _times(probs: jax.Array, slopes: jax.Array | None) -> jax.Array:
    return probs if slopes is None else probs * slopes


def _down(numbers: Any, shape: tuple[int, int]) -> jax.Array:
    """A number to a column, from shared memory, for each of its rows."""
    return jax.lax.broadcast_in_dim(plgpu.layout_cast(numbers[...], BY_COLUMN), shape, [1])
