"""Computes the gradient of the experts' weights on TPUs: a sum over each expert's rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe.kernels.grouped_matmul.tpu.blocks import (
    LANES,
    Index,
    Kernel,
    Ref,
    divisors,
    dot,
    nbytes,
    run_kernel,
)

# The most rows and columns of a tile. A tile of 1024 x 1024 gives 512 FLOPs for each byte that is
# fetched of its 16-bit operands, and takes 12 MiB: two buffers, and a product to be added.
LARGEST_TILE = 1024


class Visits(NamedTuple):
    """The steps over blocks of rows. They are the scalars that the kernel prefetches.

    Each expert's blocks are visited in a run. An expert without rows is visited once, to write
    zeros, and the last steps may do nothing.
    """

    experts: jax.Array
    blocks: jax.Array
    is_first: jax.Array  # whether a visit is the expert's first one, 0 or 1
    has_rows: jax.Array  # whether a visit adds a block to the sum, 0 or 1


def plan_visits(experts_G: jax.Array, num_experts: int) -> Visits:
    """Returns the visits, of which there are G + E, whatever the experts' loads."""
    num_blocks, every_expert = experts_G.size, jnp.arange(num_experts, dtype=jnp.int32)
    blocks_E = jnp.sum(experts_G == every_expert[:, None], axis=1, dtype=jnp.int32)
    visits_E = jnp.maximum(blocks_E, 1)
    ends_E = jnp.cumsum(visits_E, dtype=jnp.int32)
    steps = jnp.arange(num_blocks + num_experts, dtype=jnp.int32)
    # The number of experts whose visits have ended. jnp.searchsorted would be a loop.
    experts = jnp.sum(ends_E <= steps[:, None], axis=1, dtype=jnp.int32)
    is_visit = experts < num_experts
    experts = jnp.minimum(experts, num_experts - 1)
    place = steps - (ends_E - visits_E)[experts]
    first_block = (jnp.cumsum(blocks_E, dtype=jnp.int32) - blocks_E)[experts]
    # The steps after the last visit stay at the last block, so that nothing is fetched.
    num_used = jnp.sum(blocks_E, dtype=jnp.int32)
    blocks = jnp.minimum(first_block + place, jnp.maximum(num_used - 1, 0))
    is_first, has_rows = is_visit & (place == 0), is_visit & (place < blocks_E[experts])
    return Visits(experts, blocks, is_first.astype(jnp.int32), has_rows.astype(jnp.int32))


def grouped_weight_gradient(
    rows_GbK: jax.Array,
    grad_GbO: jax.Array,
    visits: Visits,
    num_experts: int,
    interpret: bool = False,
) -> jax.Array:
    """Returns the sum of `rowᵀ grad` over the rows of each expert, float32 [E, K, O].

    An expert without rows gives zeros, and rows of blocks without an expert are not read.
    """
    (_, block_rows, dim), width = rows_GbK.shape, grad_GbO.shape[2]
    tile_rows, tile_columns = choose_tile(dim, width)
    num_steps, num_tiles = len(visits.experts), (dim // tile_rows, width // tile_columns)

    def rows_index(i: Index, j: Index, step: Index, _: Ref, blocks: Ref, *__: Ref) -> tuple:
        return blocks[step], 0, i

    def grad_index(i: Index, j: Index, step: Index, _: Ref, blocks: Ref, *__: Ref) -> tuple:
        return blocks[step], 0, j

    def output_index(i: Index, j: Index, step: Index, experts: Ref, *_: Ref) -> tuple:
        return experts[step], i, j

    kernel = Kernel(
        "experts_weight_gradient",
        _kernel,
        (*num_tiles, num_steps),
        in_specs=[
            pl.BlockSpec((None, block_rows, tile_rows), rows_index),
            pl.BlockSpec((None, block_rows, tile_columns), grad_index),
        ],
        out_specs=pl.BlockSpec((None, tile_rows, tile_columns), output_index),
        out_shapes=jax.ShapeDtypeStruct((num_experts, dim, width), jnp.float32),
        parallel=2,
        flops=2 * rows_GbK.size * width,
        bytes_read=num_tiles[1] * nbytes(rows_GbK) + num_tiles[0] * nbytes(grad_GbO),
    )
    return run_kernel(kernel, visits, (rows_GbK, grad_GbO), interpret)


def choose_tile(dim: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns of a tile: the most that divide the widths.

    There are at least two tiles, if possible, since a v5p shares them between its two cores.
    """
    rows, columns = (
        max(tile for tile in divisors(size) if tile <= LARGEST_TILE) for size in (dim, width)
    )
    if (rows, columns) == (dim, width) and dim > LANES:
        rows = max(tile for tile in divisors(dim) if tile < dim)
    return rows, columns


def _kernel(
    experts: Ref,
    blocks: Ref,
    is_first: Ref,
    has_rows: Ref,
    rows: Ref,
    grad: Ref,
    output: Ref,
) -> None:
    step = pl.program_id(2)

    # An expert's tile stays in VMEM through the expert's visits, and is the sum itself.
    @pl.when(is_first[step] == 1)
    def _() -> None:
        output[...] = jnp.zeros_like(output)

    @pl.when(has_rows[step] == 1)
    def _() -> None:
        output[...] += dot(rows[...], grad[...], 0, 0)
