"""The Transformer: blocks, groups of scanned layers, and the decoder around them."""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from moe.config import ModelConfig
from moe.model.attention import Attention, Positions, fits_cache, init_cache
from moe.model.experts import MoE, Tokens
from moe.model.layers import FeedForward, RMSNorm, check_static, einsum, look_up, residual_scale
from moe.parallel.mesh import constrain, on_auto_axes
from moe.parameters import parameter

Batch = dict[str, jax.Array]


@struct.dataclass
class Output:
    """What a model returns: normalised hidden states [B, T, D], sums and counts for losses and
    statistics, the cache.

    `aux[group][kind]` holds the sums of a sparse layer (`routing.Routing`), stacked over the
    group's repeats, and is empty for dense ones; `captured[group][kind]` what was asked for by
    name, stacked alike.
    """

    hidden: jax.Array
    aux: Any
    cache: Any
    captured: Any = None


def _output_specs(rows: PartitionSpec) -> Output:
    """How an Output lies whose hidden states are split as `rows`: sums are whole everywhere."""
    rows_BT = PartitionSpec(*rows[:2])
    return Output(
        rows_BT,
        aux=PartitionSpec(),
        cache=PartitionSpec(None, *rows[:1]),
        captured=PartitionSpec(None, *rows[:2]),
    )


class Block(nn.Module):
    """A pre-norm layer (Xiong et al. 2020): attention, then a feed-forward part, each added to the
    residual stream.
    """

    config: ModelConfig
    kind: str  # "dense" or "moe"
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        tokens: Tokens,
        cache: Any = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any, Any, Any]:
        """Returns the residual stream [B, T, D], this layer's sums (none where it is dense), what
        is captured of it, and the cache.

        `cache` is that of a stack of layers, and `layer` this one's place in it.
        """
        c, scale = self.config, residual_scale(self.config)
        normed_BTD = RMSNorm(c.norm_epsilon, name="attention_norm")(x_BTD)
        mixed_BTD, cache = Attention(c, name="attention")(normed_BTD, positions, cache, layer)
        x_BTD = constrain(x_BTD + mixed_BTD, "BTD")
        normed_BTD, stats, seen = RMSNorm(c.norm_epsilon, name="feed_forward_norm")(x_BTD), None, {}
        if self.kind == "moe":
            y_BTD, routed = MoE(c.moe, scale, name="moe")(normed_BTD, tokens)
            stats, seen = routed.stats, {"experts": routed.experts_BTA}
        else:
            y_BTD = FeedForward(c.feed_forward_dim, scale, name="feed_forward")(normed_BTD)
        seen["residual"] = x_BTD = constrain(x_BTD + y_BTD, "BTD")
        return (
            x_BTD,
            stats,
            {name: value for name, value in seen.items() if name in self.capture},
            cache,
        )


class Period(nn.Module):
    """One period of a group of layers: a block of each kind, in order."""

    config: ModelConfig
    kinds: tuple[str, ...]
    capture: tuple[str, ...]
    first_layer: int  # of the group

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], positions: Positions, tokens: Tokens, repeat: jax.Array
    ) -> tuple[tuple[jax.Array, Any], tuple[Any, Any]]:
        # The caches of all repeats are carried, and each written in place: looped over as
        # parameters are, they would be copied whole.
        x_BTD, caches = carry
        # Inside a loop nothing can undo the recomputation; unrolled, the compiler would merge it
        # with the forward pass.
        remat_block = nn.remat(Block, prevent_cse=not self.config.scan_layers)
        block = {"none": Block, "full": remat_block}[self.config.remat]
        auxes, captured, new_caches = [], [], []
        for index, kind in enumerate(self.kinds):
            cache = None if caches is None else caches[index]
            layer_tokens = tokens.of_layer(self.first_layer + len(self.kinds) * repeat + index)
            layer = block(self.config, kind, self.capture, name=f"block_{index}")
            x_BTD, aux, seen, cache = layer(x_BTD, positions, layer_tokens, cache, repeat)
            auxes.append(aux)
            captured.append(seen)
            new_caches.append(cache)
        return (x_BTD, None if caches is None else tuple(new_caches)), (
            tuple(auxes),
            tuple(captured),
        )


def scan_periods(
    config: ModelConfig,
    kinds: tuple[str, ...],
    repeats: int,
    capture: tuple[str, ...],
    first_layer: int,
    name: str,
) -> nn.Module:
    """A group: one Period looped over parameters and sums whose first dimension is the repeat."""
    return nn.scan(
        Period,
        variable_axes={"params": 0, "router_state": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=repeats,
        unroll=1 if config.scan_layers else repeats,
        metadata_params={"dim": "L"},
    )(config, kinds, capture, first_layer, name=name)


class Transformer(nn.Module):
    """A decoder-only language model. `apply(variables, batch, cache)` gives hidden states;
    `unembed` makes logits of them.

    `batch` holds `tokens` [B, T], and may hold `segment_ids` (0 is padding) and `positions` [B, T]
    where rows pack several documents. With `moe.jitter`, a training batch holds `row_keys` [B], a
    random key for each row, and evaluation uses `without_jitter()`. A token outside [0, V) makes
    hidden states of its row NaN, unless it is padding. So does a token that the cache cannot take
    (`attention.fits_cache`): a cache holds one document in each row. `capture` names what else to
    return of each layer: "residual" [B, T, D], its output, and "experts" [B, T, A], a sparse one's
    choice.
    """

    config: ModelConfig
    capture: tuple[str, ...] = ()

    def setup(self) -> None:
        c = self.config
        shape = (c.vocab_size, c.model_dim)
        self.embedding_VD = parameter(
            self, "embedding", "VD", shape, kind="embedding", fan_in=c.model_dim
        )
        first_layers = itertools.accumulate(
            (len(kinds) * repeats for kinds, repeats in c.layer_groups), initial=0
        )
        self.groups = [
            scan_periods(c, kinds, repeats, self.capture, first_layer, name=f"layers_{index}")
            for index, ((kinds, repeats), first_layer) in enumerate(
                zip(c.layer_groups, first_layers, strict=False)
            )
        ]
        self.final_norm = RMSNorm(c.norm_epsilon)
        if not c.tied_embeddings:
            self.unembedding_DV = parameter(
                self, "unembedding", "DV", shape[::-1], kind="unembedding", fan_in=c.model_dim
            )

    @on_auto_axes(_output_specs)
    def __call__(self, batch: Batch, cache: Any = None) -> Output:
        check_static("tokens", batch["tokens"].shape)
        output = self.layers(self.embed(batch), batch, cache)
        return output.replace(hidden=self.final_norm(output.hidden))

    def without_jitter(self) -> "Transformer":
        """The same model for evaluation, in which nothing is random."""
        moe = dataclasses.replace(self.config.moe, jitter=0.0)
        return (
            self.clone(config=dataclasses.replace(self.config, moe=moe))
            if self.config.moe.jitter
            else self
        )

    @on_auto_axes(lambda rows: PartitionSpec(*rows[:2]))
    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings [B, T, D] in the compute dtype."""
        tokens_BT = batch["tokens"]
        if not tokens_BT.size:
            raise ValueError(
                f"tokens have shape {tokens_BT.shape}: give at least one row of at least one token"
            )
        if "segment_ids" in batch:
            tokens_BT = jnp.where(batch["segment_ids"] > 0, tokens_BT, 0)
        return constrain(look_up(self.config.compute_dtype, self.embedding_VD, tokens_BT), "BTD")

    @on_auto_axes(_output_specs)
    def layers(self, x_BTD: jax.Array, batch: Batch, cache: Any = None) -> Output:
        """All blocks: an Output whose `hidden` is the residual stream [B, T, D], before the final
        norm.
        """
        positions, tokens = Positions.of(batch, self.config), Tokens.of(batch)
        if cache is not None:
            x_BTD = jnp.where(fits_cache(cache[0][0], batch)[..., None], x_BTD, jnp.nan)
        stacks, caches = [], []
        for index, (group, (_, repeats)) in enumerate(
            zip(self.groups, self.config.layer_groups, strict=True)
        ):
            carry = x_BTD, None if cache is None else cache[index]
            (x_BTD, group_caches), stacked = group(
                carry, positions, tokens, jnp.arange(repeats, dtype=jnp.int32)
            )
            stacks.append(stacked)
            caches.append(group_caches)
        aux, captured = zip(*stacks, strict=True)
        return Output(x_BTD, aux, None if cache is None else tuple(caches), captured)

    @on_auto_axes(lambda rows: PartitionSpec(*rows[:2]))
    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32."""
        if self.config.tied_embeddings:
            logits_BTV = einsum("BTD,VD->BTV", hidden_BTD, self.embedding_VD, jnp.float32)
        else:
            logits_BTV = einsum("BTD,DV->BTV", hidden_BTD, self.unembedding_DV, jnp.float32)
        return constrain(logits_BTV, "BTV")

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty key/value cache for rows of at most `length` tokens."""
        return tuple(
            tuple(init_cache(self.config, repeats, batch_size, length) for _ in kinds)
            for kinds, repeats in self.config.layer_groups
        )
