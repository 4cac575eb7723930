"""The Transformer: blocks, groups of scanned layers, and the decoder around them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from moe.attention import Attention, Positions, init_cache
from moe.config import ModelConfig
from moe.layers import FeedForward, RMSNorm, einsum
from moe.parameters import parameter
from moe.sharding import constrain

Batch = dict[str, jax.Array]


@struct.dataclass
class Output:
    """What a model returns: normalised hidden states [B, T, D], sums and counts for losses and statistics, the cache."""

    hidden: jax.Array
    aux: Any
    cache: Any


class Block(nn.Module):
    """A pre-norm layer (Xiong et al. 2020): attention, then a feed-forward part, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions: Positions, cache: Any = None) -> tuple[jax.Array, Any, Any]:
        """Returns the residual stream [B, T, D], this layer's sums, and its cache."""
        epsilon = self.config.norm_epsilon
        mixed_BTD, cache = Attention(self.config, name="attention")(RMSNorm(epsilon, name="attention_norm")(x_BTD), positions, cache)
        x_BTD = constrain(x_BTD + mixed_BTD, "BTD")
        x_BTD = x_BTD + FeedForward(self.config, name="feed_forward")(RMSNorm(epsilon, name="feed_forward_norm")(x_BTD))
        return constrain(x_BTD, "BTD"), {}, cache


class Period(nn.Module):
    """One period of a group of layers: a block of each kind, in order."""

    config: ModelConfig
    kinds: tuple[str, ...]

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions: Positions, caches: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        # Inside a loop nothing can undo the recomputation; unrolled, the compiler would merge it with the forward pass.
        remat_block = nn.remat(Block, prevent_cse=not self.config.scan_layers)
        block = {"none": Block, "full": remat_block}[self.config.remat]
        auxes, new_caches = [], []
        for index, _ in enumerate(self.kinds):
            cache = None if caches is None else caches[index]
            x_BTD, aux, cache = block(self.config, name=f"block_{index}")(x_BTD, positions, cache)
            auxes.append(aux)
            new_caches.append(cache)
        return x_BTD, (tuple(auxes), None if caches is None else tuple(new_caches))


def scan_periods(config: ModelConfig, kinds: tuple[str, ...], repeats: int, name: str) -> nn.Module:
    """A group: one Period looped over parameters, sums and caches whose first dimension is the repeat."""
    return nn.scan(
        Period,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
        unroll=1 if config.scan_layers else repeats,
        metadata_params={"dim": "L"},
    )(config, kinds, name=name)


class Transformer(nn.Module):
    """A decoder-only language model. `apply(variables, batch, cache)` gives hidden states; `unembed` makes logits of them.

    `batch` holds `tokens` [B, T], and may hold `segment_ids` and `positions` [B, T] where rows pack several documents.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        shape = (c.vocab_size, c.model_dim)
        self.embedding_VD = parameter(self, "embedding", "VD", shape, kind="embedding", fan_in=c.model_dim)
        self.groups = [scan_periods(c, kinds, repeats, name=f"layers_{index}") for index, (kinds, repeats) in enumerate(c.layer_groups)]
        self.final_norm = RMSNorm(c.norm_epsilon)
        if not c.tied_embeddings:
            self.unembedding_DV = parameter(self, "unembedding", "DV", shape[::-1], kind="unembedding", fan_in=c.model_dim)

    def __call__(self, batch: Batch, cache: Any = None) -> Output:
        hidden_BTD, aux, cache = self.layers(self.embed(batch), batch, cache)
        return Output(self.final_norm(hidden_BTD), aux, cache)

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings [B, T, D] in the compute dtype."""
        # Gathered over fsdp first, as every weight is: looking up in a table split along D would move activations instead.
        embedding_VD = constrain(self.embedding_VD.astype(self.config.compute_dtype), "V-")
        return constrain(jnp.take(embedding_VD, batch["tokens"], axis=0), "BTD")

    def layers(self, x_BTD: jax.Array, batch: Batch, cache: Any = None) -> tuple[jax.Array, Any, Any]:
        """All blocks: the residual stream [B, T, D], and per group the sums and caches, stacked over its repeats."""
        positions = Positions.of(batch, self.config)
        auxes, caches = [], []
        for index, group in enumerate(self.groups):
            x_BTD, (aux, new_cache) = group(x_BTD, positions, None if cache is None else cache[index])
            auxes.append(aux)
            caches.append(new_cache)
        return x_BTD, tuple(auxes), None if cache is None else tuple(caches)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32."""
        if self.config.tied_embeddings:
            logits_BTV = einsum("BTD,VD->BTV", hidden_BTD, self.embedding_VD, jnp.float32)
        else:
            logits_BTV = einsum("BTD,DV->BTV", hidden_BTD, self.unembedding_DV, jnp.float32)
        return constrain(logits_BTV, "BTV")

    def init_cache(self, batch_size: int, length: int) -> Any:
        """An empty key/value cache for rows of at most `length` tokens."""
        layer = init_cache(self.config, batch_size, length)
        stack = lambda repeats: jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), layer)  # noqa: E731
        return tuple(tuple(stack(repeats) for _ in kinds) for kinds, repeats in self.config.layer_groups)
