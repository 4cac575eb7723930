"""Which keys a query sees, and so which blocks of keys a block of queries meets: the arithmetic
that all implementations share.

Query i stands at position q_offset + i, key j at kv_offset + j. What a query sees depends on
q_offset - kv_offset alone, the `shift`: it may be a traced int32, so that one program serves every
rank of a ring.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call: the span of keys that a query sees, how scores are made of
    products, and whether results are rounded.
    """

    left: int | None  # keys at most so far before the query; None is no limit
    right: int | None  # and after it; 0 is causal
    softcap: float | None
    scale: float
    partial: bool = False  # the results are parts, for the caller to add up: not to be rounded yet

    def result_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Of the output and the gradients of arrays of this dtype: theirs, or of parts that in
        which sums are taken.
        """
        return np.promote_types(dtype, np.float32) if self.partial else dtype


Window = tuple[
    int | None, int | None
]  # how far a query sees to the left and to the right; None is no limit
FARTHEST = (
    2**30
)  # the farthest limit that int32 positions can be compared with; no sequence is longer


def span(causal: bool, window: Window | None) -> Window:
    """How far before and after itself a query sees."""
    left, right = (
        None if x is None or x > FARTHEST else int(x)
        for x in (window if window is not None else (None, None))
    )
    return left, 0 if causal else right


def visible(
    options: Options,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_ids: jax.Array | None,
    k_ids: jax.Array | None,
) -> jax.Array | None:
    """Whether each query sees each key, [..., T, S] of positions in one count and ids [..., T] and
    [..., S]; None where all do.
    """
    distance = k_positions[None, :] - q_positions[:, None]
    conditions = []
    if options.left is not None:
        conditions.append(distance >= -options.left)
    if options.right is not None:
        conditions.append(distance <= options.right)
    if q_ids is not None:
        conditions.append(q_ids[..., :, None] == k_ids[..., None, :])
    seen = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return seen


def key_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that each block of queries meets, and one past the last: int32 [B, T
    / block], or [1, ...] without ids.

    `lengths` are T and S, `blocks` the sizes of their blocks. Of ids that do not fall, as those of
    packed documents, no block between the two is met in vain.
    """
    (length, kv_length), (q_block, kv_block) = lengths, blocks
    starts = jnp.arange(0, length, q_block) + shift
    ends = jnp.minimum(starts + q_block, length + shift)
    lowest = (
        jnp.zeros_like(starts)
        if options.left is None
        else jnp.clip(starts - options.left, 0, kv_length)
    )
    highest = (
        jnp.full_like(ends, kv_length)
        if options.right is None
        else jnp.clip(ends + options.right, 0, kv_length)
    )
    first, end = lowest // kv_block, -(-highest // kv_block)
    block = jnp.arange(-(-kv_length // kv_block))
    met = (block >= first[:, None]) & (block < end[:, None]) & (lowest < highest)[:, None]
    met = met[None]
    if q_ids_BT is not None:
        (q_low, q_high), (kv_low, kv_high) = (
            _id_ranges(q_ids_BT, q_block),
            _id_ranges(kv_ids_BS, kv_block),
        )
        met = met & (q_low[..., None] <= kv_high[:, None]) & (q_high[..., None] >= kv_low[:, None])
    first = jnp.argmax(met, axis=-1)
    end = jnp.where(
        jnp.any(met, axis=-1), met.shape[-1] - jnp.argmax(met[..., ::-1], axis=-1), first
    )
    return first.astype(jnp.int32), end.astype(jnp.int32)


def query_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The first block of queries that meets each block of keys, and one past the last: as
    `key_blocks`, seen from the keys.
    """
    mirrored = dataclasses.replace(options, left=options.right, right=options.left)
    return key_blocks(mirrored, -shift, lengths[::-1], blocks[::-1], kv_ids_BS, q_ids_BT)


def clear_key_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    met: tuple[jax.Array, jax.Array],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The first run of whole blocks, among those `met` (see `key_blocks`), whose keys every query
    of the block sees: no mask is needed.
    """
    (length, kv_length), (q_block, kv_block) = lengths, blocks
    starts = (jnp.arange(0, length, q_block) + shift)[:, None]
    ends = jnp.minimum(starts + q_block, length + shift)
    block = jnp.arange(-(-kv_length // kv_block))
    keys = block * kv_block
    clear = jnp.broadcast_to(keys + kv_block <= kv_length, (len(starts), len(keys)))
    if options.left is not None:
        clear &= keys >= ends - 1 - options.left
    if options.right is not None:
        clear &= keys + kv_block - 1 <= starts + options.right
    first, end = (x[..., None] for x in met)
    clear = clear & (block >= first) & (block < end)
    if q_ids_BT is not None:
        (q_low, q_high), (kv_low, kv_high) = (
            _id_ranges(q_ids_BT, q_block),
            _id_ranges(kv_ids_BS, kv_block),
        )
        one_id = (q_low == q_high)[..., None] & (kv_low == kv_high)[:, None]
        clear = clear & one_id & (q_low[..., None] == kv_low[:, None])
    begin = jnp.where(jnp.any(clear, axis=-1), jnp.argmax(clear, axis=-1), met[0])
    beyond = ~clear & (block >= begin[..., None])
    stop = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), len(block))
    return begin.astype(jnp.int32), jnp.maximum(stop, begin).astype(jnp.int32)


def clear_query_blocks(
    options: Options,
    shift: jax.Array | int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    met: tuple[jax.Array, jax.Array],
    q_ids_BT: jax.Array | None = None,
    kv_ids_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `clear_key_blocks`, seen from the keys; `met` is of `query_blocks`."""
    mirrored = dataclasses.replace(options, left=options.right, right=options.left)
    return clear_key_blocks(mirrored, -shift, lengths[::-1], blocks[::-1], met, kv_ids_BS, q_ids_BT)


def _id_ranges(ids_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The lowest and the highest id of each block, [B, T / block]."""
    padded = jnp.pad(ids_BT, ((0, 0), (0, -ids_BT.shape[1] % block)), mode="edge")
    blocks = padded.reshape(len(ids_BT), -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
