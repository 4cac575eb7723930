"""Prepares what the TPU kernels share: the experts of blocks, specs, sizes of tiles, and products.

Letters: G blocks, b the rows in a block, K a width that is summed over, O the width of an output.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# A reference to memory, and an index on a grid: Pallas has no public types for them.
Ref = Any
Index = Any

LANES = 128  # widths are padded to multiples of this
# A core of TPU v5p and TPU7x has 64 MiB of VMEM, and one of v5e and v6e 128. The compiler may take
# VMEM_LIMIT. Tiles are chosen to take VMEM_FOR_TILES, and the rest is for what it adds.
VMEM_LIMIT, VMEM_FOR_TILES = 60 * 2**20, 44 * 2**20
# The most multiplications of a step, in passes of 16 bits. The compiler unrolls them: so many take
# seconds to compile, and 2 to 5 µs to run on the chips that there are.
MOST_PRODUCTS = 1024**3
BUFFERS = 2  # of each operand: the pipeline fills one while the kernel reads the other


class BlockMap(NamedTuple):
    """The scalars that kernels over blocks of rows prefetch."""

    experts_G: jax.Array  # each block's expert; any expert for a block without one
    num_used_1: jax.Array  # the number of blocks that have an expert, which come first


def map_blocks(experts_G: jax.Array, num_experts: int) -> BlockMap:
    """Returns the map of blocks whose experts ascend, with E for none."""
    num_used = jnp.sum(experts_G < num_experts, dtype=jnp.int32)
    return BlockMap(jnp.minimum(experts_G, num_experts - 1), num_used.reshape(1))


def used_block(g: Index, num_used: Ref) -> Index:
    """Returns a block to read in step g: after the last used one this stays the block read."""
    return jnp.minimum(g, jnp.maximum(num_used[0] - 1, 0))


def block_expert(g: Index, experts: Ref, num_used: Ref) -> Index:
    """Returns the expert whose weights are read in step g."""
    return experts[used_block(g, num_used)]


def rows_spec(
    block_rows: int, width: int, tile: Callable[..., Index] | None = None
) -> pl.BlockSpec:
    """Returns the spec of rows that are read, [G, b, width], on a grid (tiles, blocks, ...).

    `tile` maps the grid's index to a tile of the rows' columns. Without it all are read.
    """

    def index(*grid: Any) -> tuple[Index, ...]:
        *indices, _, num_used = grid
        return used_block(indices[1], num_used), 0, tile(*indices) if tile else 0

    return pl.BlockSpec((None, block_rows, width), index)


def output_spec(block_rows: int, columns: int, tile: Callable[..., Index]) -> pl.BlockSpec:
    """Returns the spec of rows that are written, [G, b, columns of all tiles]."""
    return pl.BlockSpec((None, block_rows, columns), lambda *grid: (grid[1], 0, tile(*grid[:-2])))


class Kernel(NamedTuple):
    """A kernel, and what Pallas needs to run it."""

    name: str
    body: Callable[..., None]
    grid: tuple[int, ...]
    in_specs: Sequence[pl.BlockSpec]
    out_specs: pl.BlockSpec | tuple[pl.BlockSpec, ...]
    out_shapes: Any  # like `out_specs`
    parallel: int  # how many of the grid's first dimensions may be split over cores
    # What a call computes and reads. The compiler hides communication behind it by this estimate.
    flops: int
    bytes_read: int
    scratch: Sequence[Any] = ()


def run_kernel(
    kernel: Kernel, scalars: Sequence[jax.Array], arrays: Sequence[jax.Array], interpret: Any
) -> Any:
    """Runs a kernel; the scalars are prefetched."""
    sequential = len(kernel.grid) - kernel.parallel
    written = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kernel.out_shapes))
    run = pl.pallas_call(
        kernel.body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=kernel.grid,
            in_specs=kernel.in_specs,
            out_specs=kernel.out_specs,
            scratch_shapes=kernel.scratch,
        ),
        out_shape=kernel.out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * kernel.parallel + ("arbitrary",) * sequential,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=kernel.flops, transcendentals=0, bytes_accessed=kernel.bytes_read + written
        ),
        name=kernel.name,
        interpret=interpret,
    )
    return run(*scalars, *arrays)


def widest_tile(
    width: int, fixed_bytes: int, bytes_per_column: int, products_per_column: int
) -> int:
    """Returns the widest tile that divides a width and is within the limits, or 0 if none is.

    The wider a tile, the fewer times rows are fetched: once for each tile of an output's columns.
    """
    fits = [
        tile
        for tile in divisors(width)
        if fixed_bytes + tile * bytes_per_column <= VMEM_FOR_TILES
        and tile * products_per_column <= max(MOST_PRODUCTS, LANES * products_per_column)
    ]
    return max(fits, default=0)


def num_passes(dtype: jax.typing.DTypeLike) -> int:
    """Returns how many products of 16-bit numbers make one product of numbers of a dtype."""
    return 6 if dtype == jnp.float32 else 1


def divisors(width: int) -> list[int]:
    """Returns the multiples of 128 that divide a width."""
    return [tile for tile in range(LANES, width + 1, LANES) if width % tile == 0]


def nbytes(*arrays: jax.Array) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int) -> jax.Array:
    """Returns the product of two matrices over a dimension of each, summed in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_dim,), (y_dim,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
