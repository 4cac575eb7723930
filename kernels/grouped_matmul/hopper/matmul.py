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
    store_tile,
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

    def copies(tile: Tile, step: Index, slot: Index) -> list[Copy]:
        """Returns the copies of the rows, and of the weight that lies in the tile's step."""
        block = rows.at[pl.ds(tile.row * TILE, TILE), pl.ds(step * STEP, STEP)]
        size = STEP if transposed else tiling.columns
        per_weight = last_dim // size
        index = step if transposed else tile.column
        other = pl.ds(tile.column * tiling.columns, tiling.columns)
        if not transposed:
            other = pl.ds(step * STEP, STEP)
        found = [Copy(block, smem.left.at[slot])]
        for i, weight in enumerate(weights):
            place = index - i * per_weight
            source = weight.at[tile.expert, other, pl.ds(place * size, size)]
            is_here = (place >= 0) & (place < per_weight)
            found.append(Copy(source, smem.right.at[slot], True if num_weights == 1 else is_here))
        return found

    def factors(warpgroup: Index, slot: Index) -> list[tuple[Ref, Ref]]:
        left_factor = smem.left.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
        right_factor = smem.right.at[slot]
        return [(left_factor, right_factor.T if transposed else right_factor)]

    def store(tile: Tile, warpgroup: Index, products: list[jax.Array]) -> None:
        own_rows = row_range(tile, warpgroup)
        store_tile(
            tiling, smem, lambda columns: output.at[own_rows, columns], tile, warpgroup, products[0]
        )

    tile_of = functools.partial(
        expert_tile, experts, num_experts, rows.shape[1] // STEP, (row_tiles, column_tiles), tiling
    )
    work = Work(row_tiles * column_tiles, tile_of, copies, factors, store)
    multiply_tiles(work, tiling, smem)


def expert_tile(
    experts: Ref,
    num_experts: int,
    num_steps: int,
    shape: tuple[int, int],
    tiling: Tiling,
    index: Index,
) -> Tile:
    """Returns a tile of rows that are grouped by expert. `shape` counts the output's tiles."""
    row, column = tile_in_bands(index, *shape, tiling.band)
    expert = experts[row]
    return Tile(expert, row, column, jnp.where(expert < num_experts, num_steps, 0))
