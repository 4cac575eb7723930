"""Self-attention and cross-attention with grouped queries, and their key/value caches."""

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from moe.config import ConfigError, ModelConfig
from moe.kernels.attention import Implementation, choose, decode_attention, flash_attention, why_not
from moe.model.layers import einsum, rotate
from moe.model.tokens import Batch, TokenInfo
from moe.parallel.context import ring_attention, ulysses_attention
from moe.parallel.mesh import chip, constrain, on_auto_axes, per_shard
from moe.parameters import parameter


class Cache(NamedTuple):
    """The keys and values of a group's layers, each token's in the slot of its position."""

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array


class MemoryCache(NamedTuple):
    """The keys and values that the cross-attention of a group's layers makes of the memory.

    A row's memory fills its first `length_LB` slots.
    """

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    length_LB: jax.Array


class Weights(NamedTuple):
    """The four weights of an attention part."""

    query_DNH: jax.Array
    key_DKH: jax.Array
    value_DKH: jax.Array
    output_NHD: jax.Array


def declare_weights(module: nn.Module, config: ModelConfig, output_scale: float) -> Weights:
    """Declares the weights of an attention part as parameters of `module`."""
    d, n, k, h = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    return Weights(
        parameter(module, "query", "DNH", (d, n, h), kind="linear", fan_in=d),
        parameter(module, "key", "DKH", (d, k, h), kind="linear", fan_in=d),
        parameter(module, "value", "DKH", (d, k, h), kind="linear", fan_in=d),
        parameter(
            module, "output", "NHD", (n, h, d), kind="linear", fan_in=n * h, scale=output_scale
        ),
    )


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017, eq. 1) with rotary positions.

    N/K query heads share a key/value head (Ainslie et al. 2023). A token sees its own segment:
    with `causal` no later token, and otherwise all of it.
    """

    config: ModelConfig
    causal: bool = True
    output_scale: float = 1.0  # of the initial output

    @on_auto_axes(lambda x_BTD: (x_BTD, PartitionSpec(None, *x_BTD[:1])))
    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: TokenInfo,
        cache: Cache | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns [B, T, D], and the cache with the new keys and values at `layer`."""
        positions_BT, segment_ids_BT, rotary = (
            tokens.positions_BT,
            tokens.segment_ids_BT,
            tokens.rotary,
        )
        if positions_BT is None or segment_ids_BT is None or rotary is None:
            raise ValueError(
                "tokens hold no positions and segments, which attention needs: "
                "make them with TokenInfo.from_batch"
            )
        weights = declare_weights(self, self.config, self.output_scale)
        query_BTNH = constrain(einsum("BTD,DNH->BTNH", x_BTD, weights.query_DNH), "BTNH")
        key_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, weights.key_DKH), "BTKH")
        value_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, weights.value_DKH), "BTKH")
        query_BTNH = rotate(query_BTNH, *rotary)
        key_BTKH = rotate(key_BTKH, *rotary)
        if cache is not None:
            cache = update_cache(cache, layer, key_BTKH, value_BTKH, positions_BT)
        if cache is None or tokens.from_start:
            # Nothing comes before a prompt's first token, so a prompt need not read the cache.
            mixed_BTNH = attend(
                self.config, query_BTNH, key_BTKH, value_BTKH, segment_ids_BT, causal=self.causal
            )
        else:
            mixed_BTNH = decode_attention(
                query_BTNH.astype(cache.key_LBSKH.dtype), *cache, positions_BT, layer=layer
            ).astype(query_BTNH.dtype)
        output_BTD = einsum("BTNH,NHD->BTD", constrain(mixed_BTNH, "BTNH"), weights.output_NHD)
        return output_BTD, cache


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to an encoder's output (Vaswani et al. 2017, section 3.2.3).

    A token sees the part of the memory that has its own segment's number. Neither queries nor
    keys have rotary positions, since distances between the two sequences mean nothing.
    """

    config: ModelConfig
    output_scale: float = 1.0  # of the initial output

    @on_auto_axes(lambda x_BTD: (x_BTD, PartitionSpec(None, *x_BTD[:1])))
    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: TokenInfo,
        cache: MemoryCache | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, MemoryCache | None]:
        """Returns [B, T, D], and the cache with the memory's keys and values at `layer`.

        Without a memory in `tokens`, the keys and values come from the cache.
        """
        weights = declare_weights(self, self.config, self.output_scale)
        query_BTNH = constrain(einsum("BTD,DNH->BTNH", x_BTD, weights.query_DNH), "BTNH")
        memory = tokens.memory
        if memory is not None:
            # The memory's keys are computed where its tokens lie, hence "T" instead of "S".
            key_BSKH, value_BSKH = (
                constrain(einsum("BSD,DKH->BSKH", memory.hidden_BSD, w_DKH), "BTKH")
                for w_DKH in (weights.key_DKH, weights.value_DKH)
            )
            if cache is not None:
                cache = fill_memory_cache(cache, layer, key_BSKH, value_BSKH, memory.segment_ids_BS)
            if tokens.segment_ids_BT is None:
                raise ValueError(
                    "tokens hold no segments, which attention needs: "
                    "make them with TokenInfo.from_batch"
                )
            mixed_BTNH = attend_to_memory(
                self.config,
                query_BTNH,
                key_BSKH,
                value_BSKH,
                tokens.segment_ids_BT,
                memory.segment_ids_BS,
            )
        elif cache is not None:
            mixed_BTNH = decode_memory(query_BTNH, cache, layer)
        else:
            raise ValueError(
                "tokens hold no memory, which cross-attention reads: "
                "set TokenInfo.memory, or pass the cache of a call that had one"
            )
        output_BTD = einsum("BTNH,NHD->BTD", constrain(mixed_BTNH, "BTNH"), weights.output_NHD)
        return output_BTD, cache


def attend(
    config: ModelConfig,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    causal: bool,
) -> jax.Array:
    """Returns self-attention within each segment, [B, T, N, H].

    Each device attends for its own rows, heads and part of the sequence.
    """
    length = q_BTNH.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    implementation = choose_implementation(config, mesh, length, causal=causal)

    def attend_shard(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array]:
        k_BTKH, v_BTKH = _own_heads(config, q_BTNH, k_BTKH, v_BTKH)
        options = {"causal": causal, "implementation": implementation}
        if q_BTNH.shape[1] == length:
            ids = {"q_segment_ids": segment_ids_BT, "kv_segment_ids": segment_ids_BT}
            return (flash_attention(q_BTNH, k_BTKH, v_BTKH, **ids, **options),)
        # The context axis splits the sequence: this device holds a part of it.
        match config.attention.context_parallelism:
            case "ring":
                parallel = ring_attention
            case "ulysses":
                parallel = ulysses_attention
        ids = {"segment_ids": segment_ids_BT, "axis_name": "context"}
        return (parallel(q_BTNH, k_BTKH, v_BTKH, **ids, **options),)

    arrays = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return per_shard(attend_shard, ("BTNH", "BTKH", "BTKH", "BT"), ("BTNH",), *arrays)[0]


def attend_to_memory(
    config: ModelConfig,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
) -> jax.Array:
    """Returns the attention of queries to a memory's keys of the same segment, [B, T, N, H].

    The context axis splits the queries, and each of its devices gathers all keys and values.
    """
    lengths = (q_BTNH.shape[1], k_BSKH.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    implementation = choose_implementation(config, mesh, *lengths, causal=False)

    def attend_shard(
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        q_segment_ids_BT: jax.Array,
        kv_segment_ids_BS: jax.Array,
    ) -> tuple[jax.Array]:
        k_BSKH, v_BSKH = _own_heads(config, q_BTNH, k_BSKH, v_BSKH)
        output_BTNH = flash_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            causal=False,
            q_segment_ids=q_segment_ids_BT,
            kv_segment_ids=kv_segment_ids_BS,
            implementation=implementation,
        )
        return (output_BTNH,)

    # "-" is a dimension that no axis splits.
    dims = ("BTNH", "B-KH", "B-KH", "BT", "B-")
    arrays = (q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT, kv_segment_ids_BS)
    return per_shard(attend_shard, dims, ("BTNH",), *arrays)[0]


def _own_heads(
    config: ModelConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values that this device's query heads read.

    Where the tensor axis has more devices than there are key/value heads, each device holds copies
    of all of these heads. Its query heads then read one of them.
    """
    heads, group = q_BTNH.shape[2], config.num_heads // config.num_kv_heads
    if heads >= group * k_BSKH.shape[2]:
        return k_BSKH, v_BSKH
    head = jax.lax.axis_index("tensor") * heads // group
    key_BS1H = jax.lax.dynamic_slice_in_dim(k_BSKH, head, 1, axis=2)
    value_BS1H = jax.lax.dynamic_slice_in_dim(v_BSKH, head, 1, axis=2)
    return key_BS1H, value_BS1H


def choose_implementation(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    length: int,
    kv_length: int | None = None,
    *,
    causal: bool = True,
) -> Implementation | None:
    """Returns the implementation that computes a model's attention on a mesh.

    `length` is the number of queries in a row, and `kv_length` of keys, where it differs. None
    leaves the choice to the platform. Raises ConfigError if the config names an implementation
    that cannot do it.
    """
    name, kind = config.attention.implementation, chip(mesh)
    kv_length = length if kv_length is None else kv_length
    q_shape = (1, length, config.num_heads, config.head_dim)
    k_shape = (1, kv_length, config.num_kv_heads, config.head_dim)
    q, k = (jax.ShapeDtypeStruct(shape, config.compute_dtype) for shape in (q_shape, k_shape))
    options = {
        "causal": causal,
        "q_segment_ids": jax.ShapeDtypeStruct((1, length), "int32"),
        "kv_segment_ids": jax.ShapeDtypeStruct((1, kv_length), "int32"),
    }
    if name == "auto":
        return None if kind is None else choose(kind, q, k, k, **options)
    if reason := why_not(name, q, k, k, chip=kind, **options):
        raise ConfigError(
            f"model.attention.implementation={name!r} cannot be used, for {reason}: "
            "set model.attention.implementation to 'auto'"
        )
    return Implementation(name)


def init_cache(config: ModelConfig, layers: int, batch_size: int, length: int) -> Cache:
    """Returns an empty cache of some layers, for rows of at most `length` tokens."""
    shape = (layers, batch_size, length, config.num_kv_heads, config.head_dim)
    dtype = _cache_dtype(config)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def init_memory_cache(
    config: ModelConfig, layers: int, batch_size: int, length: int
) -> MemoryCache:
    """Returns an empty cache of some layers, for memories of at most `length` tokens a row."""
    keys_and_values = init_cache(config, layers, batch_size, length)
    return MemoryCache(*keys_and_values, jnp.zeros((layers, batch_size), jnp.int32))


def _cache_dtype(config: ModelConfig) -> str:
    # To write to a part of a bfloat16 array on a CPU, XLA converts all of it to float32 and back.
    in_float32 = config.compute_dtype == "bfloat16" and jax.default_backend() == "cpu"
    return "float32" if in_float32 else config.compute_dtype


def fits_cache(cache: Cache, batch: Batch) -> jax.Array:
    """Returns which tokens [B, T] a layer's cache can take.

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
    positions_BT = batch["positions"]
    highest_BT = jnp.pad(jax.lax.cummax(positions_BT, axis=1), ((0, 0), (1, 0)), constant_values=-1)
    return (positions_BT > highest_BT[:, :length]) & (positions_BT < slots)


def fits_memory_cache(cache: MemoryCache, segment_ids_BS: jax.Array) -> jax.Array:
    """Returns which tokens [B, S] of a memory a layer's cache can take.

    Each row is one document from its start, with padding after it. Raises ValueError for more
    tokens than the cache has slots.
    """
    length, slots = segment_ids_BS.shape[1], cache.key_LBSKH.shape[2]
    if length > slots:
        raise ValueError(
            f"encoder_tokens have {length} positions and the cache has {slots}: "
            f"make the cache with encoder_length={length} or more"
        )
    return in_first_document(segment_ids_BS)


def in_first_document(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns which tokens [B, T] are padding, or of the document that a row starts with."""
    same_BT = segment_ids_BT == segment_ids_BT[:, :1]
    return (jnp.cumprod(same_BT, axis=1, dtype=jnp.int32) > 0) | (segment_ids_BT == 0)


def update_cache(
    cache: Cache,
    layer: jax.Array | int,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    positions_BT: jax.Array,
) -> Cache:
    """Writes each key and value into a layer's slot of its position.

    Padding after a prompt thus lands in slots that no earlier position sees, and that later tokens
    overwrite before they are seen. A position that has no slot is not written.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    slots = cache.key_LBSKH.shape[2]
    # JAX counts a negative index from the end. Beyond the end, "drop" writes nothing.
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


def decode_memory(q_BTNH: jax.Array, cache: MemoryCache, layer: jax.Array | int) -> jax.Array:
    """Returns the attention of queries to a layer's cached memory, [B, T, N, H]."""
    length, kv_heads = q_BTNH.shape[1], cache.key_LBSKH.shape[3]
    # All queries of a row see the same keys. As heads of one query they need fewer slots than
    # queries of their own, of which a cache takes no more than it has slots.
    q_B1RH = einops.rearrange(q_BTNH, "b t (k g) h -> b 1 (k t g) h", k=kv_heads)
    mixed_B1RH = decode_attention(
        q_B1RH.astype(cache.key_LBSKH.dtype),
        cache.key_LBSKH,
        cache.value_LBSKH,
        cache.length_LB[layer][:, None] - 1,
        layer=layer,
    )
    mixed_BTNH = einops.rearrange(mixed_B1RH, "b 1 (k t g) h -> b t (k g) h", k=kv_heads, t=length)
    return mixed_BTNH.astype(q_BTNH.dtype)
