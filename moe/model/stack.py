"""Defines blocks, and the stack of blocks that decoders and encoders are made of."""

import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from moe.config import ConfigError, ModelConfig, Schedule
from moe.losses import RouterStats
from moe.model.attention import Attention, CrossAttention
from moe.model.cache import Cache, MemoryCache, init_cache, init_memory_cache
from moe.model.experts import MoE
from moe.model.layers import FeedForward, RMSNorm, residual_scale
from moe.model.tokens import TokenInfo
from moe.parallel.collectives.weights import weights_are_split
from moe.parallel.mesh import constrain, on_auto_axes
from moe.parallel.pipeline import run_layers
from moe.parallel.remat import make_policy, name_layer_input
from moe.parallel.sequence import name_between_parts


@struct.dataclass
class Output:
    """Holds what a model returns.

    `hidden` is [B, T, D], after the final norm. `stats[group][block]` holds the sums and counts of
    a sparse layer's router, stacked over the group's repeats, and is None for dense layers. `block`
    is the place of a block in the group's period. `captured[group][block]` holds the arrays that
    were asked for by name, stacked in the same way.
    """

    hidden: jax.Array
    stats: Any
    cache: Any = None
    captured: Any = None


class BlockCache(NamedTuple):
    """Holds the caches of the blocks at one place of a group's period, one for each repeat."""

    attention: Cache
    cross_attention: MemoryCache | None  # None in stacks without cross-attention


# One entry for each group of a stack, which holds one cache for each block of a period.
StackCache = tuple[tuple[BlockCache, ...], ...]


class BlockOutput(NamedTuple):
    """Holds what a block returns."""

    hidden_BTD: jax.Array  # the residual stream
    stats: RouterStats | None  # None if the block is dense
    captured: dict[str, jax.Array]
    cache: BlockCache | None


class Carry(NamedTuple):
    """Holds what the loop over periods hands from one period to the next."""

    hidden_BTD: jax.Array  # the residual stream
    # The caches of all repeats are carried, and each layer writes to its own in place. If they
    # were looped over as parameters are, they would be copied whole.
    caches: tuple[BlockCache, ...] | None


CAPTURABLE = ("residual", "experts")  # the names that `capture` may have


class PeriodOutput(NamedTuple):
    """Holds what the loop stacks: the statistics and the captured arrays of a period's blocks."""

    stats: tuple[RouterStats | None, ...]
    captured: tuple[dict[str, jax.Array], ...]


class Block(nn.Module):
    """Applies a pre-norm layer (Xiong et al. 2020): attention, then a feed-forward part.

    Each part reads a norm of the residual stream and adds its output to the stream. With
    `cross_attention` a third part stands between them.
    """

    config: ModelConfig
    kind: str  # "dense" or "moe"
    causal: bool = True
    cross_attention: bool = False
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: TokenInfo,
        cache: BlockCache | None = None,
        layer: jax.Array | int = 0,
    ) -> BlockOutput:
        """Applies the parts of the layer.

        `cache` holds several layers, of which this one is number `layer`.
        """
        c = self.config
        x_BTD = name_layer_input(x_BTD)
        scale = residual_scale((3 if self.cross_attention else 2) * c.num_layers)
        attention = Attention(c, self.causal, scale, name="attention")
        normed_BTD = RMSNorm(c.norm_epsilon, name="attention_norm")(x_BTD)
        own_cache, memory_cache = (None, None) if cache is None else cache
        mixed_BTD, own_cache = attention(normed_BTD, tokens, own_cache, layer)
        x_BTD = name_between_parts(constrain(x_BTD + mixed_BTD, "BtD"))
        if self.cross_attention:
            cross_attention = CrossAttention(c, scale, name="cross_attention")
            normed_BTD = RMSNorm(c.norm_epsilon, name="cross_attention_norm")(x_BTD)
            mixed_BTD, memory_cache = cross_attention(normed_BTD, tokens, memory_cache, layer)
            x_BTD = name_between_parts(constrain(x_BTD + mixed_BTD, "BtD"))
        normed_BTD = RMSNorm(c.norm_epsilon, name="feed_forward_norm")(x_BTD)
        stats, available = None, {}
        if self.kind == "moe":
            y_BTD, routed = MoE(c.moe, scale, name="moe")(normed_BTD, tokens)
            stats, available = routed.stats, {"experts": routed.experts_BTA}
        else:
            y_BTD = FeedForward(c.feed_forward_dim, scale, name="feed_forward")(normed_BTD)
        x_BTD = constrain(x_BTD + y_BTD, "BtD")
        available["residual"] = x_BTD
        captured = {name: value for name, value in available.items() if name in self.capture}
        new_cache = None if own_cache is None else BlockCache(own_cache, memory_cache)
        return BlockOutput(x_BTD, stats, captured, new_cache)


class Period(nn.Module):
    """Applies one period of a group of layers: one block for each entry of `kinds`, in order."""

    config: ModelConfig
    kinds: tuple[str, ...]
    first_layer: int  # the number of the group's first layer
    causal: bool
    cross_attention: bool
    capture: tuple[str, ...]

    @nn.compact
    def __call__(
        self, carry: Carry, tokens: TokenInfo, repeat: jax.Array
    ) -> tuple[Carry, PeriodOutput]:
        """Applies the blocks of repeat number `repeat` of the period."""
        # Without a loop the compiler would merge the recomputation with the forward pass, unless
        # prevent_cse forbids it. Inside a loop it cannot.
        prevent_cse = not self.config.scan_layers
        block, remat = Block, self.config.remat
        if remat != "none" or weights_are_split(self.config.model_dim):
            block = nn.remat(Block, prevent_cse=prevent_cse, policy=make_policy(remat))
        x_BTD, outputs = carry.hidden_BTD, []
        for index, kind in enumerate(self.kinds):
            layer = block(
                self.config,
                kind,
                self.causal,
                self.cross_attention,
                self.capture,
                name=f"block_{index}",
            )
            number = self.first_layer + len(self.kinds) * repeat + index
            cache = None if carry.caches is None else carry.caches[index]
            output = layer(x_BTD, tokens.for_layer(number), cache, repeat)
            x_BTD = output.hidden_BTD
            outputs.append(output)
        caches = None if carry.caches is None else tuple(output.cache for output in outputs)
        stats = tuple(output.stats for output in outputs)
        captured = tuple(output.captured for output in outputs)
        return Carry(x_BTD, caches), PeriodOutput(stats, captured)


def output_specs(rows: PartitionSpec) -> Output:
    """Returns the specs of an Output, given the spec `rows` of its batch; sums are whole."""
    # A spec in the place of a part of the tree holds for all arrays in that part.
    hidden: Any = PartitionSpec(*rows[:2])
    cache: Any = PartitionSpec(None, *rows[:1])
    captured = PartitionSpec(None, *rows[:2])
    return Output(hidden, stats=PartitionSpec(), cache=cache, captured=captured)


def group_name(index: int) -> str:
    """Returns the name of a group of layers in the tree of parameters."""
    return f"layers_{index}"


class Stack(nn.Module):
    """Applies groups of layers and the final norm: a decoder if `causal`, else an encoder.

    The layers of a group repeat a period of one or more blocks. Parameters and sums are stacked
    over the repeats, whether these are looped over or unrolled.
    """

    config: ModelConfig
    causal: bool = True
    cross_attention: bool = False
    capture: tuple[str, ...] = ()
    first_layer: int = 0  # the number of the first layer, which its random draws depend on
    # How microbatches go through the stages of a pipeline, on which the stack is applied by
    # `parallel.pipeline.on_stages`; None outside of it.
    schedule: Schedule | None = None

    def setup(self) -> None:
        c = self.config
        if unknown := [name for name in self.capture if name not in CAPTURABLE]:
            listed = " and ".join(map(repr, CAPTURABLE))
            raise ValueError(f"capture has {unknown[0]!r}, which no layer has: name {listed} only")
        if self.causal and c.moe.num_experts and c.moe.router == "expert_choice":
            raise ConfigError(
                "moe.router='expert_choice' looks at later tokens, which a decoder must not: "
                "set moe.router to 'softmax'"
            )
        sizes = (len(kinds) * repeats for kinds, repeats in c.layer_groups)
        first_layers = itertools.accumulate(sizes, initial=self.first_layer)
        groups = zip(c.layer_groups, first_layers, strict=False)
        self.groups = [
            self._scan_periods(
                kinds, self._scanned(index, repeats), first_layer, name=group_name(index)
            )
            for index, ((kinds, repeats), first_layer) in enumerate(groups)
        ]
        self.final_norm = RMSNorm(c.norm_epsilon)

    def _scanned(self, group: int, repeats: int) -> int:
        """Returns how many repeats of a group are looped over at once."""
        if self.schedule is None or group != self.config.pipelined_group:
            return repeats
        return repeats // (self.schedule.stages * self.schedule.rounds)

    def _scan_periods(
        self, kinds: tuple[str, ...], repeats: int, first_layer: int, name: str
    ) -> nn.Module:
        """Returns a group: one Period, looped over parameters that are stacked over the repeats."""
        scanned = nn.scan(
            Period,
            variable_axes={"params": 0, "router_state": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]  # Flax says int
            length=repeats,
            unroll=1 if self.config.scan_layers else repeats,
            metadata_params={"dim": "L"},
            # The check traces the period once more, to find broadcast variables, of which there are
            # none. Without it, other parameters would be drawn from the same key.
            check_constancy_invariants=self.is_mutable_collection("params"),
        )
        return scanned(
            self.config,
            kinds,
            first_layer,
            self.causal,
            self.cross_attention,
            self.capture,
            name=name,
        )

    def _run_stages(
        self, group: nn.Module, x_BTD: jax.Array, tokens: TokenInfo, schedule: Schedule
    ) -> tuple[jax.Array, PeriodOutput]:
        """Applies a group of layers as the stages of a pipeline. It returns nothing captured."""
        unbound, variables = group.unbind()

        def layers(
            piece: Any, numbers: jax.Array, x_BTD: jax.Array, tokens: TokenInfo
        ) -> tuple[jax.Array, Any]:
            result: Any = unbound.apply(piece, Carry(x_BTD, None), tokens, numbers)
            carry, output = result
            return carry.hidden_BTD, output.stats

        x_BTD, stats = run_layers(layers, variables, x_BTD, tokens, schedule, self.config.remat)
        return x_BTD, PeriodOutput(stats, captured=())

    @on_auto_axes(output_specs)
    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo, cache: StackCache | None = None
    ) -> Output:
        """Applies all layers and the final norm to embeddings [B, T, D]."""
        outputs, new_caches = [], []
        for index, group in enumerate(self.groups):
            _, repeats = self.config.layer_groups[index]
            if self.schedule and index == self.config.pipelined_group:
                x_BTD, output = self._run_stages(group, x_BTD, tokens, self.schedule)
                outputs.append(output)
                continue
            carry = Carry(x_BTD, None if cache is None else cache[index])
            carry, output = group(carry, tokens, jnp.arange(repeats, dtype=jnp.int32))
            x_BTD = carry.hidden_BTD
            outputs.append(output)
            new_caches.append(carry.caches)
        return Output(
            self.final_norm(x_BTD),
            stats=tuple(output.stats for output in outputs),
            cache=None if cache is None else tuple(new_caches),
            captured=tuple(output.captured for output in outputs),
        )


def init_stack_cache(
    config: ModelConfig, batch_size: int, length: int, memory_length: int | None = None
) -> StackCache:
    """Returns an empty cache of a decoder, for rows of at most `length` tokens.

    For a decoder with cross-attention it also has room for the keys and values of a memory of at
    most `memory_length` tokens a row.
    """

    def block_cache(repeats: int) -> BlockCache:
        cache = init_cache(config, repeats, batch_size, length)
        if memory_length is None:
            return BlockCache(cache, None)
        return BlockCache(cache, init_memory_cache(config, repeats, batch_size, memory_length))

    return tuple(
        tuple(block_cache(repeats) for _ in kinds) for kinds, repeats in config.layer_groups
    )
