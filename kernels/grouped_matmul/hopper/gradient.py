"""Computes the gradient of the experts' weights on Hopper GPUs: a sum over each expert's rows."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.grouped_matmul.hopper.pipeline import (
    PARAMS,
    ROWS,
    STEP,
    TILE,
    Index,
    Ref,
    Scratch,
    Tile,
    Tiling,
    Work,
    choose_tiling,
    multiply_tiles,
    num_programs,
    scratch,
    tile_in_bands,
)


def grouped_weight_gradient(
    rows_IK: jax.Array,
    grad_IO: jax.Array,
    experts_G: jax.Array,
    num_experts: int,
    *,
    columns: tuple[int, int] | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Returns the sum of `rowᵀ grad` over the rows of each expert, float32 [E, K, F].

    An expert without rows gives zeros. There are 128 rows to each of `experts_G`, which ascend, and
    rows of blocks without an expert are not read. `columns` are the first column of `grad_IO` and
    the number of them, F, that are used: by default all. Both numbers are multiples of 64. If K is
    no multiple of 128, the rows are copied to be padded.
    """
    dim = rows_IK.shape[1]
    if more := -dim % TILE:
        rows_IK = jnp.pad(rows_IK, [(0, 0), (0, more)])
        padded = grouped_weight_gradient(
            rows_IK, grad_IO, experts_G, num_experts, columns=columns, tiling=tiling
        )
        return padded[:, :dim]
    first_column, width = columns or (0, grad_IO.shape[1])
    tiling = choose_tiling(width, tiling)
    num_tiles = num_experts * (dim // TILE) * (width // tiling.columns)
    return plgpu.kernel(
        functools.partial(_kernel, tiling, first_column),
        out_type=jax.ShapeDtypeStruct((num_experts, dim, width), jnp.float32),
        scratch_types=scratch(
            tiling, (STEP, TILE), (STEP, tiling.columns), rows_IK.dtype, jnp.float32
        ),
        grid=(num_programs(num_tiles),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="grouped_weight_gradient",
        compiler_params=PARAMS,
    )(_ranges(experts_G, num_experts), rows_IK, grad_IO)


def _ranges(experts_G: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [E, 3]: an expert, its first block, and the one after its last block.

    The experts with the most blocks come first. So the tiles that run at the same time take about
    equally long, and no program is left with more work than the others at the end.
    """
    every_expert = jnp.arange(num_experts + 1, dtype=jnp.int32)
    # The number of blocks of lower experts. jnp.searchsorted would be a loop of small kernels.
    bounds = jnp.sum(experts_G < every_expert[:, None], axis=1, dtype=jnp.int32)
    first, end = bounds[:-1], bounds[1:]
    order = jnp.argsort(end - first, descending=True).astype(jnp.int32)
    return jnp.stack([order, first[order], end[order]], axis=1)


def _kernel(
    tiling: Tiling, first_column: int, ranges: Ref, rows: Ref, grad: Ref, output: Ref, *refs: Ref
) -> None:
    smem = Scratch(*refs)
    num_experts, dim, width = output.shape
    row_tiles, column_tiles = dim // TILE, width // tiling.columns
    per_expert = row_tiles * column_tiles

    def tile_of(index: Index) -> Tile:
        place = jax.lax.div(index, jnp.int32(per_expert))
        within = jax.lax.rem(index, jnp.int32(per_expert))
        row, column = tile_in_bands(within, row_tiles, column_tiles, tiling.band)
        expert, first, end = (ranges[place, i] for i in range(3))
        return Tile(expert, row, column, (end - first) * (TILE // STEP), first * TILE)

    def step_rows(tile: Tile, step: Index) -> Index:
        return pl.ds(tile.first_row + step * STEP, STEP)

    def left(tile: Tile, step: Index) -> list[tuple[Index, Ref]]:
        return [(True, rows.at[step_rows(tile, step), pl.ds(tile.row * TILE, TILE)])]

    def right(tile: Tile, step: Index) -> list[tuple[Index, Ref]]:
        columns = pl.ds(first_column + tile.column * tiling.columns, tiling.columns)
        return [(True, grad.at[step_rows(tile, step), columns])]

    def factors(warpgroup: Index, slot: Index) -> tuple[Ref, Ref]:
        own_columns = pl.ds(warpgroup * ROWS, ROWS)
        return smem.left.at[slot, :, own_columns].T, smem.right.at[slot]

    target = lambda tile, rows, columns: output.at[tile.expert, rows, columns]
    work = Work(num_experts * per_expert, tile_of, left, right, factors, target)
    multiply_tiles(work, tiling, smem)
