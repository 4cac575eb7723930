"""Prepares what the Hopper kernels share: operands, the blocks of a tile, masks and layouts."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import BlockRange

# A reference to memory or to barriers, and an index on a grid: Pallas has no public types for them.
Ref = Any
Index = Any

ROWS = 64  # the rows of a warpgroup, which are the height of a wgmma product
TILE = 2 * ROWS  # the rows of a program's two warpgroups that compute
LOG2E = math.log2(math.e)
# How the registers of a warpgroup hold a matrix, and a vector with one number for each of its rows
# or columns.
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
# Each thread starts with 168 registers. The warpgroup that copies gives up all but 24 of them, so
# that the two that compute can have 240.
FEW_REGISTERS, MANY_REGISTERS = 24, 240
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Operands(NamedTuple):
    """A kernel's arrays, or the references to them.

    Lengths are whole blocks and widths multiples of 64.
    """

    ranges: Ref  # int32 [B, tiles, 4]: see `TileBlocks`
    shift: Ref  # int32 [1]
    q: Ref  # [B, T, N, H]
    k: Ref  # [B, S, K, H]
    v: Ref
    q_ids: Ref = None  # int32 [B, T]
    kv_ids: Ref = None
    sinks: Ref = None  # float32 [N]
    dout: Ref = None  # [B, T, N, H]
    lse: Ref = None  # float32 [B, N, T], in base 2
    delta: Ref = None  # float32 [B, N, T]


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """The static arguments of a kernel."""

    options: Options
    q_block: int
    kv_block: int
    stages: int  # the buffers of a ring
    kv_length: int  # the keys that are no padding
    group: int  # query heads that share a key/value head
    masked: bool  # whether any block may need a mask

    @property
    def logit_factor(self) -> float:
        """Returns the factor that turns the result of `unscaled_logits` into logits in base 2.

        The factor is positive, so the running maximum can be taken before the multiplication, and
        the multiplication be a part of the exponential's multiply-add.
        """
        if self.options.softcap is not None:
            return self.options.softcap * LOG2E
        return self.options.scale * LOG2E if self.options.scale > 0 else LOG2E

    def unscaled_logits(self, scores: jax.Array) -> jax.Array:
        """Returns logits before `logit_factor`; with softcap they lie between -1 and 1."""
        if self.options.softcap is not None:
            return jnp.tanh(scores * (self.options.scale / self.options.softcap))
        return scores if self.options.scale > 0 else scores * self.options.scale

    def slot(self, step: Index) -> Index:
        """Returns the buffer of the ring that a step uses.

        With one stage it is always 0. It is computed from `step` all the same, since a compiler
        that knew the constant would hold all addresses of the buffer in registers.
        """
        if self.stages > 1:
            return jax.lax.rem(step, jnp.int32(self.stages))
        return jnp.minimum(step, 0)


class TileBlocks(NamedTuple):
    """The blocks that a tile visits, as scalars; the first four are read from `ranges`.

    They are [first, end), of which [full_first, full_end) need no mask. The blocks at both ends,
    which need one, are visited first.
    """

    first: Index
    full_first: Index
    full_end: Index
    end: Index
    num_masked: Index
    steps: Index

    def block(self, step: Index) -> Index:
        """Returns the block that a step visits."""
        full = step - self.num_masked + self.full_first
        return jnp.where(step < self.num_masked, self.masked_block(step), full)

    def masked_block(self, step: Index) -> Index:
        """Returns the block of a masked step: those before the full blocks come before the rest."""
        num_before = self.full_first - self.first
        return step + jnp.where(step < num_before, self.first, self.full_end - num_before)


def stack_ranges(visited: BlockRange, full: BlockRange, batch: int) -> jax.Array:
    """Returns what `read_tile_blocks` reads: int32 [B, tiles, 4]."""
    tiles = visited.first.shape[1]
    columns = visited.first, full.first, full.end, visited.end
    ranges = [jnp.broadcast_to(x, (batch, tiles)) for x in columns]
    return jnp.stack(ranges, axis=-1).astype(jnp.int32)


def read_tile_blocks(ranges: Ref, b: Index, tile: Index, least: int = 0) -> TileBlocks:
    """Reads the blocks of a tile, which takes at least `least` steps."""
    first, full_first, full_end, end = (ranges[b, tile, i] for i in range(4))
    num_masked = end - first - (full_end - full_first)
    steps = jnp.maximum(end - first, least)
    return TileBlocks(first, full_first, full_end, end, num_masked, steps)


def needs_mask(options: Options, kv_length: int, kv_block: int, ids: jax.Array | None) -> bool:
    """Returns whether any block may need a mask."""
    limited = options.left is not None or options.right is not None
    return limited or ids is not None or bool(kv_length % kv_block)


def prepare(blocks: tuple[int, int], ranges: jax.Array | None, inputs: Inputs) -> Operands:
    """Returns operands, padded with zeros to whole blocks and to widths of multiples of 64."""
    q_block, kv_block = blocks
    shift = jnp.reshape(jnp.asarray(inputs.shift, jnp.int32), 1)
    q_ids, kv_ids = (
        None if ids is None else pad(ids, 1, block)
        for ids, block in zip(inputs.segment_ids, blocks, strict=True)
    )
    q, k, v = (
        pad(pad(x, 1, block), 3, 64)
        for x, block in zip(inputs[:3], (q_block, kv_block, kv_block), strict=True)
    )
    return Operands(ranges, shift, q, k, v, q_ids, kv_ids)


def pad(x: jax.Array, dim: int, multiple: int) -> jax.Array:
    """Adds zeros after the end of a dimension, up to a multiple."""
    more = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, more if i == dim else 0) for i in range(x.ndim)]) if more else x


def matrices(shape: tuple[int, ...], dtype: Any, columns: int = 64) -> Any:
    """Returns shared memory for matrices, in the tiled and swizzled layout that wgmma reads.

    A tile has `columns` columns; a product sums over multiples of them.
    """
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def copy_keys_and_values(
    static: StaticArgs, operands: Operands, smem: Any, b: Index, n: Index, blocks: TileBlocks
) -> None:
    """Copies the blocks of keys and values that a tile of queries visits into their rings.

    The third warpgroup, the producer, does nothing else.
    """
    head = jax.lax.div(n, jnp.int32(static.group))

    @pl.loop(0, blocks.steps)
    def _(step: Index) -> None:
        slot = static.slot(step)
        keys = pl.ds(blocks.block(step) * static.kv_block, static.kv_block)
        # From the second round of the ring on, a buffer must be free before it is written again.
        is_reused = step >= static.stages
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.k_free.at[slot]))
        copy = lambda source, target, full: plgpu.copy_gmem_to_smem(
            source, target.at[slot], full.at[slot]
        )
        copy(operands.k.at[b, keys, head], smem.k, smem.k_full)
        if operands.kv_ids is not None:
            copy(operands.kv_ids.at[b, keys], smem.kv_ids, smem.k_full)
        # Values have barriers of their own: S = Q Kᵀ can start before they have arrived.
        pl.when(is_reused)(lambda: plgpu.barrier_wait(smem.v_free.at[slot]))
        copy(operands.v.at[b, keys, head], smem.v, smem.v_full)

    await_last_phases(static.stages, blocks.steps, smem.k_free, smem.v_free)


def await_last_phases(stages: int, steps: Index, *rings: Ref) -> None:
    """Waits for the last phases of barriers: JAX's interpreter demands that none is left."""
    for slot in range(stages):
        for free in rings:
            pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, free.at[slot]))


def mask_block_of_keys(
    static: StaticArgs,
    smem: Any,
    warpgroup: Index,
    q_position: Index,
    blocks: TileBlocks,
    step: Index,
    slot: Index,
    logits: jax.Array,
) -> jax.Array:
    """Masks the logits of a warpgroup's queries and the block of keys that a step visits."""
    options = static.options
    ids = None if smem.q_ids is None else (smem.q_ids.at[warpgroup], smem.kv_ids.at[slot])
    k_position = blocks.block(step) * static.kv_block
    limits = options.left, options.right
    return mask_logits(logits, q_position, k_position, limits, static.kv_length, ids)


def mask_logits(
    logits: jax.Array,
    row: Index,
    column: Index,
    limits: tuple[int | None, int | None],
    length: int | None,
    ids: tuple[Ref, Ref] | None,
) -> jax.Array:
    """Sets logits to minus infinity where a row and a column do not see each other.

    A row sees columns up to the `limits` before and after it, below `length`, and of its own id.
    `row` and `column` are the positions of the first row and the first column; `ids` are references
    to the ids of the rows and of the columns. A limit is computed once for each row, so that each
    logit costs one comparison.
    """
    left, right = limits
    rows = plgpu.layout_cast(jax.lax.iota(jnp.int32, ROWS), BY_ROW) + (row - column)
    columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
    # One past the last column that a row sees, by the limit and by the number of keys.
    end = None if right is None else rows + (right + 1)
    if length is not None:
        end = length - column if end is None else jnp.minimum(end, length - column)
    mask: jax.Array | bool = True
    if end is not None:
        mask = columns < (end if jnp.ndim(end) == 0 else to_columns(end, logits.shape))
    if left is not None:
        mask &= columns >= to_columns(rows - left, logits.shape)
    if ids is not None:
        row_ids = plgpu.layout_cast(ids[0][...], BY_ROW)
        column_ids = plgpu.layout_cast(ids[1][...], BY_COLUMN)
        row_ids = to_columns(row_ids, logits.shape)
        mask &= row_ids == jax.lax.broadcast_in_dim(column_ids, logits.shape, [1])
    return logits if mask is True else jnp.where(mask, logits, -jnp.inf)


def fill_rows(value: Any) -> jax.Array:
    """Returns one number for each row, all of them `value`."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), BY_ROW)


def to_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a number for each row to the columns of a matrix."""
    return jax.lax.broadcast_in_dim(rows, shape, [0])


def softcap_slopes(static: StaticArgs, unscaled_logits: jax.Array) -> jax.Array | None:
    """Returns the derivatives of softcap at the unscaled logits, or None without softcap.

    The derivative is 0 where a mask has made the logit infinite.
    """
    if static.options.softcap is None:
        return None
    return jnp.maximum(1.0 - unscaled_logits * unscaled_logits, 0.0)


def multiply(probs: jax.Array, slopes: jax.Array | None) -> jax.Array:
    return probs if slopes is None else probs * slopes
