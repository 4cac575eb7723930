"""Prepares what the TPU kernels share: operands in whole blocks, specs of blocks, and scores."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.attention.inputs import Inputs, Options
from moe.kernels.attention.masks import BlockRange

# A reference to memory, and an index on a grid: Pallas has no public types for them.
Ref = Any
Index = Any


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """The static arguments of a kernel."""

    options: Options
    q_block: int
    kv_block: int
    kv_length: int  # the keys that are no padding
    group: int  # query heads that share a key/value head
    has_ids: bool
    interpret: Any  # a bool, or pltpu.InterpretParams in tests


class Operands(NamedTuple):
    """The arrays of a kernel in whole blocks. Those that are None are left out of its arguments."""

    q: jax.Array  # [B, N, T, H]
    k: jax.Array  # [B, K, S, H]
    v: jax.Array
    q_ids: jax.Array | None  # [B, 1, T]
    kv_ids: jax.Array | None  # [B, S, 1]
    dout: jax.Array | None = None  # [B, N, T, H], this and the following in the backward pass
    lse: jax.Array | None = None  # [B, N, 1, T]
    delta: jax.Array | None = None

    def given(self) -> list[jax.Array]:
        return [x for x in self if x is not None]


class Kernel(NamedTuple):
    """A kernel, and what Pallas needs to run it."""

    body: Callable[..., None]  # called with the static arguments, the grid's last size, and refs
    grid: tuple[int, ...]
    in_specs: list[pl.BlockSpec]
    out_specs: pl.BlockSpec | tuple[pl.BlockSpec, ...]
    out_shapes: Any  # like `out_specs`
    scratch: list[Any]
    flops: int  # for each pair of a query and a key


def run_kernel(
    static: StaticArgs,
    kernel: Kernel,
    visited: BlockRange,
    shift: jax.Array | int,
    *arrays: jax.Array,
) -> Any:
    """Runs a kernel; the range of visited blocks and the shift are prefetched as scalars."""
    grid = kernel.grid
    pairs = math.prod(grid) * static.q_block * static.kv_block
    read = sum(_block_size(spec) for spec in kernel.in_specs)
    # The compiler hides communication behind a kernel by this estimate. It counts more than a mask
    # leaves, and all that is read as if it were float32.
    cost = pl.CostEstimate(
        flops=pairs * kernel.flops,
        transcendentals=pairs,
        bytes_accessed=4 * math.prod(grid) * read,
    )
    run = pl.pallas_call(
        functools.partial(kernel.body, static, grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=kernel.in_specs,
            out_specs=kernel.out_specs,
            scratch_shapes=kernel.scratch,
        ),
        out_shape=kernel.out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",)
        ),
        interpret=static.interpret,
        cost_estimate=cost,
    )
    return run(*visited, jnp.reshape(shift, 1), *arrays)


def _block_size(spec: pl.BlockSpec) -> int:
    """Returns how many numbers a block has; a dimension of None is left out of it."""
    return math.prod(size for size in spec.block_shape or () if isinstance(size, int) and size)


def prepare(
    options: Options, inputs: Inputs, blocks: tuple[int, int], interpret: Any
) -> tuple[StaticArgs, Operands]:
    """Returns a kernel's static arguments, and the inputs by heads, padded to whole blocks."""
    q, k, v = inputs[:3]
    # A block has a multiple of 128 positions, since positions lie along lanes.
    q_block, kv_block = (
        min(block, round_up(length, 128))
        for block, length in zip(blocks, inputs.lengths, strict=True)
    )
    q_ids, kv_ids = inputs.segment_ids
    static = StaticArgs(
        options,
        q_block,
        kv_block,
        kv_length=k.shape[1],
        group=q.shape[2] // k.shape[2],
        has_ids=q_ids is not None,
        interpret=interpret,
    )
    operands = Operands(
        heads_first(q, q_block),
        heads_first(k, kv_block),
        heads_first(v, kv_block),
        None if q_ids is None else pad(q_ids, q_block, 1)[:, None],
        None if kv_ids is None else pad(kv_ids, kv_block, 1)[:, :, None],
    )
    return static, operands


def for_each_row(visited: BlockRange, batch: int) -> BlockRange:
    """Returns the ranges with one for each row of the batch, also where all rows share one."""
    return BlockRange(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in visited))


def grid_steps(static: StaticArgs, block: int, other_block: int, num_others: int) -> int:
    """Returns the size of a grid's last dimension.

    It is the largest number of blocks of the other kind that a block may have to visit. If the mask
    limits both sides, as a causal window does, it is the number that the window spans. Otherwise it
    is all of them.
    """
    left, right = static.options.left, static.options.right
    if left is None or right is None:
        return num_others
    return min(num_others, -(-(block + left + right) // other_block) + 1)


def visited_block(first: Ref, end: Ref, row: Index, block: Index, step: Index) -> Index:
    """Returns the block to copy at a step of the grid.

    Beyond the end of the range it stays the last one, so that nothing is copied.
    """
    return jnp.minimum(first[row, block] + step, jnp.maximum(end[row, block] - 1, 0))


def q_index(b: Index, n: Index, i: Index, step: Index, *_: Ref) -> tuple[Index, ...]:
    """Returns the index of the queries where the grid is (B, N, blocks of queries, steps)."""
    return b, n, i


def kv_index(static: StaticArgs) -> Callable[..., tuple[Index, ...]]:
    """Returns the function for the index of the keys on the grid of `q_index`."""

    def index(
        b: Index, n: Index, i: Index, step: Index, first: Ref, end: Ref, *_: Ref
    ) -> tuple[Index, ...]:
        return b, jax.lax.div(n, static.group), visited_block(first, end, b, i, step)

    return index


def block_specs(
    static: StaticArgs,
    operands: Operands,
    q_index: Callable[..., tuple[Index, ...]],
    kv_index: Callable[..., tuple[Index, ...]],
) -> list[pl.BlockSpec]:
    """Returns the specs of the operands that are given; an index is (row, head, block)."""

    def matrix(index: Callable[..., tuple[Index, ...]], size: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, size, width), lambda *grid: (*index(*grid), 0))

    width, value_width = operands.k.shape[3], operands.v.shape[3]
    specs = [
        matrix(q_index, static.q_block, width),
        matrix(kv_index, static.kv_block, width),
        matrix(kv_index, static.kv_block, value_width),
    ]
    if static.has_ids:
        along_lanes = lambda *grid: (grid[0], 0, q_index(*grid)[2])
        along_sublanes = lambda *grid: (grid[0], kv_index(*grid)[2], 0)
        specs.append(pl.BlockSpec((None, 1, static.q_block), along_lanes))
        specs.append(pl.BlockSpec((None, static.kv_block, 1), along_sublanes))
    if operands.dout is not None:
        number = lambda *grid: (*q_index(*grid)[:2], 0, q_index(*grid)[2])
        one_for_each_query = pl.BlockSpec((None, None, 1, static.q_block), number)
        specs.append(matrix(q_index, static.q_block, value_width))
        specs += [one_for_each_query, one_for_each_query]
    return specs


def scores(
    static: StaticArgs,
    i: Index,
    j: Index,
    shift: jax.Array,
    q: jax.Array,
    k: jax.Array,
    ids: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array | float]:
    """Returns logits [keys, queries] of block i of queries and j of keys, and softcap's slopes.

    Logits are minus infinity where a key is masked. The slope is the derivative of a logit by its
    score.
    """
    options = static.options
    logits, slopes = dot(k, q, 1, 1) * options.scale, 1.0
    if options.softcap is not None:
        capped = jnp.tanh(logits / options.softcap)
        logits, slopes = options.softcap * capped, 1 - capped * capped
    # Positions count from the first key.
    keys, queries = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, dim) for dim in (0, 1))
    keys, queries = keys + j * static.kv_block, queries + (i * static.q_block + shift)
    mask = keys < static.kv_length
    if options.left is not None:
        mask &= keys >= queries - options.left
    if options.right is not None:
        mask &= keys <= queries + options.right
    if ids:
        q_ids, kv_ids = ids
        mask &= q_ids == kv_ids
    return jnp.where(mask, logits, -jnp.inf), slopes


def dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int) -> jax.Array:
    """Returns the product of two matrices over a dimension of each, summed in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_dim,), (y_dim,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def heads_first(x: jax.Array, block: int) -> jax.Array:
    """Turns [B, T, N, H] into [B, N, T, H], with zeros after T up to whole blocks."""
    return pad(jnp.moveaxis(x, 2, 1), block, 2)


def heads_second(x: jax.Array, length: int) -> jax.Array:
    """Turns [B, N, T, H] into [B, T, N, H], without the padding after `length`."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def pad(x: jax.Array, block: int, dim: int) -> jax.Array:
    """Adds zeros after the end of a dimension, up to whole blocks."""
    return jnp.pad(x, [(0, -size % block if i == dim else 0) for i, size in enumerate(x.shape)])


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
