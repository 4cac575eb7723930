"""Takes the gradient of the experts' output back through `down` and the activation, on Hopper GPUs.

y = weight * (hidden w_down), so the gradient of `hidden` before the weight is applied also gives
the weight's own gradient: grad_y (hidden w_down) = (grad_y w_downᵀ) hidden. A tile's gate and up
come in parts (TMA). The first is copied while the tile is multiplied, and each of the others while
the one before it is computed with.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.grouped_matmul.activation import swiglu_of_pair
from moe.kernels.grouped_matmul.hopper.matmul import expert_tile
from moe.kernels.grouped_matmul.hopper.pipeline import (
    PARAMS,
    ROWS,
    STEP,
    SWIZZLE_COLUMNS,
    TILE,
    Copy,
    Index,
    Ref,
    Scratch,
    Tile,
    Tiling,
    Work,
    choose_tiling,
    matrices,
    multiply_tiles,
    num_programs,
    row_range,
    scratch,
    staging_plan,
    store_part,
)

PART = SWIZZLE_COLUMNS  # the columns of a part of a tile
# The shared memory for a part of gate and of up of both warpgroups, and for numbers of rows.
OTHER_BYTES = 2 * 2 * ROWS * PART * 2 + 2 * 2 * ROWS * 4
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class HiddenGradients(NamedTuple):
    """Holds what the kernel returns."""

    gate_up: jax.Array  # gradients of gate and up, side by side, [I, 2F]
    weighted: jax.Array  # silu(gate) * up, times the row's weight, [I, F]
    weights_I: jax.Array  # gradients of the rows' weights, float32


class Extra(NamedTuple):
    """The shared memory and the barriers beside those of `pipeline.Scratch`."""

    gate: Ref  # a part of each warpgroup
    up: Ref
    weights: Ref
    sums: Ref
    part_arrived: Ref  # one for each warpgroup, as is the next
    weights_arrived: Ref


def hidden_gradients(
    grad_ID: jax.Array,
    w_down_EFD: jax.Array,
    gate_up: jax.Array,
    weights_I: jax.Array,
    experts_G: jax.Array,
    *,
    tiling: Tiling | None = None,
) -> HiddenGradients:
    """Returns the gradients of gate, up and the rows' weights, from that of the rows' outputs.

    There are 128 rows to each of `experts_G`. D and F are multiples of 64.
    """
    num_rows, width, dtype = len(grad_ID), w_down_EFD.shape[1], grad_ID.dtype
    tiling = choose_tiling(width, tiling, OTHER_BYTES)
    column_tiles = width // tiling.columns
    per_warpgroup = (2, ROWS)
    extra = Extra(
        gate=matrices((*per_warpgroup, PART), dtype),
        up=matrices((*per_warpgroup, PART), dtype),
        weights=plgpu.SMEM(per_warpgroup, jnp.float32),
        sums=plgpu.SMEM(per_warpgroup, jnp.float32),
        part_arrived=plgpu.Barrier(num_barriers=2, num_arrivals=2),
        weights_arrived=plgpu.Barrier(num_barriers=2),
    )
    right = (tiling.columns, STEP)
    gradients = plgpu.kernel(
        functools.partial(_kernel, tiling),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, 2 * width), dtype),
            jax.ShapeDtypeStruct((num_rows, width), dtype),
            jax.ShapeDtypeStruct((column_tiles, num_rows), jnp.float32),
        ),
        scratch_types=(*scratch(tiling, (TILE, STEP), right, dtype, dtype), *extra),
        grid=(num_programs(num_rows // TILE * column_tiles),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="experts_hidden_gradients",
        compiler_params=PARAMS,
    )(experts_G, grad_ID, w_down_EFD, gate_up, weights_I)
    # Each tile has summed the products of its own columns.
    return HiddenGradients(*gradients[:2], jnp.sum(gradients[2], axis=0))


def _kernel(
    tiling: Tiling,
    experts: Ref,
    grad: Ref,
    w_down: Ref,
    gate_up: Ref,
    weights: Ref,
    *refs: Ref,
) -> None:
    outputs, smem = refs[:3], Scratch(*refs[3 : 3 + len(Scratch._fields)])
    extra = Extra(*refs[3 + len(Scratch._fields) :])
    (num_experts, width, _), dtype = w_down.shape, outputs[0].dtype
    row_tiles, column_tiles = grad.shape[0] // TILE, width // tiling.columns

    def copies(tile: Tile, step: Index, slot: Index) -> list[Copy]:
        steps = pl.ds(step * STEP, STEP)
        own_columns = pl.ds(tile.column * tiling.columns, tiling.columns)
        return [
            Copy(grad.at[pl.ds(tile.row * TILE, TILE), steps], smem.left.at[slot]),
            Copy(w_down.at[tile.expert, own_columns, steps], smem.right.at[slot]),
        ]

    def factors(warpgroup: Index, slot: Index) -> list[tuple[Ref, Ref]]:
        own_rows = pl.ds(warpgroup * ROWS, ROWS)
        return [(smem.left.at[slot, own_rows], smem.right.at[slot].T)]

    def copy_part(tile: Tile, warpgroup: Index, first: int) -> None:
        """Starts to copy the part of gate and of up that begins at a column of the tile."""
        column = tile.column * tiling.columns + first
        for target, start in ((extra.gate, column), (extra.up, width + column)):
            source = gate_up.at[row_range(tile, warpgroup), pl.ds(start, PART)]
            arrived = extra.part_arrived.at[warpgroup]
            plgpu.copy_gmem_to_smem(source, target.at[warpgroup], arrived)

    def begin(tile: Tile, warpgroup: Index) -> None:
        copy_part(tile, warpgroup, 0)
        source, target = weights.at[row_range(tile, warpgroup)], extra.weights.at[warpgroup]
        plgpu.copy_gmem_to_smem(source, target, extra.weights_arrived.at[warpgroup])

    def store(tile: Tile, warpgroup: Index, products: list[jax.Array]) -> None:
        own_rows = row_range(tile, warpgroup)
        plgpu.barrier_wait(extra.weights_arrived.at[warpgroup])
        weights_R = plgpu.layout_cast(extra.weights[warpgroup], BY_ROW)
        weight = jax.lax.broadcast_in_dim(weights_R, (ROWS, PART), [0])
        sums_R = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), BY_ROW)
        places = iter(staging_plan(3 * tiling.columns // PART, tiling.buffers))
        for first in range(0, tiling.columns, PART):
            plgpu.barrier_wait(extra.part_arrived.at[warpgroup])
            gate, up = extra.gate[warpgroup], extra.up[warpgroup]
            hidden, swiglu_backward = swiglu_of_pair(gate, up)
            unweighted = products[0][:, first : first + PART]
            sums_R += jnp.sum(unweighted * hidden, axis=1)
            results = (hidden * weight, *swiglu_backward(unweighted * weight))
            # All are rounded before anything is stored: registers do not hold them in float32.
            rounded = jax.lax.optimization_barrier(tuple(x.astype(dtype) for x in results))
            column = tile.column * tiling.columns + first
            targets = (outputs[1], column), (outputs[0], column), (outputs[0], width + column)
            for value, (output, place) in zip(rounded, targets, strict=True):
                target = output.at[own_rows, pl.ds(place, PART)]
                store_part(smem, warpgroup, next(places), value, target)
                # All threads have read gate and up when the first part has been staged.
                if output is outputs[1] and first + PART < tiling.columns:
                    copy_part(tile, warpgroup, first + PART)
        extra.sums[warpgroup] = sums_R
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(extra.sums.at[warpgroup], outputs[2].at[tile.column, own_rows])

    tile_of = functools.partial(
        expert_tile, experts, num_experts, grad.shape[1] // STEP, (row_tiles, column_tiles), tiling
    )
    work = Work(row_tiles * column_tiles, tile_of, copies, factors, store, begin=begin)
    multiply_tiles(work, tiling, smem)
