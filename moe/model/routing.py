"""Routers choose each token's experts and their weights, and balance the experts' load.

    routing = route(logits_BTE, MoEConfig(num_experts=8), mask_BT)

These are pure functions of arrays, without Flax. A linear map of each token (or `hash_logits`)
gives the logits. A token that the mask leaves out is never routed and never counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ConfigError, MoEConfig
from moe.cross_entropy import check_mask
from moe.losses import RouterStats
from moe.model.arrangement import places_of_sorted
from moe.parallel.collectives.replicas import sum_over_replicas


class Routing(NamedTuple):
    """Holds a layer's assignments: A experts for each token, in the order of their scores.

    An assignment to no expert has the number E and the weight 0. Padding has such assignments, and
    so have tokens whose expert is full (`limit_to_capacity`).
    """

    experts_BTA: jax.Array  # int32
    weights_BTA: jax.Array  # float32; the outputs of the experts are multiplied by them
    stats: RouterStats
    # Each token's largest score among its experts, before normalising, float32; 0 on padding.
    gates_BT: jax.Array


def route(
    logits_BTE: jax.Array,
    config: MoEConfig,
    mask_BT: jax.Array | None = None,
    bias_E: jax.Array | None = None,
    capacities: np.ndarray | None = None,
) -> Routing:
    """Assigns each unmasked token of B packed rows to experts.

    A is `config.experts_per_token`. With expert choice it is E, since all experts may choose the
    same token. `bias_E` is added to the scores that decide the choice, not to the weights. A caller
    that already has the row length's `capacity_table` passes it as `capacities`.
    """
    _check_shapes(logits_BTE, config, mask_BT)
    mask_BT = jnp.ones(logits_BTE.shape[:2], bool) if mask_BT is None else mask_BT
    # Padding may hold anything. A NaN there would reach all tokens as 0 * NaN, and in gradients.
    logits_BTE = jnp.where(mask_BT[..., None], logits_BTE.astype(jnp.float32), 0.0)
    scores_BTE, probs_BTE = _scores(logits_BTE, config)
    if config.router == "expert_choice":
        limits_B = _row_limits(config, mask_BT, capacities)
        experts_BTA, weights_BTA = _expert_choice(probs_BTE, config, mask_BT, limits_B)
        gates_BT = jnp.max(weights_BTA, axis=-1)
    else:
        experts_BTA, weights_BTA, gates_BT = _token_choice(logits_BTE, scores_BTE, config, bias_E)
    experts_BTA = jnp.where(mask_BT[..., None], experts_BTA, config.num_experts)
    weights_BTA = jnp.where(mask_BT[..., None], weights_BTA, 0.0)
    gates_BT = jnp.where(mask_BT, jax.lax.stop_gradient(gates_BT), 0.0)
    balanced_BTA = experts_BTA
    if config.router == "sigmoid" and (bias_E is not None or config.num_groups > 1):
        # DeepSeek-V3's balance loss counts the largest scores, without biases and groups.
        preferred_BTA = _largest(jax.lax.stop_gradient(scores_BTE), config.experts_per_token)
        balanced_BTA = jnp.where(mask_BT[..., None], preferred_BTA, config.num_experts)
    load_BE, balanced_BE = (
        row_loads(assigned_BTA, config.num_experts) for assigned_BTA in (experts_BTA, balanced_BTA)
    )
    stats = _router_stats(logits_BTE, probs_BTE, load_BE, balanced_BE, mask_BT, config)
    return Routing(experts_BTA, weights_BTA, stats, gates_BT)


def _check_shapes(logits_BTE: jax.Array, config: MoEConfig, mask_BT: jax.Array | None) -> None:
    """Raises an error for shapes and masks that would fail later, or not at all."""
    if not config.num_experts:
        raise ConfigError(
            "num_experts=0 leaves a router nothing to choose from: set num_experts to 1 or more"
        )
    if logits_BTE.ndim != 3 or logits_BTE.shape[-1] != config.num_experts:
        raise ValueError(
            f"logits has shape {logits_BTE.shape}: "
            f"give route logits [B, T, E] with E = num_experts = {config.num_experts}"
        )
    if mask_BT is not None and mask_BT.shape != logits_BTE.shape[:2]:
        raise ValueError(
            f"mask has shape {mask_BT.shape}: "
            f"give route a mask [B, T] of shape {logits_BTE.shape[:2]}"
        )
    if mask_BT is not None:
        check_mask("mask", mask_BT)


def _scores(logits_BTE: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the scores that experts are chosen by, and a distribution over the experts.

    A sigmoid router's scores are sigmoids (DeepSeek-V3, eq. 15), and its distribution is each
    sigmoid's share of their sum. For all other routers both are the softmax.
    """
    probs_BTE = jax.nn.softmax(_log_scores(logits_BTE, config), axis=-1)
    scores_BTE = jax.nn.sigmoid(logits_BTE) if config.router == "sigmoid" else probs_BTE
    return scores_BTE, probs_BTE


def _log_scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns logarithms of scores, up to a constant.

    Their softmax is each score's share of the sum of all scores. It is exact even for scores that
    underflow to 0.
    """
    return jax.nn.log_sigmoid(logits) if config.router == "sigmoid" else logits


def _token_choice(
    logits_BTE: jax.Array, scores_BTE: jax.Array, config: MoEConfig, bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each token's A experts, their weights, and the largest of their scores.

    The experts have the highest scores plus biases; of equal ones, the lower number wins. The
    weights are the scores (Switch, OLMoE) or, normalised, each score's share of their sum. For a
    softmax that is the softmax over the chosen experts alone (Mixtral).
    """
    choice_BTE = jax.lax.stop_gradient(scores_BTE)
    if bias_E is not None:
        choice_BTE = choice_BTE + jax.lax.stop_gradient(bias_E)[None, None]
    if config.num_groups > 1:
        choice_BTE = _limit_groups(choice_BTE, config)
    experts_BTA = _largest(choice_BTE, config.experts_per_token)
    # A comparison rather than a gather: it fuses, and its gradient needs no scatter.
    chosen_BTAE = jax.nn.one_hot(experts_BTA, config.num_experts, dtype=bool)
    scores_BTA = jnp.sum(jnp.where(chosen_BTAE, scores_BTE[:, :, None], 0.0), axis=-1)
    weights_BTA = scores_BTA
    if config.normalized:
        logits_BTA = jnp.sum(jnp.where(chosen_BTAE, logits_BTE[:, :, None], 0.0), axis=-1)
        weights_BTA = jax.nn.softmax(_log_scores(logits_BTA, config), axis=-1)
    return experts_BTA, weights_BTA * config.weight_scale, jnp.max(scores_BTA, axis=-1)


def _limit_groups(choice_BTE: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns the scores, with minus infinity for the experts outside the chosen groups.

    A token chooses the groups with the largest sums of their two highest scores, which is
    DeepSeek-V3's rule (section 2.1.2). DeepSeek-V2 takes a group's one highest score instead.
    """
    groups = choice_BTE.reshape(
        *choice_BTE.shape[:2], config.num_groups, config.num_experts // config.num_groups
    )
    first, second = _two_largest(groups)
    allowed = _largest(first + second, config.groups_per_token)
    is_allowed_BTG = jnp.any(jax.nn.one_hot(allowed, config.num_groups, dtype=bool), axis=-2)
    return jnp.where(is_allowed_BTG[..., None], groups, -jnp.inf).reshape(choice_BTE.shape)


def _largest(x: jax.Array, count: int) -> jax.Array:
    """Returns the indices of the `count` largest values of the last dimension, largest first.

    They are int32 [..., count]. The first of equal values wins.
    """
    # jax.lax.top_k would do this, but XLA gathers its operand from all devices, even if the last
    # dimension is whole on each device.
    indices = []
    for _ in range(count):
        indices.append(jnp.argmax(x, axis=-1))
        x = jnp.where(jax.nn.one_hot(indices[-1], x.shape[-1], dtype=bool), -jnp.inf, x)
    return jnp.stack(indices, axis=-1).astype(jnp.int32)


def _two_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the two largest values of the last dimension; a lone value has 0 as its second."""
    first = jnp.max(x, axis=-1)
    if x.shape[-1] == 1:
        return first, jnp.zeros_like(first)
    is_first = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=bool)
    return first, jnp.max(jnp.where(is_first, -jnp.inf, x), axis=-1)


def _expert_choice(
    probs_BTE: jax.Array, config: MoEConfig, mask_BT: jax.Array, limits_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the assignments [B, T, E] and weights if each expert takes its likeliest tokens.

    An expert takes `limits_B` tokens of a row (Zhou et al. 2022, eq. 1-3).
    """
    keys_BTE = jnp.where(mask_BT[..., None], jax.lax.stop_gradient(probs_BTE), -jnp.inf)
    # The rank of a token is its place in the order by probability. The sorts are stable: of equally
    # likely tokens, the earlier one comes first.
    rank_BTE = jnp.argsort(jnp.argsort(-keys_BTE, axis=1), axis=1).astype(jnp.int32)
    taken_BTE = (rank_BTE < limits_B[:, None, None]) & mask_BT[..., None]
    every_E = jnp.arange(config.num_experts, dtype=jnp.int32)
    experts_BTE = jnp.where(taken_BTE, every_E[None, None], config.num_experts)
    return experts_BTE, jnp.where(taken_BTE, probs_BTE, 0.0) * config.weight_scale


def limit_to_capacity(
    routing: Routing,
    config: MoEConfig,
    mask_BT: jax.Array | None = None,
    capacities: np.ndarray | None = None,
) -> Routing:
    """Drops the assignments that an expert has no room for, and counts them in `stats.dropped`.

    An expert takes ceil(capacity_factor * real tokens * A / E) assignments of each packed row. All
    tokens' first choices come before all second choices. Among first choices, and likewise among
    second ones, tokens come in order of their position (GShard, algorithm 1), or of their largest
    gate (Batch Prioritized Routing, Riquelme et al. 2021, algorithm 2). `capacities` is as in
    `route`.
    """
    experts_BTA, num_experts = routing.experts_BTA, config.num_experts
    mask_BT = jnp.ones(experts_BTA.shape[:2], bool) if mask_BT is None else mask_BT
    by_probability = config.priority == "probability"
    keys_BT = -routing.gates_BT if by_probability else jnp.zeros_like(routing.gates_BT)
    places_BTA = jax.vmap(_places, in_axes=(0, 0, None))(experts_BTA, keys_BT, num_experts)
    limits_B = _row_limits(config, mask_BT, capacities)
    assigned_BTA = experts_BTA < num_experts
    has_room_BTA = assigned_BTA & (places_BTA < limits_B[:, None, None])
    dropped = jnp.sum(assigned_BTA & ~has_room_BTA, dtype=jnp.float32)
    return routing._replace(
        experts_BTA=jnp.where(has_room_BTA, experts_BTA, num_experts),
        weights_BTA=jnp.where(has_room_BTA, routing.weights_BTA, 0.0),
        stats=routing.stats._replace(dropped=dropped),
    )


def capacity_table(config: MoEConfig, length: int) -> np.ndarray:
    """Returns how many assignments an expert takes of a row with 0, 1, ..., `length` real tokens.

    An entry is ceil(capacity_factor * tokens * A / E), or with expert choice the floor, and at most
    the number of tokens. The table is int32 [length + 1]. It is made from Python's integers, which
    are exact: in float32, 1.2 * 50 / 4 exceeds 15, and the exact products can exceed 32 bits.
    """
    numerator, denominator = config.row_share.as_integer_ratio()
    if config.router == "expert_choice":
        limits = [numerator * tokens // denominator for tokens in range(length + 1)]
    else:
        limits = [-(-numerator * tokens // denominator) for tokens in range(length + 1)]
    return np.array([min(limit, tokens) for tokens, limit in enumerate(limits)], np.int32)


def _row_limits(config: MoEConfig, mask_BT: jax.Array, capacities: np.ndarray | None) -> jax.Array:
    """Returns how many assignments an expert takes of each row, int32 [B], from a capacity table.

    Without a table, it makes its own.
    """
    table = capacity_table(config, mask_BT.shape[1]) if capacities is None else capacities
    return jnp.asarray(table)[jnp.sum(mask_BT, axis=1, dtype=jnp.int32)]


def _places(experts_TA: jax.Array, keys_T: jax.Array, num_experts: int) -> jax.Array:
    """Returns each assignment's place in the queue of its expert, int32 [T, A].

    A queue is ordered by choice (first, second, ...), then by the token's key, then by position.
    """
    choices = experts_TA.shape[1]
    index = jnp.arange(experts_TA.size, dtype=jnp.int32)
    # One number orders the assignments by expert and, of the same expert, by choice.
    choice_A = jnp.arange(choices, dtype=experts_TA.dtype)
    ranks = (experts_TA * choices + choice_A[None]).reshape(-1)
    keys = jnp.broadcast_to(keys_T[:, None], experts_TA.shape).reshape(-1)
    # The sort is stable, so that positions decide between equal keys.
    sorted_ranks, _, order = jax.lax.sort((ranks, keys, index), num_keys=2)
    places = places_of_sorted(sorted_ranks // choices, num_experts)
    return jnp.zeros_like(index).at[order].set(places).reshape(experts_TA.shape)


def row_loads(experts_BTA: jax.Array, num_experts: int) -> jax.Array:
    """Returns the number of assignments of each expert in each row, float32 [B, E]."""
    chosen_BTAE = jax.nn.one_hot(experts_BTA, num_experts, dtype=bool)
    return jnp.sum(chosen_BTAE, axis=(1, 2), dtype=jnp.float32)


def _router_stats(
    logits_BTE: jax.Array,
    probs_BTE: jax.Array,
    load_BE: jax.Array,
    balanced_BE: jax.Array,
    mask_BT: jax.Array,
    config: MoEConfig,
) -> RouterStats:
    """Returns the statistics of a routing whose rows load the experts by `load_BE`.

    The balance loss counts `balanced_BE` instead. Nothing is dropped yet.
    """
    mask_BT = mask_BT.astype(jnp.float32)
    over_tokens = lambda x_BT: jnp.sum(x_BT * mask_BT)
    probs_BE = jnp.einsum("bte,bt->be", probs_BTE, mask_BT, precision="highest")
    # A hash router's logits are minus infinity for the experts that a token does not go to.
    finite_BTE = jnp.where(jnp.isfinite(logits_BTE), logits_BTE, 0.0)
    # Only the two losses have gradients.
    constant_probs_BTE = jax.lax.stop_gradient(probs_BTE)
    first_BT, second_BT = _two_largest(constant_probs_BTE)
    entropy_BT = jnp.sum(jax.scipy.special.entr(constant_probs_BTE), axis=-1)
    norm_BT = jnp.linalg.norm(jax.lax.stop_gradient(finite_BTE), axis=-1)
    return RouterStats(
        tokens=jnp.sum(mask_BT),
        load=jnp.sum(load_BE, axis=0),
        dropped=jnp.zeros((), jnp.float32),
        balance_loss=balance_sum(balanced_BE, probs_BE, config),
        # ST-MoE, eq. 5.
        z_loss=over_tokens(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
        logit_norm=over_tokens(norm_BT),
        router_entropy=over_tokens(entropy_BT),
        top1_margin=over_tokens(first_BT - second_BT),
    )


def balance_sum(load_BE: jax.Array, probs_BE: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns the sum over scopes of the balance loss times the scope's number of tokens.

    Divided by the number of all tokens, it is the scopes' weighted mean. A scope is a packed row,
    or all rows given. Its loss is E times the sum over experts of (share of assignments) x (mean
    probability) (Switch Transformer, eq. 4-6; GShard's is the same with A assignments). It is 1 if
    the load is even.

    For a softmax router, `load_BE` counts the choices that were made, biases and groups included
    (DeepSeek-V2, eq. 24). For a sigmoid router it counts each token's A largest scores, without
    biases and groups (DeepSeek-V3, eq. 17-20).
    """
    if config.balance_scope == "batch":
        load_BE, probs_BE = (jnp.sum(x, axis=0, keepdims=True) for x in (load_BE, probs_BE))
        # The load has no gradient. With that of all replicas, their own probabilities add up to
        # the loss of the whole batch.
        load_BE = sum_over_replicas(load_BE)
    assignments_B = jnp.maximum(jnp.sum(load_BE, axis=-1), 1.0)
    products_B = jnp.einsum(
        "be,be->b", jax.lax.stop_gradient(load_BE), probs_BE, precision="highest"
    )
    return jnp.sum(config.num_experts * products_B / assignments_B)


def update_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Returns the biases after one step of size `rate` towards an even load.

    The bias of an expert below the mean load goes up, and that of one above it goes down (Wang
    et al. 2024, algorithm 1). `bias` and `load` are [..., E], and the load is the whole batch's.
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def jitter(x_BTD: jax.Array, keys_B: jax.Array, amount: float) -> jax.Array:
    """Multiplies activations by random numbers between 1 - amount and 1 + amount.

    Each row draws from its own key (Switch Transformer, section 2.2).
    """
    shape, low, high = x_BTD.shape[1:], 1 - amount, 1 + amount
    factors = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32, low, high))(keys_B)
    return x_BTD * factors.astype(x_BTD.dtype)


def hash_logits(tokens_BT: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns logits [B, T, E] that send each token id to A distinct experts with equal weights.

    A token's logits are 0 for its experts and minus infinity for the others (Roller et al. 2021).
    Its experts are first, first + 1, ..., wrapping around at E. `first` mixes the id's bits, so
    that ids spread evenly over the experts.
    """
    # Knuth's multiplicative hash, whose high bits are the well-mixed ones.
    bits = tokens_BT.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    first_BT = ((bits >> 16) % config.num_experts).astype(jnp.int32)
    every_E = jnp.arange(config.num_experts, dtype=jnp.int32)
    distance_BTE = (every_E[None, None] - first_BT[..., None]) % config.num_experts
    return jnp.where(distance_BTE < config.experts_per_token, jnp.float32(0.0), -jnp.inf)
