"""Computes losses and statistics as sums and counts.

Sums add up over microbatches and shards. Only this file divides them, once, by global counts.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.config import MoEConfig

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
