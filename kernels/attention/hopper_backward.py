"""The gradients of attention on NVIDIA Hopper GPUs: one kernel for that of q, another for those of
k and v.

Both have two warpgroups that compute and one that copies, as `hopper.py` has, whose masks and plans
they share. No program adds to what another one wrote, so sums have one order. The kernel for k and
v holds 128 keys, and walks over the queries of all heads that share them; `hopper_keys.py` has the
parts of it that are also in `hopper_fused.py`, which does the work of both kernels in one.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention import hopper
from moe.kernels.attention.hopper import BY_ROW, ROWS, Call, Inputs, Plan, across, matrices
from moe.kernels.attention.hopper_keys import (
    BLOCK,
    FEW_REGISTERS,
    MANY_REGISTERS,
    TILE,
    KVScratch,
    call_of,
    copy_keys,
    copy_queries,
    for_keys,
    gradient_of,
    kv_scratch,
    prepare,
    scores_of,
    slopes_of,
    times,
    unseen,
    weights_of,
    without_padding,
)
from moe.kernels.attention.masks import Options, clear_key_blocks, key_blocks


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
    """Gradients of q, k and v. `row_sums_BTN` is each query's sum of output times `g_BTNH`, less
    the gradient of its lse.
    """
    inputs = prepare(
        shift, q_BTNH, k_BSKH, v_BSKH, q_ids_BT, kv_ids_BS, lse_BTN, g_BTNH, row_sums_BTN
    )
    lengths, ids = (q_BTNH.shape[1], k_BSKH.shape[1]), (q_ids_BT, kv_ids_BS)
    of_q = _gradient_q(*_for_queries(options, shift, lengths, ids, inputs))
    of_k, of_v = _gradients_kv(*for_keys(options, shift, lengths, ids, inputs))
    return without_padding((of_q, of_k, of_v), (q_BTNH, k_BSKH, v_BSKH))


def _for_queries(
    options: Options, shift: Any, lengths: tuple[int, int], ids: tuple[Any, Any], inputs: Inputs
) -> tuple[Call, Inputs]:
    """What a kernel takes that holds a tile of queries."""
    blocks = TILE, _key_block(inputs.q.shape[3])
    of_mask = options, shift, lengths, blocks
    met = key_blocks(*of_mask, *ids)
    ranges = hopper.ranges_of(met, clear_key_blocks(*of_mask, met, *ids), len(inputs.q))
    return call_of(options, blocks, lengths, ids, inputs), inputs._replace(ranges=ranges)


def _key_block(width: int) -> int:
    """Keys at a time of the kernel for q: beside sums of 64 x 256, registers hold scores and
    gradients of 64 x 32.
    """
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
        walk = functools.partial(
            _walk_over_keys, call, at, me, plan, start + x.shift[0], lse, row_sums
        )
        gradient = pl.run_scoped(walk, plgpu.ACC((ROWS, output.shape[3]), jnp.float32))
        at.q[me] = (gradient * call.options.scale).astype(output.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.q.at[me], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _walk_over_keys(
    call: Call,
    at: QScratch,
    me: Any,
    plan: Plan,
    position: Any,
    lse: jax.Array,
    row_sums: jax.Array,
    summed: Any,
) -> jax.Array:
    """A warpgroup's gradients of queries, less the scale."""
    products = plgpu.ACC((ROWS, call.kv_block), jnp.float32)

    def await_keys(step: Any) -> None:
        pl.when(step < plan.steps)(lambda: plgpu.barrier_wait(at.k_full.at[call.slot(step)]))

    def meet(masked: bool, step: Any, _: None) -> None:
        slot, mine = call.slot(step), unseen(at, me, step)

        def both(scores: Any, gradient: Any) -> tuple[jax.Array, jax.Array]:
            plgpu.wgmma(scores, at.q.at[mine], at.k.at[slot].T)
            plgpu.barrier_wait(at.v_full.at[slot])
            plgpu.wgmma(gradient, at.g.at[mine], at.v.at[slot].T)
            logits = call.bounded(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            if masked:
                logits = hopper.mask_keys(call, at, me, position, plan, step, slot, logits)
            slopes = slopes_of(call, logits)
            weights = times(jnp.exp2(logits * call.factor - across(lse, logits.shape)), slopes)
            # As in the forward kernel, a branch keeps the exponentials before the wait for the
            # product that they overlap with.
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


def _gradients_kv(call: Call, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Both at once, or, where registers do not hold the sums of both (and the slopes of softcap),
    one after the other.
    """
    if inputs.k.shape[3] + inputs.v.shape[3] <= (256 if call.options.softcap is None else 192):
        return _kv_call(call, inputs, (True, True))
    return *_kv_call(call, inputs, (True, False)), *_kv_call(call, inputs, (False, True))


def _kv_call(call: Call, inputs: Inputs, wanted: tuple[bool, bool]) -> tuple[jax.Array, ...]:
    batch, length, heads, width = inputs.k.shape
    call = dataclasses.replace(call, stages=2 if width <= 192 else 1)
    return plgpu.kernel(
        functools.partial(_kv_kernel, call, wanted),
        out_type=tuple(
            jax.ShapeDtypeStruct(y.shape, y.dtype)
            for y, is_wanted in zip((inputs.k, inputs.v), wanted, strict=True)
            if is_wanted
        ),
        scratch_types=kv_scratch(call, inputs),
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
        copy_queries(call, x, at, b, n, hopper.read_plan(x.ranges, b, tile))

    @pl.when(me < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + me * ROWS
        rows = pl.ds(start, ROWS)
        copy_keys(x, at, b, n, me, rows)
        places = [place for place, is_wanted in zip((at.k, at.v), wanted, strict=True) if is_wanted]
        sums = [plgpu.ACC((ROWS, place.shape[-1]), jnp.float32) for place in places]
        walk = functools.partial(
            _walk_over_queries,
            call,
            wanted,
            at,
            me,
            hopper.read_plan(x.ranges, b, tile),
            start - x.shift[0],
        )
        gradients = pl.run_scoped(walk, *sums)
        for place, gradient, output in zip(places, gradients, outputs, strict=True):
            place[me] = (gradient * call.options.scale if place is at.k else gradient).astype(
                output.dtype
            )
        plgpu.commit_smem()
        for place, output in zip(places, outputs, strict=True):
            plgpu.copy_smem_to_gmem(place.at[me], output.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _walk_over_queries(
    call: Call,
    wanted: tuple[bool, bool],
    at: KVScratch,
    me: Any,
    plan: Plan,
    position: Any,
    *summed: Any,
) -> list[jax.Array]:
    """A warpgroup's gradients of keys, less the scale, and of values, as wanted. Scores are [keys,
    queries].
    """
    of_k, of_v = wanted
    products = plgpu.ACC((ROWS, BLOCK), jnp.float32)

    def meet(masked: bool, step: Any, count: Any) -> Any:
        slot, mine = call.slot(count), unseen(at, me, count)
        distance = position - plan.masked_block(step) * BLOCK if masked else None
        weights, rounded = weights_of(
            call,
            at,
            me,
            slot,
            distance,
            pl.run_scoped(functools.partial(scores_of, at, mine, slot), products),
        )
        plgpu.barrier_wait(at.g_full.at[slot])
        if of_v:
            plgpu.wgmma(summed[-1], rounded, at.g.at[slot])
            if masked or call.options.softcap is not None:
                plgpu.wgmma_wait(0)  # the registers of the operand are needed
        if of_k:
            gradient = weights * pl.run_scoped(
                functools.partial(gradient_of, at, mine, slot), products
            )
            plgpu.wgmma(summed[0], gradient.astype(at.q.dtype), at.q.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(at.q_free.at[slot])
        plgpu.barrier_arrive(at.g_free.at[slot])
        return count + 1

    count = jnp.int32(0)
    if call.masked:
        of_head = lambda _, count: jax.lax.fori_loop(
            0, plan.masked, functools.partial(meet, True), count
        )
        count = jax.lax.fori_loop(0, call.group, of_head, count)
    jax.lax.fori_loop(
        count, plan.steps * call.group, lambda count, _: (meet(False, count, count), None)[1], None
    )
    return [plgpu.wgmma_accumulator_load(x) for x in summed]
