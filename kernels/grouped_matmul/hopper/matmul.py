"""Multiplies rows that are grouped by expert with their experts' weights, on Hopper GPUs."""

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


def grouped_matmul(
    rows_IK: jax.Array,
    weights: tuple[jax.Array, ...],
    experts_G: jax.Array,
    *,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """Returns each row times the weights of its block's expert, [I, O]; zeros without an expert.

    `weights` are arrays [E, K, F] of one shape, which lie side by side: O is the sum of their
    widths. If `transposed`, they are [E, O, F], and the rows are multiplied by their transposes, so
    K is the sum of their widths. There are 128 rows to each of `experts_G`. K, O and F are
    multiples of 64. Sums are in float32, and the result is in `dtype`, by default that of the rows.
    """
    num_rows, _ = rows_IK.shape
    _, first_dim, last_dim = weights[0].shape
    width = first_dim if transposed else last_dim * len(weights)
    # A tile's columns belong to one weight.
    tiling = choose_tiling(first_dim if transposed else last_dim, tiling)
    output = jax.ShapeDtypeStruct((num_rows, width), dtype or rows_IK.dtype)
    right = (tiling.columns, STEP) if transposed else (STEP, tiling.columns)
    num_tiles = num_rows // TILE * (width // tiling.columns)
    return plgpu.kernel(
        functools.partial(_kernel, tiling, transposed, len(weights)),
        out_type=output,
        scratch_types=scratch(tiling, (TILE, STEP), right, rows_IK.dtype, output.dtype),
        grid=(num_programs(num_tiles),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
        compiler_params=PARAMS,
    )(experts_G, rows_IK, *weights)


def _kernel(
    tiling: Tiling, transposed: bool, num_weights: int, experts: Ref, rows: Ref, *refs: Ref
) -> None:
    weights, output, smem = refs[:num_weights], refs[num_weights], Scratch(*refs[num_weights + 1 :])
    num_experts, _, last_dim = weights[0].shape
    row_tiles, column_tiles = output.shape[0] // TILE, output.shape[1] // tiling.columns
    num_steps = rows.shape[1] // STEP

    def tile_of(index: Index) -> Tile:
        row, column = tile_in_bands(index, row_tiles, column_tiles, tiling.band)
        expert = experts[row]
        return Tile(expert, row, column, jnp.where(expert < num_experts, num_steps, 0))

    def left(tile: Tile, step: Index) -> list[tuple[Index, Ref]]:
        block = rows.at[pl.ds(tile.row * TILE, TILE), pl.ds(step * STEP, STEP)]
        return [(True, block)]

    def right(tile: Tile, step: Index) -> list[tuple[Index, Ref]]:
        """Returns the block of each weight, of which one lies in the tile's step."""
        size = STEP if transposed else tiling.columns
        per_weight = last_dim // size
        index = step if transposed else tile.column
        other = pl.ds(tile.column * tiling.columns, tiling.columns)
        if not transposed:
            other = pl.ds(step * STEP, STEP)
        sources = []
        for i, weight in enumerate(weights):
            place = index - i * per_weight
            block = weight.at[tile.expert, other, pl.ds(place * size, size)]
            is_here = (place >= 0) & (place < per_weight)
            sources.append((True if num_weights == 1 else is_here, block))
        return sources

    def factors(warpgroup: Index, slot: Index) -> tuple[Ref, Ref]:
        left_factor = smem.left.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
        right_factor = smem.right.at[slot]
        return left_factor, right_factor.T if transposed else right_factor

    target = lambda tile, rows, columns: output.at[rows, columns]
    work = Work(row_tiles * column_tiles, tile_of, left, right, factors, target)
    multiply_tiles(work, tiling, smem)
