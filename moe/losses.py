"""Computes losses and statistics as sums and counts.

Sums add up over microbatches and shards. This file alone divides them, once, by global counts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp

from moe.config import MoEConfig
from moe.parallel.mesh import constrain
from moe.parallel.sequence import join_time

# Arrays by name, and under "router" the RouterStats of all sparse layers (None for a dense model).
Sums = dict[str, Any]


class RouterStats(NamedTuple):
    """Says what a router did with a batch, as float32 sums over its tokens.

    A sparse layer returns scalars and `load` [E], which `in_layer_order` stacks to [L] and [L, E].
    The fields in `MEANS`, from `balance_loss` on, are sums here. `metrics` returns their means
    under the same names.
    """

    tokens: jax.Array  # the number of real tokens
    load: jax.Array  # the number of assignments that each expert got from the router
    dropped: jax.Array  # the number of assignments that no expert had room for
    balance_loss: jax.Array
    z_loss: jax.Array
    logit_norm: jax.Array
    router_entropy: jax.Array  # of the distribution over experts, in nats
    top1_margin: jax.Array  # between the two largest probabilities


# The fields of RouterStats whose mean over tokens is reported.
MEANS = ("balance_loss", "z_loss", "logit_norm", "router_entropy", "top1_margin")


def in_layer_order(groups: Any) -> Any:
    """Stacks the statistics or captured arrays of a model's layers to [L, ...], in layer order.

    `groups[group][block]` is a pytree of arrays [repeats, ...], as in `Output.stats` and
    `Output.captured`, where `block` is the place of a block in the group's period. Layers that have
    nothing, as dense layers have no statistics, are left out. The result is None if no layer has
    anything.
    """
    stacks = []
    for group in groups:
        kinds = [kind for kind in group if kind]
        if kinds:
            stacks.append(jax.tree.map(_interleave, *kinds))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks) if stacks else None


def _interleave(*kinds: jax.Array) -> jax.Array:
    """Joins arrays [repeats, ...] so that each repeat's kinds follow one another, as layers do."""
    return jnp.stack(kinds, axis=1).reshape(-1, *kinds[0].shape[1:])


def objective(sums: Sums, global_counts: Sums, config: MoEConfig) -> jax.Array:
    """Returns a microbatch's part of what training minimises.

    That is the task's loss, and the weighted means over sparse layers of the router's losses. The
    parts add up to the whole batch's objective. Only a balance loss of scope "batch" is different:
    its batch is the microbatch.
    """
    total = mean(sums["loss"], global_counts["targets"])
    if sums["router"]:
        stats: RouterStats = sums["router"]
        weighted_L = config.balance_weight * stats.balance_loss + config.z_weight * stats.z_loss
        total += jnp.mean(weighted_L) / jnp.maximum(global_counts["tokens"], 1.0)
    return total


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """Divides a sum by its count. The mean of nothing is 0."""
    return total / jnp.maximum(count, 1.0)


def metrics(sums: Sums) -> dict[str, Any]:
    """Returns means: `loss` per target, and `router`, each sparse layer's statistics.

    `sums` has to cover everything that is averaged. A dense model has no `router`.
    """
    loss = mean(sums["loss"], sums["targets"])
    if not sums["router"]:
        return {"loss": loss}
    return {"loss": loss, "router": router_metrics(sums["router"])}


def router_metrics(stats: RouterStats) -> dict[str, jax.Array]:
    """Returns each sparse layer's statistics, [L], from sums over all tokens.

    `load` [L, E] is each expert's share of the assignments. It is summarised by `max_vio`, (largest
    - mean) / mean (Wang et al. 2024, eq. 4); `load_entropy`, divided by log E so that an even load
    has 1; `load_variation`, standard deviation / mean; and `dead_experts`, the number of experts
    without an assignment. The rest are means over tokens of the fields of RouterStats.
    """
    assignments_L = jnp.maximum(jnp.sum(stats.load, axis=-1), 1.0)
    load_LE = stats.load / assignments_L[:, None]
    num_experts = load_LE.shape[-1]
    entropy_L = jnp.sum(jax.scipy.special.entr(load_LE), axis=-1)
    tokens_L = jnp.maximum(stats.tokens, 1.0)
    return {
        "load": load_LE,
        "max_vio": jnp.max(load_LE, axis=-1) * num_experts - 1,
        "load_entropy": entropy_L / math.log(max(num_experts, 2)),
        "load_variation": jnp.std(load_LE, axis=-1) * num_experts,
        "dead_experts": jnp.sum(load_LE == 0, axis=-1, dtype=jnp.float32),
        "dropped_fraction": stats.dropped / assignments_L,
    } | {name: getattr(stats, name) / tokens_L for name in MEANS}


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """Returns the sum over unmasked positions of the cross-entropy in nats, in float32.

    The cross-entropy of a position is -log softmax(unembed(hidden))[target]. Logits exist for
    `chunk` positions of each row at a time, and the backward pass computes them again. A masked
    position changes nothing, even if it holds NaN. An unmasked target outside [0, V) makes the sum
    and its gradients NaN.
    """
    return cross_entropy_sums(hidden_BTD, unembed, targets_BT, mask_BT, (), chunk)[0]


def cross_entropy_sums(
    hidden_BTD: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    parts_BT: tuple[jax.Array, ...],
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Returns `cross_entropy_sum`, and then its part at the positions of each mask in `parts_BT`.

    The logits are made once for all of them. A position that `mask_BT` hides is in no part.
    """

    def chunk_sum(
        totals: tuple[jax.Array, ...], inputs: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, ...], None]:
        hidden, targets, mask, *parts = inputs
        sums = _cross_entropy_sums(hidden, unembed, targets, mask, tuple(parts))
        return tuple(total + sum_ for total, sum_ in zip(totals, sums, strict=True)), None

    length = targets_BT.shape[1]
    zeros = tuple(jnp.zeros((), jnp.float32) for _ in range(1 + len(parts_BT)))
    if not length:
        return zeros
    # The chunks get nearly equal sizes, so that the last one needs less padding.
    num_chunks = -(-length // chunk)
    chunk = -(-length // num_chunks)
    if chunk == length:
        return _cross_entropy_sums(hidden_BTD, unembed, targets_BT, mask_BT, parts_BT)
    padding = -length % chunk
    arrays = (hidden_BTD, targets_BT, mask_BT, *parts_BT)
    inputs = tuple(_split_time(x, chunk, padding) for x in arrays)
    totals, _ = jax.lax.scan(jax.checkpoint(chunk_sum, prevent_cse=False), zeros, inputs)
    return totals


def _cross_entropy_sums(
    hidden_BTD: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    parts_BT: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Returns `cross_entropy_sums` with the logits of all positions made at once."""
    # Laid out here, the mask doesn't make the compiler split hidden states as it splits gradients.
    mask_BT = constrain(mask_BT, "BT")
    # Masked positions become zeros before anything multiplies them: 0 times NaN would be NaN, also
    # in the gradient of the unembedding.
    logits_BTV = unembed(jnp.where(mask_BT[..., None], hidden_BTD, 0)).astype(jnp.float32)
    # A comparison rather than a gather: it fuses, its gradient needs no scatter, and it splits over
    # vocabulary shards.
    is_target_BTV = jax.nn.one_hot(targets_BT.astype(jnp.int32), logits_BTV.shape[-1], dtype=bool)
    target_logits_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT
    in_vocabulary_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    # A product makes the gradient NaN as well; otherwise it would be the logsumexp's alone.
    losses_BT = losses_BT * jnp.where(in_vocabulary_BT | jnp.logical_not(mask_BT), 1.0, jnp.nan)
    losses_BT = jnp.where(mask_BT, losses_BT, 0.0)
    parts = tuple(jnp.sum(jnp.where(part_BT, losses_BT, 0.0)) for part_BT in parts_BT)
    return jnp.sum(losses_BT), *parts


def _split_time(x_BT: jax.Array, chunk: int, padding: int) -> jax.Array:
    """Splits [B, T, ...] into [number of chunks, B, chunk, ...], padding T with zeros.

    Of n chunks, chunk m has the positions m, m + n, and so on. So where devices hold parts of T,
    each has positions in every chunk, and moves none. Hidden states of all chunks are gathered over
    the tensor axis at once: in the loop that would be done twice.
    """
    padded = jnp.pad(x_BT, ((0, 0), (0, padding)) + ((0, 0),) * (x_BT.ndim - 2))
    chunks = einops.rearrange(padded, "b (c n) ... -> n b c ...", c=chunk)
    return join_time(chunks) if chunks.ndim == 4 else chunks
