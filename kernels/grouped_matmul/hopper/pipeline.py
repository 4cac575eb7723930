"""Multiplies tiles on Hopper GPUs: what the grouped matmul and the weight gradient share.

A program stays on its multiprocessor and takes one tile of the output after another. One of its
three warpgroups copies (TMA) the operands of the next steps into a ring of buffers, also while the
other two still store the last tile. Those two multiply, each 64 of the 128 rows of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# A reference to memory or to barriers, and an index on a grid: Pallas has no public types for them.
Ref = Any
Index = Any

ROWS = 64  # the rows of a warpgroup, which are the height of a wgmma product
TILE = 2 * ROWS  # the rows of a tile, and of a block of rows
STEP = 64  # the length of the sum that one step adds to a tile
# The programs that share the tiles. H100 and H200 have 132 multiprocessors. Where there are fewer,
# the last programs wait for the first ones.
PROGRAMS = 132
# The columns of 16-bit numbers, and bytes, in a row of the swizzled layout that wgmma reads.
SWIZZLE_COLUMNS, SWIZZLE_BYTES = 64, 128
# The bytes of a multiprocessor's shared memory for the operands' ring. Staging takes 32 KiB more.
RING_BYTES = 192 * 1024
# Each thread starts with 168 registers. The warpgroup that copies gives up all but 24 of them, so
# that the two that compute can have 240.
FEW_REGISTERS, MANY_REGISTERS = 24, 240
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Tiling(NamedTuple):
    """How a kernel cuts its output into tiles, and its sums into steps."""

    columns: int  # of a tile
    stages: int  # the buffers of the ring
    band: int  # how many tiles of one column follow one another before the next column
    buffers: int = 2  # of each warpgroup, from which parts of a tile are copied out


def choose_tiling(width: int, wanted: Tiling | None = None) -> Tiling:
    """Returns the tiling of an output whose width is a multiple of 64: `wanted`, if it is given.

    Wide tiles load the fewest bytes for a FLOP. All columns belong to whole tiles, so another
    tiling raises ValueError.
    """
    if wanted is not None:
        if width % wanted.columns:
            raise ValueError(f"tiles of {wanted.columns} columns do not divide a width of {width}")
        return wanted
    columns = next(columns for columns in (256, 192, 128, 64) if width % columns == 0)
    bytes_of_stage = 2 * STEP * (TILE + columns)
    return Tiling(columns, stages=min(8, RING_BYTES // bytes_of_stage), band=16)


class Scratch(NamedTuple):
    """The shared memory of a program, and its barriers."""

    left: Ref  # ring
    right: Ref  # ring
    staged: Ref  # the buffers of each warpgroup, from which parts of a tile are copied out
    full: Ref  # completes when both operands of a step have arrived
    free: Ref  # completes when both warpgroups have read a buffer


def scratch(
    tiling: Tiling, left: tuple[int, int], right: tuple[int, int], dtype: Any, output_dtype: Any
) -> Scratch:
    """Returns the scratch, for the shapes of the operands of one step."""
    staged_columns = SWIZZLE_BYTES // jnp.dtype(output_dtype).itemsize
    return Scratch(
        left=_matrices((tiling.stages, *left), dtype),
        right=_matrices((tiling.stages, *right), dtype),
        staged=_matrices((2, tiling.buffers, ROWS, staged_columns), output_dtype),
        full=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=2),
        free=plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=2),
    )


def _matrices(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory for matrices, in the tiled and swizzled layout that wgmma reads."""
    columns = SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(SWIZZLE_BYTES)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Tile(NamedTuple):
    """A tile of the output, by its place in the output in tiles."""

    expert: Index
    row: Index
    column: Index
    steps: Index  # of its sum; 0 gives zeros
    first_row: Index = 0  # of the rows that it sums over, in a weight gradient


class Work(NamedTuple):
    """Describes to `multiply_tiles` what a kernel computes."""

    num_tiles: int
    tile: Callable[[Index], Tile]  # tile(index)
    # sources(tile, step) -> the operands of a step in global memory, with the condition under which
    # each is the right one, or True.
    left: Callable[[Tile, Index], list[tuple[Any, Ref]]]
    right: Callable[[Tile, Index], list[tuple[Any, Ref]]]
    # factors(warpgroup, slot) -> the operands of a warpgroup's product in shared memory.
    factors: Callable[[Index, Index], tuple[Ref, Ref]]
    # target(tile, rows, columns) -> a part of the output in global memory.
    target: Callable[[Tile, Index, Index], Ref]


def tile_in_bands(index: Index, rows: int, columns: int, band: int) -> tuple[Index, Index]:
    """Returns row and column of a tile, in the order in which programs take tiles.

    `band` tiles of one column come first, then as many of the next column. So programs that run at
    the same time share operands, and find them in the cache.
    """
    band_index = jax.lax.div(index, jnp.int32(band * columns))
    within = jax.lax.rem(index, jnp.int32(band * columns))
    first = band_index * band
    height = jnp.minimum(rows - first, band)  # the last band may have fewer rows
    return first + jax.lax.rem(within, height), jax.lax.div(within, height)


def num_programs(num_tiles: int) -> int:
    return min(PROGRAMS, num_tiles)


def multiply_tiles(work: Work, tiling: Tiling, smem: Scratch) -> None:
    """Computes all tiles of a program, inside a kernel of three warpgroups."""
    program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
    programs = jnp.int32(num_programs(work.num_tiles))
    own_tiles = jax.lax.div(jnp.int32(work.num_tiles - 1) - program, programs) + 1

    def visit_tiles(visit: Callable[[Tile, Index], None]) -> Index:
        """Calls visit(tile, steps taken before), and returns the number of steps of all tiles."""

        def body(i: Index, count: Index) -> Index:
            tile = work.tile(program + i * programs)
            visit(tile, count)
            return count + tile.steps

        return jax.lax.fori_loop(0, own_tiles, body, jnp.int32(0))

    # The warpgroup that copies.
    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
        count = visit_tiles(functools.partial(_copy_operands, work, tiling, smem))
        # JAX's interpreter demands that nobody leaves a phase of a barrier unawaited.
        for slot in range(tiling.stages):
            pl.when(slot < count)(functools.partial(plgpu.barrier_wait, smem.free.at[slot]))

    # The warpgroups that compute.
    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(MANY_REGISTERS, action="increase")

        def compute_tile(tile: Tile, count: Index) -> None:
            values = pl.run_scoped(
                functools.partial(_multiply, work, tiling, smem, warpgroup, tile.steps, count),
                plgpu.ACC((ROWS, tiling.columns), jnp.float32),
            )
            _store(work, tiling, smem, warpgroup, tile, values)

        visit_tiles(compute_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_operands(work: Work, tiling: Tiling, smem: Scratch, tile: Tile, count: Index) -> None:
    """Copies the operands of a tile's steps into the ring."""

    @pl.loop(0, tile.steps)
    def _(step: Index) -> None:
        slot = _slot(tiling, count + step)
        # From the second round of the ring on, a buffer must be free before it is written again.
        is_reused = count + step >= tiling.stages
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.free.at[slot]))
        for sources, ring in ((work.left, smem.left), (work.right, smem.right)):
            for condition, source in sources(tile, step):
                copy = functools.partial(
                    plgpu.copy_gmem_to_smem, source, ring.at[slot], smem.full.at[slot]
                )
                copy() if condition is True else pl.when(condition)(copy)


def _multiply(
    work: Work,
    tiling: Tiling,
    smem: Scratch,
    warpgroup: Index,
    steps: Index,
    count: Index,
    accumulator: Ref,
) -> jax.Array:
    """Returns a warpgroup's rows of a tile, in float32."""

    def release(step: Index) -> None:
        plgpu.barrier_arrive(smem.free.at[_slot(tiling, count + step)])

    @pl.loop(0, steps)
    def _(step: Index) -> None:
        slot = _slot(tiling, count + step)
        plgpu.barrier_wait(smem.full.at[slot])
        plgpu.wgmma(accumulator, *work.factors(warpgroup, slot))
        # The product of the last step has ended when only the new one is left. So the tensor cores
        # always have a product to go on with.
        plgpu.wgmma_wait(1)
        pl.when(step > 0)(lambda: release(step - 1))

    values = plgpu.wgmma_accumulator_load(accumulator)  # waits for the last product
    pl.when(steps > 0)(lambda: release(steps - 1))
    return values


def _store(
    work: Work, tiling: Tiling, smem: Scratch, warpgroup: Index, tile: Tile, values: jax.Array
) -> None:
    """Writes a warpgroup's rows of a tile, in parts that are as wide as a staging buffer."""
    rows, width = tile.row * TILE + warpgroup * ROWS, smem.staged.shape[-1]
    parts = staging_plan(values.shape[1] // width, tiling.buffers)
    for part, (buffer, most_unread) in enumerate(parts):
        staged = smem.staged.at[warpgroup, buffer]
        plgpu.wait_smem_to_gmem(most_unread, wait_read_only=True)
        staged[...] = values[:, part * width : (part + 1) * width].astype(staged.dtype)
        plgpu.commit_smem()
        column = tile.column * values.shape[1] + part * width
        plgpu.copy_smem_to_gmem(staged, work.target(tile, pl.ds(rows, ROWS), pl.ds(column, width)))


def staging_plan(num_parts: int, buffers: int) -> list[tuple[int, int]]:
    """Returns the buffer of each part of a tile, and how many copies may be unread before it.

    The buffers are taken in turn, so a buffer is free when all copies but those from the other
    buffers have read theirs. If a tile's parts are no whole number of turns, its first part waits
    for all copies of the tile before.
    """
    plan = [(part % buffers, buffers - 1) for part in range(num_parts)]
    return plan if num_parts % buffers == 0 else [(0, 0), *plan[1:]]


def _slot(tiling: Tiling, step: Index) -> Index:
    """Returns the buffer of the ring that a step uses, counted over all tiles of a program."""
    return jax.lax.rem(step, jnp.int32(tiling.stages))
