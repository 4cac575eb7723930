"""Losses as sums and counts. Sums add up over microbatches and shards; this file alone divides
them, once, by global counts.
"""

import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp

from moe.config import MoEConfig

Sums = dict[
    str, Any
]  # arrays, and under "router" a dict of each sparse layer's, stacked [L, ...]; additive


def router_sums(aux: Any) -> Sums:
    """The sums of a model's sparse layers, each [L, ...] in the order of the layers; empty for a
    dense model.
    """
    groups = [[sums for sums in kinds if sums] for kinds in aux]
    # Stacked after the repeats, kinds alternate as the layers do.
    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *kinds)
        for kinds in groups
        if kinds
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacked) if stacked else {}


def objective(sums: Sums, global_counts: Sums, config: MoEConfig) -> jax.Array:
    """A microbatch's part of what training minimises: the task's loss, and the router's losses as
    means over sparse layers.

    The parts add up to the whole batch's, except for a balance loss of scope "batch", whose batch
    is the microbatch.
    """
    total = mean(sums["loss"], global_counts["targets"])
    if sums["router"]:
        weighted_L = (
            config.balance_weight * sums["router"]["balance"]
            + config.z_weight * sums["router"]["z"]
        )
        total += jnp.mean(weighted_L) / jnp.maximum(global_counts["tokens"], 1.0)
    return total


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """Divides a sum by its count. The mean of nothing is 0."""
    return total / jnp.maximum(count, 1.0)


def metrics(sums: Sums) -> dict[str, Any]:
    """Means, from sums over everything that is averaged: `loss` in nats per target, and `router`,
    each sparse layer's statistics [L].

    Of `load` [L, E], each expert's share of assignments: max_vio, (largest - mean) / mean (Wang et
    al. 2024, eq. 4); load_entropy, over log E, so 1 where it is even; load_variation, standard
    deviation / mean; dead_experts, the number without any. Of tokens: means of the losses, the
    logits' norm, the entropy of the router's distribution (nats) and the margin of its two largest
    probabilities.
    """
    loss, router = mean(sums["loss"], sums["targets"]), sums["router"]
    if not router:
        return {"loss": loss}
    assignments_L = jnp.maximum(jnp.sum(router["load"], axis=-1), 1.0)
    load_LE = router["load"] / assignments_L[:, None]
    num_experts = load_LE.shape[-1]
    tokens_L = jnp.maximum(router["tokens"], 1.0)
    means = {
        "balance_loss": "balance",
        "z_loss": "z",
        "logit_norm": "logit_norm",
        "router_entropy": "entropy",
        "top1_margin": "margin",
    }
    statistics = {
        "load": load_LE,
        "max_vio": jnp.max(load_LE, axis=-1) * num_experts - 1,
        "load_entropy": jnp.sum(jax.scipy.special.entr(load_LE), axis=-1)
        / math.log(max(num_experts, 2)),
        "load_variation": jnp.std(load_LE, axis=-1) * num_experts,
        "dead_experts": jnp.sum(load_LE == 0, axis=-1, dtype=jnp.float32),
        "dropped_fraction": router["dropped"] / assignments_L,
    }
    return {
        "loss": loss,
        "router": statistics
        | {name: router[sum_name] / tokens_L for name, sum_name in means.items()},
    }


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """Sum over unmasked positions of -log softmax(unembed(hidden))[target], in nats, float32.

    Logits exist for `chunk` positions of each row at a time, in the backward pass too, which
    computes them again. What a masked position holds changes nothing, even NaN. An unmasked target
    outside [0, V) makes the sum and its gradients NaN.
    """

    def chunk_sum(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, mask = inputs
        return total + _cross_entropy_sum(hidden, unembed, targets, mask), None

    length = targets_BT.shape[1]
    if not length:
        return jnp.zeros((), jnp.float32)
    chunk = -(-length // -(-length // chunk))  # as many chunks, of sizes as equal as can be
    if chunk == length:
        return _cross_entropy_sum(hidden_BTD, unembed, targets_BT, mask_BT)
    padding = -length % chunk
    inputs = tuple(_split_time(x, chunk, padding) for x in (hidden_BTD, targets_BT, mask_BT))
    total, _ = jax.lax.scan(
        jax.checkpoint(chunk_sum, prevent_cse=False), jnp.zeros((), jnp.float32), inputs
    )
    return total


def _cross_entropy_sum(
    hidden_BTD: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets_BT: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
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
    return jnp.sum(jnp.where(mask_BT, losses_BT, 0.0))


def _split_time(x_BT: jax.Array, chunk: int, padding: int) -> jax.Array:
    """[B, T, ...] to [number of chunks, B, chunk, ...], the last chunk filled up with zeros."""
    padded = jnp.pad(x_BT, ((0, 0), (0, padding)) + ((0, 0),) * (x_BT.ndim - 2))
    return einops.rearrange(padded, "b (n c) ... -> n b c ...", c=chunk)
