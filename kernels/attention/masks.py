"""Computes which keys a query sees, and which blocks of keys a block of queries must visit.

This is the arithmetic that all implementations share. Query i has position q_offset + i, and key j
kv_offset + j. The mask depends on the offsets only through their difference,
`shift` = q_offset - kv_offset. It may be a traced int32, so that one program serves every rank of a
ring.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.kernels.attention.inputs import Options


class BlockRange(NamedTuple):
    """The blocks of keys that each block of queries visits, or the other way round.

    Both arrays are int32 [B, blocks], or [1, blocks] if all rows of the batch visit the same.
    """

    first: jax.Array
    end: jax.Array  # one past the last


def make_mask(
    options: Options,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
) -> jax.Array | None:
    """Returns whether each query sees each key, [..., T, S], or None where every query sees all.

    Positions [T] and [S] are counted from one origin; ids are [..., T] and [..., S].
    """
    distance = k_positions[None, :] - q_positions[:, None]
    conditions = []
    if options.left is not None:
        conditions.append(distance >= -options.left)
    if options.right is not None:
        conditions.append(distance <= options.right)
    if q_ids is not None and k_ids is not None:
        conditions.append(q_ids[..., :, None] == k_ids[..., None, :])
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def key_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> BlockRange:
    """Returns the range of blocks of keys that each block of queries must visit.

    `lengths` are T and S, `blocks` the sizes of their blocks. Without ids all rows of the batch
    have the same range. If ids rise along a row, as those of packed documents do, no block in the
    range is masked as a whole.
    """
    (length, kv_length), (q_block, kv_block) = lengths, blocks
    # The positions of a block's first query, and one past its last.
    q_first = jnp.arange(0, length, q_block) + shift
    q_end = jnp.minimum(q_first + q_block, length + shift)
    # The first key that any query of the block may see, and one past the last.
    k_first, k_end = jnp.zeros_like(q_first), jnp.full_like(q_end, kv_length)
    if options.left is not None:
        k_first = jnp.clip(q_first - options.left, 0, kv_length)
    if options.right is not None:
        k_end = jnp.clip(q_end + options.right, 0, kv_length)
    first, end = k_first // kv_block, -(-k_end // kv_block)
    block = jnp.arange(-(-kv_length // kv_block))
    visited = (block >= first[:, None]) & (block < end[:, None]) & (k_first < k_end)[:, None]
    visited = visited[None]
    if q_ids_BT is not None and kv_ids_BS is not None:
        visited = visited & _share_ids(q_ids_BT, kv_ids_BS, blocks)
    return _enclosing_range(visited)


def _share_ids(q_ids_BT: jax.Array, kv_ids_BS: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Returns whether the ranges of ids of two blocks overlap, [B, q blocks, kv blocks]."""
    q_low, q_high = _id_ranges(q_ids_BT, blocks[0])
    kv_low, kv_high = _id_ranges(kv_ids_BS, blocks[1])
    return (q_low[..., None] <= kv_high[:, None]) & (q_high[..., None] >= kv_low[:, None])


def _enclosing_range(visited: jax.Array) -> BlockRange:
    """Returns the smallest range that holds every visited block, empty where there is none."""
    first = jnp.argmax(visited, axis=-1)
    end = visited.shape[-1] - jnp.argmax(visited[..., ::-1], axis=-1)
    end = jnp.where(jnp.any(visited, axis=-1), end, first)
    return BlockRange(first.astype(jnp.int32), end.astype(jnp.int32))


def query_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> BlockRange:
    """Returns the range of blocks of queries that each block of keys must visit.

    This is `key_blocks` with queries and keys exchanged.
    """
    options = dataclasses.replace(options, left=options.right, right=options.left)
    lengths, blocks = (lengths[1], lengths[0]), (blocks[1], blocks[0])
    return key_blocks(options, -shift, lengths, blocks, kv_ids_BS, q_ids_BT)


def full_key_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    visited: BlockRange,
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> BlockRange:
    """Returns the first run of full blocks in `visited`, the result of `key_blocks`.

    For a block of queries, a block of keys is full if each of the queries sees each of the keys.
    Such a pair of blocks needs no mask.
    """
    (length, kv_length), (q_block, kv_block) = lengths, blocks
    q_first = (jnp.arange(0, length, q_block) + shift)[:, None]
    q_end = jnp.minimum(q_first + q_block, length + shift)
    block = jnp.arange(-(-kv_length // kv_block))
    k_first = block * kv_block
    full = jnp.broadcast_to(k_first + kv_block <= kv_length, (len(q_first), len(k_first)))
    if options.left is not None:
        full &= k_first >= q_end - 1 - options.left
    if options.right is not None:
        full &= k_first + kv_block - 1 <= q_first + options.right
    full = full & (block >= visited.first[..., None]) & (block < visited.end[..., None])
    if q_ids_BT is not None and kv_ids_BS is not None:
        full = full & _have_one_id(q_ids_BT, kv_ids_BS, blocks)
    return _first_run(full, visited.first)


def _have_one_id(q_ids_BT: jax.Array, kv_ids_BS: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Returns whether two blocks hold one and the same id, [B, q blocks, kv blocks]."""
    q_low, q_high = _id_ranges(q_ids_BT, blocks[0])
    kv_low, kv_high = _id_ranges(kv_ids_BS, blocks[1])
    one_id = (q_low == q_high)[..., None] & (kv_low == kv_high)[:, None]
    return one_id & (q_low[..., None] == kv_low[:, None])


def _first_run(full: jax.Array, otherwise: jax.Array) -> BlockRange:
    """Returns the first run of full blocks, or an empty range at `otherwise` if none is full."""
    first = jnp.where(jnp.any(full, axis=-1), jnp.argmax(full, axis=-1), otherwise)
    after = ~full & (jnp.arange(full.shape[-1]) >= first[..., None])
    end = jnp.where(jnp.any(after, axis=-1), jnp.argmax(after, axis=-1), full.shape[-1])
    return BlockRange(first.astype(jnp.int32), jnp.maximum(end, first).astype(jnp.int32))


def full_query_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    visited: BlockRange,
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> BlockRange:
    """Returns the first run of full blocks in `visited`, the result of `query_blocks`."""
    options = dataclasses.replace(options, left=options.right, right=options.left)
    lengths, blocks = (lengths[1], lengths[0]), (blocks[1], blocks[0])
    return full_key_blocks(options, -shift, lengths, blocks, visited, kv_ids_BS, q_ids_BT)


def _id_ranges(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Returns the lowest and the highest id of each block, [B, T / block]."""
    padded = jnp.pad(ids_BT, ((0, 0), (0, -ids_BT.shape[1] % block)), mode="edge")
    blocks = padded.reshape(len(ids_BT), -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
