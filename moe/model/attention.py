"""Attention with grouped queries and rotary positions, and its key/value cache."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from moe.config import ConfigError, ModelConfig
from moe.kernels.attention import Choice, choose, decode_attention, flash_attention, why_not
from moe.model.layers import einsum, residual_scale, rotary_angles, rotate
from moe.parallel.context import ring_attention, ulysses_attention
from moe.parallel.mesh import chip, constrain, on_auto_axes, per_shard
from moe.parameters import parameter


@struct.dataclass
class Positions:
    """Where each token stands: what attention needs to know of a batch, the same in every layer."""

    positions_BT: jax.Array  # counted from the start of the token's document
    segment_ids_BT: jax.Array  # tokens see only their own segment
    cos_BTH: jax.Array  # of the rotary angles, H/2 of them
    sin_BTH: jax.Array
    from_start: bool = struct.field(
        pytree_node=False
    )  # every row stands at 0, 1, 2, ...: known while tracing

    @classmethod
    def of(cls, batch: dict[str, jax.Array], config: ModelConfig) -> "Positions":
        """Reads `positions` and `segment_ids` of a batch; without them every row is one document
        from its start.
        """
        shape = batch["tokens"].shape
        positions_BT = batch.get(
            "positions", jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        )
        segment_ids_BT = batch.get("segment_ids", jnp.ones(shape, jnp.int32))
        angles = rotary_angles(positions_BT, config.head_dim, config.rope_base)
        return cls(
            positions_BT, segment_ids_BT, jnp.cos(angles), jnp.sin(angles), "positions" not in batch
        )


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, eq. 1) in which N/K query heads share a key/value
    head (Ainslie et al. 2023).
    """

    config: ModelConfig

    @on_auto_axes(lambda x_BTD: (x_BTD, PartitionSpec(None, *x_BTD[:1])))
    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions: Positions, cache: Any = None, layer: jax.Array | int = 0
    ) -> tuple[jax.Array, Any]:
        """Returns [B, T, D] and the cache with this call's keys and values in it, at `layer` (None
        without one).
        """
        c = self.config
        d, n, k, h = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        w_query_DNH = parameter(self, "query", "DNH", (d, n, h), kind="linear", fan_in=d)
        w_key_DKH = parameter(self, "key", "DKH", (d, k, h), kind="linear", fan_in=d)
        w_value_DKH = parameter(self, "value", "DKH", (d, k, h), kind="linear", fan_in=d)
        w_output_NHD = parameter(
            self, "output", "NHD", (n, h, d), kind="linear", fan_in=n * h, scale=residual_scale(c)
        )
        query_BTNH = constrain(einsum("BTD,DNH->BTNH", x_BTD, w_query_DNH), "BTNH")
        key_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, w_key_DKH), "BTKH")
        value_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, w_value_DKH), "BTKH")
        query_BTNH = rotate(query_BTNH, positions.cos_BTH, positions.sin_BTH)
        key_BTKH = rotate(key_BTKH, positions.cos_BTH, positions.sin_BTH)
        if cache is not None:
            cache = update_cache(cache, layer, key_BTKH, value_BTKH, positions.positions_BT)
        if (
            cache is None or positions.from_start
        ):  # before a prompt's first token there is nothing: it need not read the cache
            mixed_BTNH = attend(c, query_BTNH, key_BTKH, value_BTKH, positions.segment_ids_BT)
        else:
            cached = query_BTNH.astype(cache["key"].dtype), cache["key"], cache["value"]
            mixed_BTNH = decode_attention(*cached, positions.positions_BT, layer=layer).astype(
                query_BTNH.dtype
            )
        return einsum("BTNH,NHD->BTD", constrain(mixed_BTNH, "BTNH"), w_output_NHD), cache


def attend(
    config: ModelConfig,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """Causal attention within each document, [B, T, N, H]: each device attends for its own rows,
    heads and part of the sequence.
    """
    length = q_BTNH.shape[1]
    implementation = choose_implementation(config, jax.sharding.get_abstract_mesh(), length)
    attend_shard = functools.partial(_attend_shard, config, implementation, length)
    return per_shard(
        attend_shard,
        ("BTNH", "BTKH", "BTKH", "BT"),
        ("BTNH",),
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT,
    )[0]


def _attend_shard(
    config: ModelConfig,
    implementation: Choice | None,
    length: int,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
) -> tuple[jax.Array]:
    """`length` is the whole sequence's: the arrays hold less of it where the context axis splits
    it.
    """
    heads, group = q_BTNH.shape[2], config.num_heads // config.num_kv_heads
    if (
        heads < group * k_BTKH.shape[2]
        # keys are copied, for there are fewer heads of them than devices: take the one that is read
        # here
    ):
        own = jax.lax.axis_index("tensor") * heads // group
        k_BTKH, v_BTKH = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k_BTKH, v_BTKH))
    qkv, keywords = (q_BTNH, k_BTKH, v_BTKH), {"causal": True, "implementation": implementation}
    if q_BTNH.shape[1] == length:
        output_BTNH = flash_attention(
            *qkv, q_segment_ids=segment_ids_BT, kv_segment_ids=segment_ids_BT, **keywords
        )
    else:
        parallel = {"ring": ring_attention, "ulysses": ulysses_attention}[
            config.attention.context_parallelism
        ]
        output_BTNH = parallel(*qkv, segment_ids=segment_ids_BT, axis_name="context", **keywords)
    return (output_BTNH,)


def choose_implementation(config: ModelConfig, mesh: Any, length: int) -> Choice | None:
    """Who computes a model's attention over T = `length` on a mesh; None leaves it to the platform.
    ConfigError for one that cannot.
    """
    name, kind = config.attention.implementation, chip(mesh)
    if name == "auto" and kind is None:
        return None
    shapes = (
        (1, length, heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads)
    )
    q, k = (jax.ShapeDtypeStruct(shape, config.compute_dtype) for shape in shapes)
    ids = jax.ShapeDtypeStruct((1, length), "int32")
    keywords = {"causal": True, "q_segment_ids": ids, "kv_segment_ids": ids}
    if name == "auto":
        return choose(kind, q, k, k, **keywords)
    if reason := why_not(name, q, k, k, chip=kind, **keywords):
        raise ConfigError(
            f"model.attention.implementation={name!r} cannot be used, for {reason}: set model.attention.implementation to 'auto'"
        )
    return Choice(name)


def init_cache(config: ModelConfig, layers: int, batch_size: int, length: int) -> Any:
    """An empty cache of some layers, for rows of at most `length` tokens. What is in it is
    attention's own business.
    """
    shape = (layers, batch_size, length, config.num_kv_heads, config.head_dim)
    # To write to a part of a bfloat16 array, XLA converts all of it on a CPU, and back.
    in_float32 = config.compute_dtype == "bfloat16" and jax.default_backend() == "cpu"
    return {
        name: jnp.zeros(shape, "float32" if in_float32 else config.compute_dtype)
        for name in ("key", "value")
    }


def fits_cache(cache: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns which tokens [B, T] a layer's cache can take.

    A prompt has no `positions`: each row is one document from its start, and `segment_ids` of 0
    mark the padding after it. Later tokens have `positions`, which rise along a row and stay below
    the cache's length. Raises ValueError where shapes and names alone show that a batch does not
    fit.
    """
    (batch_size, length), (rows, slots) = batch["tokens"].shape, cache["key"].shape[1:3]
    if batch_size != rows:
        raise ValueError(
            f"tokens have {batch_size} rows and the cache has {rows}: make the cache with batch_size={batch_size}"
        )
    if length > slots:
        raise ValueError(
            f"tokens have {length} positions and the cache has {slots}: make the cache with length={length} or more"
        )
    if "positions" not in batch:
        ids_BT = batch.get("segment_ids", jnp.ones((batch_size, length), jnp.int32))
        in_first_segment_BT = jnp.cumprod(ids_BT == ids_BT[:, :1], axis=1, dtype=jnp.int32) > 0
        return in_first_segment_BT | (ids_BT == 0)
    if "segment_ids" in batch:
        raise ValueError(
            "a batch has positions and segment_ids, and a cache holds one document a row: leave segment_ids out"
        )
    positions_BT = batch["positions"]
    highest_BT = jnp.pad(jax.lax.cummax(positions_BT, axis=1), ((0, 0), (1, 0)), constant_values=-1)
    return (positions_BT > highest_BT[:, :length]) & (positions_BT < slots)


def update_cache(
    cache: Any,
    layer: jax.Array | int,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    positions_BT: jax.Array,
) -> Any:
    """Writes each key and value into a layer's slot of its position.

    Padding after a prompt thus lands in slots that no earlier position sees, and that later tokens
    overwrite before they are seen. A position that has no slot is not written.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    positions_BT = jnp.where(
        positions_BT < 0, cache["key"].shape[2], positions_BT
    )  # JAX would count from the end
    new = {"key": key_BTKH, "value": value_BTKH}
    return {
        name: cache[name]
        .at[layer, rows_B1, positions_BT]
        .set(new[name].astype(cache[name].dtype), mode="drop")
        for name in cache
    }
