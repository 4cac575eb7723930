"""Makes and fills the key/value caches of attention, and says which tokens they have room for.

Only attention and this file read the contents of a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.config import ModelConfig
from moe.cross_entropy import as_int32
from moe.model.tokens import Batch
from moe.parallel.mesh import chip


class Cache(NamedTuple):
    """Holds the keys and values of a group's layers, each token's in the slot of its position."""

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array


class MemoryCache(NamedTuple):
    """Holds the keys and values that a group's cross-attention makes of the memory.

    A row's memory fills its first `length_LB` slots.
    """

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    length_LB: jax.Array


def init_cache(config: ModelConfig, layers: int, batch_size: int, length: int) -> Cache:
    """Returns an empty cache for a number of layers, and rows of at most `length` tokens."""
    shape = (layers, batch_size, length, config.num_kv_heads, config.head_dim)
    dtype = _cache_dtype(config)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def init_memory_cache(
    config: ModelConfig, layers: int, batch_size: int, length: int
) -> MemoryCache:
    """Returns an empty cache for a number of layers, and memories of at most `length` tokens."""
    keys_and_values = init_cache(config, layers, batch_size, length)
    return MemoryCache(*keys_and_values, jnp.zeros((layers, batch_size), jnp.int32))


def _cache_dtype(config: ModelConfig) -> str:
    """Returns the compute dtype, except that a bfloat16 model's cache on a CPU is float32.

    To write to a part of a bfloat16 array on a CPU, XLA converts all of it to float32 and back.
    """
    # A mesh that was set knows its chip, which need not be on this machine. Without a mesh the
    # program runs on the attached device.
    platform = chip(jax.sharding.get_abstract_mesh()) or jax.default_backend()
    is_float32 = config.compute_dtype == "bfloat16" and platform == "cpu"
    return "float32" if is_float32 else config.compute_dtype


def fits_cache(cache: Cache, batch: Batch) -> jax.Array:
    """Returns which tokens [B, T] a layer's cache has room for.

    A prompt has no `positions`: each row is one document from its start, and `segment_ids` of 0
    mark the padding after it. Later tokens have `positions`, which rise along a row and stay below
    the cache's length. Raises ValueError where shapes and names alone show that a batch does not
    fit.
    """
    (batch_size, length), (rows, slots) = batch["tokens"].shape, cache.key_LBSKH.shape[1:3]
    if batch_size != rows:
        raise ValueError(
            f"tokens have {batch_size} rows and the cache has {rows}: "
            f"make the cache with batch_size={batch_size}"
        )
    if length > slots:
        raise ValueError(
            f"tokens have {length} positions and the cache has {slots}: "
            f"make the cache with length={length} or more"
        )
    if "positions" not in batch:
        return in_first_document(batch.get("segment_ids", jnp.ones((rows, length), jnp.int32)))
    if "segment_ids" in batch:
        raise ValueError(
            "a batch has positions and segment_ids, and a cache holds one document a row: "
            "leave segment_ids out"
        )
    positions_BT = as_int32(batch["positions"])
    highest_BT = jnp.pad(jax.lax.cummax(positions_BT, axis=1), ((0, 0), (1, 0)), constant_values=-1)
    return (positions_BT > highest_BT[:, :length]) & (positions_BT < slots)


def fits_memory_cache(cache: MemoryCache, segment_ids_BS: jax.Array, prompt: Batch) -> jax.Array:
    """Returns for each token [B, S] of a memory whether a layer's cache has room for it.

    Each row is one document from its start, with padding after it, and has the prompt's segment id,
    since later tokens read all of it. Raises ValueError for more tokens than the cache has slots.
    """
    length, slots = segment_ids_BS.shape[1], cache.key_LBSKH.shape[2]
    if length > slots:
        raise ValueError(
            f"encoder_tokens have {length} positions and the cache has {slots}: "
            f"make the cache with encoder_length={length} or more"
        )
    id_B1 = prompt["segment_ids"][:, :1] if "segment_ids" in prompt else jnp.int32(1)
    is_read_BS = (segment_ids_BS == id_B1.astype(segment_ids_BS.dtype)) | (segment_ids_BS == 0)
    return in_first_document(segment_ids_BS) & is_read_BS


def in_first_document(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns which tokens [B, T] are padding or belong to the first document of their row."""
    same_BT = segment_ids_BT == segment_ids_BT[:, :1]
    return (jnp.cumprod(same_BT, axis=1, dtype=jnp.int32) > 0) | (segment_ids_BT == 0)


def update_cache(
    cache: Cache,
    layer: jax.Array | int,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    positions_BT: jax.Array,
) -> Cache:
    """Writes a layer's keys and values, each token's into the slot of the token's position.

    Padding after a prompt is written too. No earlier position sees its slots, and a later token
    overwrites a slot before it is seen. A position that has no slot is not written.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    slots = cache.key_LBSKH.shape[2]
    # JAX counts a negative index from the end. Beyond the end, "drop" writes nothing.
    positions_BT = as_int32(positions_BT)
    positions_BT = jnp.where(positions_BT < 0, slots, positions_BT)

    def write(cached_LBSKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        place = cached_LBSKH.at[layer, rows_B1, positions_BT]
        return place.set(new_BTKH.astype(cached_LBSKH.dtype), mode="drop")

    return Cache(write(cache.key_LBSKH, key_BTKH), write(cache.value_LBSKH, value_BTKH))


def fill_memory_cache(
    cache: MemoryCache,
    layer: jax.Array | int,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segment_ids_BS: jax.Array,
) -> MemoryCache:
    """Writes a layer's keys and values of the memory into its first slots."""

    def write(cached_LBSKH: jax.Array, new_BSKH: jax.Array) -> jax.Array:
        place = cached_LBSKH.at[layer, :, : new_BSKH.shape[1]]
        return place.set(new_BSKH.astype(cached_LBSKH.dtype))

    length_B = jnp.sum(segment_ids_BS > 0, axis=1, dtype=jnp.int32)
    return MemoryCache(
        write(cache.key_LBSKH, key_BSKH),
        write(cache.value_LBSKH, value_BSKH),
        cache.length_LB.at[layer].set(length_B),
    )
