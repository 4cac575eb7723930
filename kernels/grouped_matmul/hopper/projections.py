"""Multiplies rows by their experts' gate and up on Hopper GPUs, with the activation at the end."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.grouped_matmul.hopper.matmul import expert_tile
from moe.kernels.grouped_matmul.hopper.pipeline import (
    PARAMS,
    ROWS,
    STEP,
    TILE,
    Copy,
    Index,
    Ref,
    Scratch,
    Tile,
    Tiling,
    Work,
    choose_tiling,
    multiply_tiles,
    num_programs,
    row_range,
    scratch,
    staging_plan,
    store_part,
)

LOG2E = math.log2(math.e)


def project(
    rows_IK: jax.Array,
    w_gate_EKF: jax.Array,
    w_up_EKF: jax.Array,
    experts_G: jax.Array,
    *,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns gate and up side by side, [I, 2F], and silu(gate) * up, [I, F].

    The activation is computed from gate and up as they are rounded. There are 128 rows to each of
    `experts_G`; rows without an expert give zeros. K and F are multiples of 64.
    """
    num_rows, width = len(rows_IK), w_gate_EKF.shape[2]
    # A tile has as many columns of gate as of up.
    tiling = choose_tiling(2 * width, tiling)
    dtype = rows_IK.dtype
    return plgpu.kernel(
        functools.partial(_kernel, tiling),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, 2 * width), dtype),
            jax.ShapeDtypeStruct((num_rows, width), dtype),
        ),
        scratch_types=scratch(
            tiling, (TILE, STEP), (2, STEP, tiling.columns // 2), dtype, dtype, copies=3
        ),
        grid=(num_programs(num_rows // TILE * (2 * width // tiling.columns)),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="experts_projections",
        compiler_params=PARAMS,
    )(experts_G, rows_IK, w_gate_EKF, w_up_EKF)


def _kernel(
    tiling: Tiling,
    experts: Ref,
    rows: Ref,
    w_gate: Ref,
    w_up: Ref,
    gate_up: Ref,
    hidden: Ref,
    *refs: Ref,
) -> None:
    smem, half = Scratch(*refs), tiling.columns // 2
    (num_experts, _, width), part = w_gate.shape, smem.staged.shape[-1]
    row_tiles, column_tiles = gate_up.shape[0] // TILE, width // half

    def copies(tile: Tile, step: Index, slot: Index) -> list[Copy]:
        steps = pl.ds(step * STEP, STEP)
        own_columns = pl.ds(tile.column * half, half)
        return [
            Copy(rows.at[pl.ds(tile.row * TILE, TILE), steps], smem.left.at[slot]),
            Copy(w_gate.at[tile.expert, steps, own_columns], smem.right.at[slot, 0]),
            Copy(w_up.at[tile.expert, steps, own_columns], smem.right.at[slot, 1]),
        ]

    def factors(warpgroup: Index, slot: Index) -> list[tuple[Ref, Ref]]:
        left = smem.left.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
        return [(left, smem.right.at[slot, which]) for which in range(2)]

    def store(tile: Tile, warpgroup: Index, products: list[jax.Array]) -> None:
        own_rows = row_range(tile, warpgroup)
        places = iter(staging_plan(3 * half // part, tiling.buffers))
        for first in range(0, half, part):
            gate, up = (x[:, first : first + part].astype(hidden.dtype) for x in products)
            column = tile.column * half + first
            for value, output, place in (
                (gate, gate_up, column),
                (up, gate_up, width + column),
                (_activate(gate, up), hidden, column),
            ):
                target = output.at[own_rows, pl.ds(place, part)]
                store_part(smem, warpgroup, next(places), value, target)

    tile_of = functools.partial(
        expert_tile, experts, num_experts, rows.shape[1] // STEP, (row_tiles, column_tiles), tiling
    )
    work = Work(row_tiles * column_tiles, tile_of, copies, factors, store, num_products=2)
    multiply_tiles(work, tiling, smem)


def _activate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, in float32.

    It is written so that the compiler holds it in few registers: with jnp.exp, or a reciprocal of
    its own, the kernel spills some.
    """
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return gate * up / (1 + jnp.exp2(gate * -LOG2E))
