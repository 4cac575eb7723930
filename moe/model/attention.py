"""Computes self-attention and cross-attention with grouped queries."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import einops
import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from moe.config import ConfigError, ModelConfig, RunConfig
from moe.config.objectives import causal_kinds
from moe.kernels import grouped_matmul
from moe.kernels.attention import Choice, choose, decode_attention, flash_attention, why_not
from moe.kernels.grouped_matmul import Shapes
from moe.model.cache import Cache, MemoryCache, fill_memory_cache, update_cache
from moe.model.layers import RMSNorm, einsum, rotate
from moe.model.tokens import TokenInfo
from moe.parallel.context import ring_attention, ulysses_attention
from moe.parallel.mesh import axis_size, chip, constrain, on_auto_axes, per_shard
from moe.parallel.sequence import gather_time, scatter_time
from moe.parameters import parameter


class AttentionWeights(NamedTuple):
    """Holds the four weights of an attention part."""

    query_DNH: jax.Array
    key_DKH: jax.Array
    value_DKH: jax.Array
    output_NHD: jax.Array


def declare_weights(
    module: nn.Module, config: ModelConfig, output_scale: float
) -> AttentionWeights:
    """Declares the weights of an attention part as parameters of `module`."""
    d, n, k, h = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
    return AttentionWeights(
        parameter(module, "query", "DNH", (d, n, h), kind="linear", fan_in=d),
        parameter(module, "key", "DKH", (d, k, h), kind="linear", fan_in=d),
        parameter(module, "value", "DKH", (d, k, h), kind="linear", fan_in=d),
        parameter(
            module, "output", "NHD", (n, h, d), kind="linear", fan_in=n * h, scale=output_scale
        ),
    )


def norm_heads(config: ModelConfig, name: Literal["query", "key"], x_BTNH: jax.Array) -> jax.Array:
    """Returns queries or keys with a root mean square of 1 in each head, times a learned scale.

    This is QK-norm (Henry et al. 2020) with the norm of Qwen3 (Yang et al. 2025, section 2). All
    heads share the scale, which becomes a parameter of the module that is called. Without
    `config.qk_norm` it returns `x` as it is.
    """
    if not config.qk_norm:
        return x_BTNH
    dims = "BTNH" if name == "query" else "BTKH"
    return RMSNorm(config.norm_epsilon, dims, name=f"{name}_norm")(x_BTNH)


class Attention(nn.Module):
    """Computes self-attention (Vaswani et al. 2017, eq. 1) with rotary positions.

    N/K query heads share a key/value head (Ainslie et al. 2023). A token sees the tokens
    of its own segment: with `causal` those up to itself, and otherwise all of them.
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
        positions_BT, segment_ids_BT = tokens.positions_BT, tokens.segment_ids_BT
        rotary = tokens.rotary
        if positions_BT is None or segment_ids_BT is None or rotary is None:
            raise ValueError(
                "tokens hold no positions and segments, which attention needs: "
                "make them with TokenInfo.from_batch"
            )
        weights = declare_weights(self, self.config, self.output_scale)
        x_BTD = gather_time(x_BTD)
        query_BTNH = constrain(einsum("BTD,DNH->BTNH", x_BTD, weights.query_DNH), "BTNH")
        key_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, weights.key_DKH), "BTKH")
        value_BTKH = constrain(einsum("BTD,DKH->BTKH", x_BTD, weights.value_DKH), "BTKH")
        query_BTNH = rotate(norm_heads(self.config, "query", query_BTNH), *rotary)
        key_BTKH = rotate(norm_heads(self.config, "key", key_BTKH), *rotary)
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
        return scatter_time(output_BTD), cache


class CrossAttention(nn.Module):
    """Lets a decoder's tokens attend to an encoder's output.

    This is section 3.2.3 of Vaswani et al. 2017. The encoder's output is called the memory. A
    token sees the part of the memory that has its own segment's number. Neither queries nor
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
        x_BTD = gather_time(x_BTD)
        query_BTNH = constrain(einsum("BTD,DNH->BTNH", x_BTD, weights.query_DNH), "BTNH")
        query_BTNH = norm_heads(self.config, "query", query_BTNH)
        memory, segment_ids_BT = tokens.memory, tokens.segment_ids_BT
        if memory is not None and segment_ids_BT is not None:
            memory_BSD = gather_time(memory.hidden_BSD)
            # Keys and values are computed on the devices that hold the memory's tokens. The context
            # axis splits these tokens too, so their dimension is written "T": RULES have no "S".
            key_BSKH, value_BSKH = (
                constrain(einsum("BSD,DKH->BSKH", memory_BSD, w_DKH), "BTKH")
                for w_DKH in (weights.key_DKH, weights.value_DKH)
            )
            key_BSKH = norm_heads(self.config, "key", key_BSKH)
            ids_BS = memory.segment_ids_BS
            if cache is not None:
                cache = fill_memory_cache(cache, layer, key_BSKH, value_BSKH, ids_BS)
            mixed_BTNH = attend_to_memory(
                self.config, query_BTNH, key_BSKH, value_BSKH, segment_ids_BT, ids_BS
            )
        elif cache is not None:
            mixed_BTNH = decode_memory(query_BTNH, cache, layer)
        else:
            raise ValueError(
                "tokens hold no memory and segments, which cross-attention reads: "
                "set TokenInfo.memory, or pass the cache of a call that had one"
            )
        output_BTD = einsum("BTNH,NHD->BTD", constrain(mixed_BTNH, "BTNH"), weights.output_NHD)
        return scatter_time(output_BTD), cache


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
    # In a caller's shard_map over context, `length` is that of this device's part of a row.
    context_is_manual = axis_size("context") > 1

    def attend_shard(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array]:
        k_BTKH, v_BTKH = _own_heads(config, q_BTNH, k_BTKH, v_BTKH)
        options = {"causal": causal, "implementation": implementation}
        if q_BTNH.shape[1] == length and not context_is_manual:
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
    refused: Collection[str] = (),
) -> Choice | None:
    """Returns the implementation that computes a model's attention on a mesh.

    A row has `length` queries and `kv_length` keys, by default as many. The result is None if the
    mesh does not know its chip; the choice is then left to the platform. Implementations that are
    `refused` are not chosen. Raises ConfigError if the config names one that cannot compute this
    attention.
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
        return None if kind is None else choose(kind, q, k, k, refused=refused, **options)
    if reason := why_not(name, q, k, k, chip=kind, **options):
        raise ConfigError(
            f"model.attention.implementation={name!r} cannot be used, because {reason}: "
            "set model.attention.implementation to 'auto'"
        )
    return Choice(name)


def without_kernels(
    config: RunConfig, mesh: Mesh, refused: Mapping[str, Collection[str]]
) -> RunConfig:
    """Returns a config that names kernels where the automatic choice might take a refused one.

    `refused` has the names of kernels by operation, "attention" and "experts".
    """
    model, length = config.model, config.data.sequence_length
    attention, moe = model.attention, model.moe
    if (names := refused.get("attention")) and attention.implementation == "auto":
        choose = functools.partial(choose_implementation, model, mesh, length, refused=names)
        choices = (choose(causal=causal) for causal in causal_kinds(config.task))
        chosen = {choice.name for choice in choices if choice}
        # A config names one kernel, also where that of encoders would differ from that of decoders.
        name: Any = chosen.pop() if len(chosen) == 1 else "blockwise"
        attention = dataclasses.replace(attention, implementation=name)
    is_grouped = moe.num_experts and moe.dispatch == "dropless" and moe.implementation == "auto"
    if (names := refused.get("experts")) and is_grouped:
        shapes = Shapes(moe.experts_per_token, moe.num_experts, model.compute_dtype)
        kernel = grouped_matmul.choose(chip(mesh), shapes, names)
        moe = dataclasses.replace(moe, implementation=kernel.name)
    model = dataclasses.replace(model, attention=attention, moe=moe)
    return dataclasses.replace(config, model=model)


def decode_memory(q_BTNH: jax.Array, cache: MemoryCache, layer: jax.Array | int) -> jax.Array:
    """Returns the attention of queries to a layer's cached memory, [B, T, N, H]."""
    length, kv_heads = q_BTNH.shape[1], cache.key_LBSKH.shape[3]
    # All queries of a row see the same keys, so they can become heads of a single query. As queries
    # they might be more than the cache has slots, which decode_attention refuses.
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
