"""The gradients of attention on NVIDIA Hopper GPUs in one kernel, of 5 products a block where those
of `hopper_backward.py` have 7 in two.

A program holds 128 keys and walks over blocks of 64 queries, as the kernel for k and v does there.
As FlashAttention-3 (Shah et al. 2024) does, it computes what its keys contribute to the gradients
of the queries, too, and adds that to float32 sums in global memory, by a copy (TMA) that adds.
Programs add in any order: a sum's last bits differ from run to run.

A warpgroup has 64 keys. The gradients of its scores go to shared memory, where both meet: then each
multiplies those of all 128 keys with a half of the keys' columns.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention import hopper, hopper_keys
from moe.kernels.attention.hopper import ROWS, Call, Inputs, Plan, matrices
from moe.kernels.attention.hopper_keys import BLOCK, FEW_REGISTERS, MANY_REGISTERS, TILE, KVScratch
from moe.kernels.attention.masks import Options


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
    """Gradients of q, k and v, of widths up to 128: as `hopper_backward.backward`."""
    arrays = q_BTNH, k_BSKH, v_BSKH
    lengths, ids = (q_BTNH.shape[1], k_BSKH.shape[1]), (q_ids_BT, kv_ids_BS)
    inputs = hopper_keys.prepare(shift, *arrays, *ids, lse_BTN, g_BTNH, row_sums_BTN)
    call, inputs = hopper_keys.for_keys(options, shift, lengths, ids, inputs)
    batch, length, heads, _ = inputs.k.shape
    summed = jax.new_ref(jnp.zeros(inputs.q.shape, jnp.float32), memory_space=plgpu.GMEM)
    of_k, of_v = pl.kernel(
        functools.partial(_scoped, call),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs.k, inputs.v)),
        mesh=plgpu.Mesh(
            grid=(batch, length // TILE, heads),
            grid_names=("batch", "tile", "head"),
            num_threads=3,
            thread_name="warpgroup",
        ),
        compiler_params=hopper.PARAMS,
    )(inputs, summed)
    of_q = (jax.freeze(summed) * options.scale).astype(q_BTNH.dtype)
    return hopper_keys.without_padding((of_q, of_k, of_v), arrays)


def _scoped(call: Call, x: Inputs, *refs: Any) -> None:
    """The kernel with its shared memory. `plgpu.kernel`, which would allocate that, takes no
    reference to an array to be added to.
    """
    # Tiles as wide as the half of the columns that a warpgroup takes.
    half = x.k.shape[3] // 2
    pl.run_scoped(
        functools.partial(_kernel, call, x, *refs),
        hopper_keys.kv_scratch(call, x, columns=half),
        # One for each block in flight, so that a warpgroup may fill the next while the other one
        # reads the last.
        matrices((call.stages, 2, ROWS, BLOCK), x.k.dtype, columns=half),
        plgpu.SMEM(
            (2, BLOCK, half),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        ),
        plgpu.Barrier(num_barriers=1, num_arrivals=2),
        collective_axes="warpgroup",
    )


def _kernel(
    call: Call,
    x: Inputs,
    of_q: Any,
    of_k: Any,
    of_v: Any,
    at: KVScratch,
    of_scores: Any,
    staged: Any,
    exchanged: Any,
) -> None:
    b, tile, n, me = (jax.lax.axis_index(name) for name in ("batch", "tile", "head", "warpgroup"))
    exchanged = exchanged.at[0]

    @pl.when(me == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        hopper_keys.copy_queries(call, x, at, b, n, hopper.read_plan(x.ranges, b, tile))

    @pl.when(me < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")
        start = tile * TILE + me * ROWS
        rows = pl.ds(start, ROWS)
        hopper_keys.copy_keys(x, at, b, n, me, rows)

        def add(mine: Any, head: Any, block: Any, share: jax.Array) -> None:
            """To a block of queries, a half of the columns of their gradients."""
            half = share.shape[1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[mine] = share
            plgpu.commit_smem()
            place = of_q.at[
                b, pl.ds(block * BLOCK, BLOCK), n * call.group + head, pl.ds(mine * half, half)
            ]
            plgpu.copy_smem_to_gmem(staged.at[mine], place, reduction_op="add")

        plan = hopper.read_plan(x.ranges, b, tile)
        walk = functools.partial(
            _walk_over_queries, call, at, of_scores, exchanged, me, plan, start - x.shift[0], add
        )
        gradients = pl.run_scoped(
            walk, *(plgpu.ACC((ROWS, y.shape[3]), jnp.float32) for y in (x.k, x.v))
        )
        # The other warpgroup reads these keys until it has done its last product.
        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        at.k[me] = (gradients[0] * call.options.scale).astype(at.k.dtype)
        at.v[me] = gradients[1].astype(at.v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(at.k.at[me], of_k.at[b, rows, n])
        plgpu.copy_smem_to_gmem(at.v.at[me], of_v.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _walk_over_queries(
    call: Call,
    at: KVScratch,
    of_scores: Any,
    exchanged: Any,
    me: Any,
    plan: Plan,
    position: Any,
    add: Any,
    of_k: Any,
    of_v: Any,
) -> tuple[jax.Array, jax.Array]:
    """A warpgroup's gradients of keys, less the scale, and of values; `add` takes a half of the
    columns of those of a block of queries.
    """
    products = plgpu.ACC((ROWS, BLOCK), jnp.float32)
    half = at.k.shape[-1] // 2

    def meet(masked: bool, head: Any, step: Any, count: Any) -> Any:
        slot = call.slot(count)
        mine = me + jnp.minimum(count, 0)  # as in `hopper_keys.unseen`, of all widths
        pair = of_scores.at[slot]
        scores = pl.run_scoped(functools.partial(hopper_keys.scores_of, at, mine, slot), products)
        distance = position - plan.masked_block(step) * BLOCK if masked else None
        weights, rounded = hopper_keys.weights_of(call, at, mine, slot, distance, scores)
        plgpu.barrier_wait(at.g_full.at[slot])
        plgpu.wgmma(of_v, rounded, at.g.at[slot])
        if masked or call.options.softcap is not None:
            plgpu.wgmma_wait(0)  # the registers of the operand are needed
        gradient = weights * pl.run_scoped(
            functools.partial(hopper_keys.gradient_of, at, mine, slot), products
        )
        rounded = gradient.astype(at.q.dtype)
        pair[mine] = rounded
        plgpu.commit_smem()
        plgpu.barrier_arrive(exchanged)
        plgpu.wgmma(of_k, rounded, at.q.at[slot])
        plgpu.barrier_wait(exchanged)

        def share_of_queries(products: Any) -> jax.Array:
            for i in range(2):
                plgpu.wgmma(products, pair.at[i].T, at.k.at[i, :, pl.ds(mine * half, half)])
            return products[...]

        share = pl.run_scoped(share_of_queries, plgpu.ACC((BLOCK, half), jnp.float32))
        plgpu.barrier_arrive(at.q_free.at[slot])
        plgpu.barrier_arrive(at.g_free.at[slot])
        add(mine, head, plan.masked_block(step) if masked else plan.block(step), share)
        return count + 1

    hopper_keys.over_heads(call, plan, meet)
    return plgpu.wgmma_accumulator_load(of_k), plgpu.wgmma_accumulator_load(of_v)
