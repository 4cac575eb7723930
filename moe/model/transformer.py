"""Defines the models: a decoder-only Transformer, an encoder, and an encoder with a decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.config import ConfigError, ModelConfig, Schedule
from moe.cross_entropy import Unembedding, as_int32
from moe.model.cache import fits_cache, fits_memory_cache
from moe.model.layers import check_static, einsum, look_up
from moe.model.stack import Output, Stack, StackCache, init_stack_cache, output_specs
from moe.model.tokens import Batch, Memory, TokenInfo
from moe.parallel.collectives.shared import share
from moe.parallel.mesh import constrain, on_auto_axes
from moe.parallel.sequence import gather_time, join_time
from moe.parameters import parameter


class Vocabulary(nn.Module):
    """Holds the tables that turn tokens into embeddings, and hidden states into logits."""

    config: ModelConfig
    makes_logits: bool = True

    def setup(self) -> None:
        c = self.config
        shape = (c.vocab_size, c.model_dim)
        self.embedding_VD = parameter(
            self, "embedding", "VD", shape, kind="embedding", fan_in=c.model_dim
        )
        if self.makes_logits and not c.tied_embeddings:
            self.unembedding_DV = parameter(
                self, "unembedding", "DV", shape[::-1], kind="unembedding", fan_in=c.model_dim
            )
        self.companion_PVD = share(self.embedding_VD, "VD") if c.tied_embeddings else None

    def embed(self, batch: Batch) -> jax.Array:
        """Returns the embeddings of `tokens`, [B, T, D], in the compute dtype."""
        tokens_BT = batch["tokens"]
        if not tokens_BT.size:
            raise ValueError(
                f"tokens have shape {tokens_BT.shape}: give at least one row of at least one token"
            )
        if not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise TypeError(f"tokens are {tokens_BT.dtype.name}: give token ids, as int32")
        if "segment_ids" in batch:  # padding may hold any number
            tokens_BT = jnp.where(batch["segment_ids"] > 0, as_int32(tokens_BT), 0)
        dtype, companion_PVD = self.config.compute_dtype, self.companion_PVD
        return look_up(dtype, self.embedding_VD, tokens_BT, companion_PVD)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] in float32."""
        weight, dims, _ = self.unembedding()
        hidden_BTD = gather_time(hidden_BTD)
        return constrain(einsum(f"BTD,{dims}->BTV", hidden_BTD, weight, jnp.float32), "BTV")

    def unembedding(self) -> Unembedding:
        """Returns the weight that makes logits."""
        if self.config.tied_embeddings:
            return Unembedding(self.embedding_VD, "VD", self.companion_PVD)
        if not self.makes_logits:
            raise ValueError("this Encoder has no unembedding: make it with makes_logits=True")
        return Unembedding(self.unembedding_DV, "DV")


def _hidden_spec(rows: PartitionSpec) -> PartitionSpec:
    """Returns the spec of hidden states or logits, given that of the first argument."""
    return PartitionSpec(*rows[:2])


class Transformer(nn.Module):
    """Predicts each next token with a decoder alone.

    `apply(variables, batch, cache)` gives hidden states, and `unembed` makes logits of them.
    `batch` holds `tokens` [B, T], and may hold `segment_ids` (0 is padding) and `positions` [B, T]
    where rows pack several documents. With `moe.jitter`, a training batch holds `row_keys` [B], a
    random key for each row, and evaluation uses `without_jitter()`.

    A token outside [0, V) makes hidden states of its row NaN, unless it is padding. So does a
    token that has no room in the cache (`cache.fits_cache`), which holds one document in each row.

    `capture` names the arrays of each layer to return as well: "residual" is the layer's output
    [B, T, D], and "experts" are the experts that a sparse layer chose, [B, T, A].
    """

    config: ModelConfig
    capture: tuple[str, ...] = ()
    schedule: Schedule | None = None  # of a pipeline, on whose stages the model is applied

    def setup(self) -> None:
        self.vocabulary = Vocabulary(self.config)
        self.stack = Stack(self.config, capture=self.capture, schedule=self.schedule)
        # The parameters of both lie directly in the model's tree, under no names of their own.
        nn.share_scope(self, self.vocabulary)
        nn.share_scope(self, self.stack)

    @on_auto_axes(output_specs)
    def __call__(self, batch: Batch, cache: StackCache | None = None) -> Output:
        """Returns hidden states, statistics, and the cache with the batch's tokens in it."""
        check_static("tokens", batch["tokens"].shape)
        x_BTD = self.embed(batch)
        if cache is not None:
            fits_BT = fits_cache(cache[0][0].attention, batch)
            x_BTD = jnp.where(fits_BT[..., None], x_BTD, jnp.nan)
        return self.stack(x_BTD, TokenInfo.from_batch(batch, self.config), cache)

    def without_jitter(self) -> "Transformer":
        """Returns the same model for evaluation, in which nothing is random."""
        return self.clone(config=self.config.without_jitter())

    @on_auto_axes(_hidden_spec)
    def embed(self, batch: Batch) -> jax.Array:
        """Returns the embeddings of `tokens`, [B, T, D], in the compute dtype."""
        return self.vocabulary.embed(batch)

    @on_auto_axes(_hidden_spec)
    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] in float32."""
        return self.vocabulary.unembed(hidden_BTD)

    def unembedding(self) -> Unembedding:
        """Returns the weight that makes logits, for a loss that makes few of them at a time."""
        return self.vocabulary.unembedding()

    def init_cache(self, batch_size: int, length: int) -> StackCache:
        """Returns an empty key/value cache for rows of at most `length` tokens."""
        return init_stack_cache(self.config, batch_size, length)


class Encoder(nn.Module):
    """Encodes tokens, each of which sees its whole segment, before and after it.

    `apply(variables, batch)` gives hidden states. The fields of `batch` and the names in `capture`
    are those of `Transformer`. Since no token is to be predicted from those before it, experts may
    choose their tokens (`moe.router="expert_choice"`). With `makes_logits` it has an `unembed`, for
    tasks that predict the tokens themselves.
    """

    config: ModelConfig
    capture: tuple[str, ...] = ()
    makes_logits: bool = False
    schedule: Schedule | None = None  # of a pipeline, on whose stages the model is applied

    def setup(self) -> None:
        self.vocabulary = Vocabulary(self.config, self.makes_logits)
        self.stack = Stack(self.config, causal=False, capture=self.capture, schedule=self.schedule)
        # The parameters of both lie directly in the model's tree, under no names of their own.
        nn.share_scope(self, self.vocabulary)
        nn.share_scope(self, self.stack)

    @on_auto_axes(output_specs)
    def __call__(self, batch: Batch) -> Output:
        """Returns hidden states and statistics."""
        check_static("tokens", batch["tokens"].shape)
        return self.stack(self.embed(batch), TokenInfo.from_batch(batch, self.config))

    def without_jitter(self) -> "Encoder":
        """Returns the same model for evaluation, in which nothing is random."""
        return self.clone(config=self.config.without_jitter())

    @on_auto_axes(_hidden_spec)
    def embed(self, batch: Batch) -> jax.Array:
        """Returns the embeddings of `tokens`, [B, T, D], in the compute dtype."""
        return self.vocabulary.embed(batch)

    @on_auto_axes(_hidden_spec)
    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] in float32. The encoder must have been made with them."""
        return self.vocabulary.unembed(hidden_BTD)

    def unembedding(self) -> Unembedding:
        """Returns the weight that makes logits, for a loss that makes few of them at a time."""
        return self.vocabulary.unembedding()


class EncoderDecoder(nn.Module):
    """Decodes tokens that also read the output of an encoder (Vaswani et al. 2017).

    `batch` holds the fields of `Transformer` for the decoder, and `encoder_tokens` [B, S] for the
    encoder, with `encoder_segment_ids` and `encoder_positions` where rows pack several documents:
    segment i of a row reads segment i of the encoder's row. Both parts share one embedding.

    With a cache, the first batch is a prompt, with `encoder_tokens` and without `positions`. Later
    batches have `positions` instead, since the cache holds what the decoder reads of the encoder.
    """

    config: ModelConfig  # of the decoder
    encoder_config: ModelConfig
    capture: tuple[str, ...] = ()

    def setup(self) -> None:
        _check_pair(self.config, self.encoder_config)
        self.vocabulary = Vocabulary(self.config)
        nn.share_scope(self, self.vocabulary)
        self.encoder = Stack(self.encoder_config, causal=False, capture=self.capture)
        self.decoder = Stack(
            self.config,
            cross_attention=True,
            capture=self.capture,
            # Layers are numbered through both parts, so that no two share their random draws.
            first_layer=self.encoder_config.num_layers,
        )

    @on_auto_axes(output_specs)
    def __call__(self, batch: Batch, cache: StackCache | None = None) -> Output:
        """Returns the decoder's hidden states, and the statistics of decoder and encoder."""
        _check_fields(batch, cache)
        check_static("tokens", batch["tokens"].shape)
        tokens = TokenInfo.from_batch(batch, self.config)
        x_BTD = self.embed(batch)
        if cache is not None:
            fits_BT = fits_cache(cache[0][0].attention, batch)
            x_BTD = jnp.where(fits_BT[..., None], x_BTD, jnp.nan)
        if "encoder_tokens" not in batch:
            return self.decoder(x_BTD, tokens, cache)
        encoder_batch = _encoder_batch(batch)
        segment_ids_BS = encoder_batch["segment_ids"]
        encoded = self.encode(batch)
        if cache is not None and (memory_cache := cache[0][0].cross_attention) is not None:
            fits_BS = fits_memory_cache(memory_cache, segment_ids_BS, batch)
            x_BTD = jnp.where(jnp.all(fits_BS, axis=1)[:, None, None], x_BTD, jnp.nan)
        memory = Memory(join_time(encoded.hidden), segment_ids_BS)
        tokens = dataclasses.replace(tokens, memory=memory)
        output = self.decoder(x_BTD, tokens, cache)
        # The decoder's statistics come first because its name sorts first in the parameter tree.
        # The update of the routers' biases relies on this order.
        return dataclasses.replace(
            output,
            stats=(*output.stats, *encoded.stats),
            captured=(*output.captured, *encoded.captured),
        )

    @on_auto_axes(output_specs)
    def encode(self, batch: Batch) -> Output:
        """Returns only the encoder's output, from the fields that start with `encoder_`."""
        encoder_batch = _encoder_batch(batch)
        check_static("encoder_tokens", encoder_batch["tokens"].shape)
        tokens = TokenInfo.from_batch(encoder_batch, self.encoder_config)
        return self.encoder(self.embed(encoder_batch), tokens)

    def without_jitter(self) -> "EncoderDecoder":
        """Returns the same model for evaluation, in which nothing is random."""
        return self.clone(
            config=self.config.without_jitter(),
            encoder_config=self.encoder_config.without_jitter(),
        )

    @on_auto_axes(_hidden_spec)
    def embed(self, batch: Batch) -> jax.Array:
        """Returns the embeddings of `tokens`, [B, T, D], in the compute dtype."""
        return self.vocabulary.embed(batch)

    @on_auto_axes(_hidden_spec)
    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] in float32."""
        return self.vocabulary.unembed(hidden_BTD)

    def unembedding(self) -> Unembedding:
        """Returns the weight that makes logits, for a loss that makes few of them at a time."""
        return self.vocabulary.unembedding()

    def init_cache(self, batch_size: int, length: int, encoder_length: int) -> StackCache:
        """Returns an empty cache, for rows of at most `length` and `encoder_length` tokens."""
        return init_stack_cache(self.config, batch_size, length, encoder_length)


def _check_pair(decoder: ModelConfig, encoder: ModelConfig) -> None:
    """Raises ConfigError where an encoder and a decoder cannot share tables and statistics."""
    for name in ("vocab_size", "model_dim", "compute_dtype"):
        ours, theirs = getattr(decoder, name), getattr(encoder, name)
        if ours != theirs:
            raise ConfigError(
                f"{name}={ours!r} of the decoder differs from the encoder's {theirs!r}: "
                f"set both to one {name}"
            )
    numbers_of_experts = {decoder.moe.num_experts, encoder.moe.num_experts} - {0}
    if len(numbers_of_experts) > 1:
        raise ConfigError(
            f"moe.num_experts={decoder.moe.num_experts} of the decoder differs from the "
            f"encoder's {encoder.moe.num_experts}, and one table holds the loads of both: "
            "set both to one moe.num_experts, or one of them to 0"
        )


def _check_fields(batch: Batch, cache: StackCache | None) -> None:
    """Raises ValueError for a batch that lacks what the decoder reads, or gives it twice."""
    if cache is None:
        if "encoder_tokens" not in batch:
            raise ValueError(
                "the batch has no encoder_tokens, which the decoder reads: "
                "add encoder_tokens, or pass the cache of a batch that had them"
            )
        return
    if "positions" in batch and "encoder_tokens" in batch:
        raise ValueError(
            "the batch has positions and encoder_tokens, but the cache already holds the encoder's "
            "output, which came with the prompt: leave encoder_tokens out"
        )
    if "positions" not in batch and "encoder_tokens" not in batch:
        raise ValueError(
            "the batch has neither positions nor encoder_tokens: "
            "add encoder_tokens to a prompt, and positions to the tokens after it"
        )


def _encoder_batch(batch: Batch) -> Batch:
    """Returns the encoder's fields of a batch, under the names that an encoder's own batch has."""
    prefix = "encoder_"
    fields = {
        name.removeprefix(prefix): value
        for name, value in batch.items()
        if name.startswith(prefix) or name == "row_keys"
    }
    one_document_BS = jnp.ones(fields["tokens"].shape, jnp.int32)
    return {"segment_ids": one_document_BS} | fields
