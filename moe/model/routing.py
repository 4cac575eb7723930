"""Routers: which experts a token goes to, with what weights, and what balances their load. Pure
functions of arrays, without Flax.

    routing = route(logits_BTE, MoEConfig(num_experts=8), mask_BT)

`logits` are what a linear map (or `hash_logits`) makes of each token. Tokens that the mask leaves
out are never routed nor counted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import ConfigError, MoEConfig

Sums = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """A layer's assignments, A to a token, in the order of their scores; and sums over tokens,
    float32.

    An assignment to no expert has the number E and the weight 0: padding's, and those that a full
    expert drops. `sums` holds `tokens`, `load` [E] (assignments), `balance` and `z` (losses),
    `logit_norm`, `entropy` (nats) and `margin` (of the two largest probabilities).
    """

    experts_BTA: jax.Array  # int32
    weights_BTA: jax.Array  # float32, what the experts' outputs are multiplied by
    sums: Sums
    # Each token's largest score among its experts, before normalising, float32; 0 on padding.
    gates_BT: jax.Array


def route(
    logits_BTE: jax.Array,
    config: MoEConfig,
    mask_BT: jax.Array | None = None,
    bias_E: jax.Array | None = None,
) -> Routing:
    """Assigns each unmasked token of B packed rows to experts. `bias_E` is added to the scores for
    the choice, not for the weights.

    A is `config.experts_per_token`; with expert choice it is E, since a token may be chosen by all.
    """
    _check_shapes(logits_BTE, config, mask_BT)
    mask_BT = jnp.ones(logits_BTE.shape[:2], bool) if mask_BT is None else mask_BT
    # Padding may hold anything. A NaN there would reach all tokens as 0 * NaN, and in gradients.
    logits_BTE = jnp.where(mask_BT[..., None], logits_BTE.astype(jnp.float32), 0.0)
    scores_BTE, probs_BTE = _scores(logits_BTE, config)
    if config.router == "expert_choice":
        experts_BTA, weights_BTA = _expert_choice(probs_BTE, config, mask_BT)
        gates_BT = jnp.max(weights_BTA, axis=-1)
    else:
        experts_BTA, weights_BTA, gates_BT = _token_choice(logits_BTE, scores_BTE, config, bias_E)
    experts_BTA = jnp.where(mask_BT[..., None], experts_BTA, config.num_experts)
    weights_BTA = jnp.where(mask_BT[..., None], weights_BTA, 0.0)
    gates_BT = jnp.where(mask_BT, jax.lax.stop_gradient(gates_BT), 0.0)
    balanced_BTA = experts_BTA
    if config.router == "sigmoid" and (bias_E is not None or config.num_groups > 1):
        preferred_BTA = _largest(jax.lax.stop_gradient(scores_BTE), config.experts_per_token)
        balanced_BTA = jnp.where(mask_BT[..., None], preferred_BTA, config.num_experts)
    sums = _sums(logits_BTE, probs_BTE, experts_BTA, balanced_BTA, mask_BT, config)
    return Routing(experts_BTA, weights_BTA, sums, gates_BT)


def _check_shapes(logits_BTE: jax.Array, config: MoEConfig, mask_BT: jax.Array | None) -> None:
    """Raises what a wrong shape would otherwise raise far from here, or not at all."""
    if not config.num_experts:
        raise ConfigError(
            "num_experts=0 leaves a router nothing to choose from: set num_experts to 1 or more"
        )
    if logits_BTE.ndim != 3 or logits_BTE.shape[-1] != config.num_experts:
        raise ValueError(
            f"logits has shape {logits_BTE.shape}: give route logits [B, T, E] with E = num_experts = {config.num_experts}"
        )
    if mask_BT is not None and mask_BT.shape != logits_BTE.shape[:2]:
        raise ValueError(
            f"mask has shape {mask_BT.shape}: give route a mask [B, T] of shape {logits_BTE.shape[:2]}"
        )


def _scores(logits_BTE: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """What experts are chosen by, and a distribution over them: the softmax, or sigmoids
    (DeepSeek-V3, eq. 15) and their share.
    """
    probs_BTE = jax.nn.softmax(_log_scores(logits_BTE, config), axis=-1)
    return jax.nn.sigmoid(logits_BTE) if config.router == "sigmoid" else probs_BTE, probs_BTE


def _log_scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns logarithms of scores, up to a constant.

    Their softmax is each score over the sum of all, exact however small the scores are.
    """
    return jax.nn.log_sigmoid(logits) if config.router == "sigmoid" else logits


def _token_choice(
    logits_BTE: jax.Array, scores_BTE: jax.Array, config: MoEConfig, bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the A experts of highest score plus bias, their weights, and their largest score.

    Of equal experts the lower number wins. Weights are the scores (Switch, OLMoE), or the scores
    over their sum, which for a softmax is the softmax over the chosen alone (Mixtral).
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
    """Leaves the experts of the groups with the largest sums of two highest scores.

    This is DeepSeek-V3's rule (section 2.1.2). DeepSeek-V2 takes a group's one highest score.
    """
    groups = choice_BTE.reshape(
        *choice_BTE.shape[:2], config.num_groups, config.num_experts // config.num_groups
    )
    allowed = _largest(sum(_two_largest(groups)), config.groups_per_token)
    is_allowed_BTG = jnp.any(jax.nn.one_hot(allowed, config.num_groups, dtype=bool), axis=-2)
    return jnp.where(is_allowed_BTG[..., None], groups, -jnp.inf).reshape(choice_BTE.shape)


def _largest(x: jax.Array, count: int) -> jax.Array:
    """Where the largest values of the last dimension are, in order; of equal ones the first. int32
    [..., count].

    Not jax.lax.top_k: XLA gathers its operand from all devices, even where the last dimension is
    whole on each.
    """
    indices = []
    for _ in range(count):
        indices.append(jnp.argmax(x, axis=-1))
        x = jnp.where(jax.nn.one_hot(indices[-1], x.shape[-1], dtype=bool), -jnp.inf, x)
    return jnp.stack(indices, axis=-1).astype(jnp.int32)


def _two_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two largest values of the last dimension; the second is 0 where there is one alone."""
    is_first = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=bool)
    return jnp.max(x, axis=-1), jnp.max(jnp.where(is_first, -jnp.inf, x), axis=-1) if x.shape[
        -1
    ] > 1 else jnp.zeros(x.shape[:-1], x.dtype)


def _expert_choice(
    probs_BTE: jax.Array, config: MoEConfig, mask_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Experts take floor(capacity_factor * real tokens * A / E) tokens of a row each, the likeliest
    (Zhou et al. 2022, eq. 1-3).
    """
    keys_BTE = jnp.where(mask_BT[..., None], jax.lax.stop_gradient(probs_BTE), -jnp.inf)
    # The sorts are stable: of equal ones the earlier token wins.
    rank_BTE = jnp.argsort(jnp.argsort(-keys_BTE, axis=1), axis=1).astype(jnp.int32)
    limit_B = _limits(config, mask_BT)
    taken_BTE = (rank_BTE < limit_B[:, None, None]) & mask_BT[..., None]
    every_E = jnp.arange(config.num_experts, dtype=jnp.int32)
    experts_BTE = jnp.where(taken_BTE, every_E[None, None], config.num_experts)
    return experts_BTE, jnp.where(taken_BTE, probs_BTE, 0.0) * config.weight_scale


def limit_to_capacity(
    routing: Routing, config: MoEConfig, mask_BT: jax.Array | None = None
) -> Routing:
    """Drops what an expert has no room for: of each packed row it takes ceil(capacity_factor * real
    tokens * A / E) assignments.

    First come all tokens' first choices, then all second ones. Among each, tokens come by position
    (GShard, algorithm 1), or by their largest gate (Batch Prioritized Routing, Riquelme et al.
    2021, algorithm 2). `sums` gains `dropped`, the number of assignments that went nowhere.
    """
    experts_BTA, weights_BTA, num_experts = (
        routing.experts_BTA,
        routing.weights_BTA,
        config.num_experts,
    )
    mask_BT = jnp.ones(experts_BTA.shape[:2], bool) if mask_BT is None else mask_BT
    keys_BT = (
        -routing.gates_BT if config.priority == "probability" else jnp.zeros_like(routing.gates_BT)
    )
    places_BTA = jax.vmap(_places, in_axes=(0, 0, None))(experts_BTA, keys_BT, num_experts)
    kept_BTA = (places_BTA < _limits(config, mask_BT)[:, None, None]) & (experts_BTA < num_experts)
    dropped = jnp.sum((experts_BTA < num_experts) & ~kept_BTA, dtype=jnp.float32)
    experts_BTA, weights_BTA = (
        jnp.where(kept_BTA, experts_BTA, num_experts),
        jnp.where(kept_BTA, weights_BTA, 0.0),
    )
    return Routing(experts_BTA, weights_BTA, routing.sums | {"dropped": dropped}, routing.gates_BT)


@functools.lru_cache(maxsize=16)  # a trace asks for it twice in every sparse layer
def capacities(config: MoEConfig, length: int) -> np.ndarray:
    """Returns how much an expert takes of a row with 0, 1, ..., `length` real tokens.

    Each is exactly ceil(capacity_factor * tokens * A / E), or the floor with expert choice, and at
    most the tokens. It is a table made in Python, int32 [length + 1], because floats round (float32
    puts 1.2 * 50 / 4 above 15), and the integers of an exact product need not fit in 32 bits.
    """
    numerator, denominator = config.row_share.as_integer_ratio()
    if config.router == "expert_choice":
        limits = [numerator * tokens // denominator for tokens in range(length + 1)]
    else:
        limits = [-(-numerator * tokens // denominator) for tokens in range(length + 1)]
    table = np.array([min(limit, tokens) for tokens, limit in enumerate(limits)], np.int32)
    table.flags.writeable = False  # all callers share it
    return table


def _limits(config: MoEConfig, mask_BT: jax.Array) -> jax.Array:
    """What each packed row lets an expert take of it, by its number of real tokens: int32 [B]."""
    return jnp.asarray(capacities(config, mask_BT.shape[1]))[
        jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
    ]


def _places(experts_TA: jax.Array, keys_T: jax.Array, num_experts: int) -> jax.Array:
    """Returns each assignment's place among those of its expert.

    They come by choice (first, second, ...), then by their token's key, then by position.
    """
    choices = experts_TA.shape[1]
    # The sort is stable, so that positions decide between equal keys.
    ranks = (experts_TA * choices + jnp.arange(choices, dtype=experts_TA.dtype)[None]).reshape(-1)
    keys, index = (
        jnp.broadcast_to(keys_T[:, None], experts_TA.shape).reshape(-1),
        jnp.arange(experts_TA.size, dtype=jnp.int32),
    )
    sorted_ranks, _, order = jax.lax.sort((ranks, keys, index), num_keys=2)
    sorted_experts = sorted_ranks // choices
    firsts = jnp.searchsorted(
        sorted_experts, jnp.arange(num_experts + 1, dtype=ranks.dtype)
    ).astype(jnp.int32)
    places = index - firsts[sorted_experts]
    return jnp.zeros_like(index).at[order].set(places).reshape(experts_TA.shape)


def _loads(experts_BTA: jax.Array, num_experts: int) -> jax.Array:
    """Returns the number of assignments of each expert in each row, float32 [B, E]."""
    return jnp.sum(
        jax.nn.one_hot(experts_BTA, num_experts, dtype=bool), axis=(1, 2), dtype=jnp.float32
    )


def _sums(
    logits_BTE: jax.Array,
    probs_BTE: jax.Array,
    experts_BTA: jax.Array,
    balanced_BTA: jax.Array,
    mask_BT: jax.Array,
    config: MoEConfig,
) -> Sums:
    """Returns `Routing.sums`; the balance loss counts `balanced_BTA`, not the choice made."""
    mask_BT = mask_BT.astype(jnp.float32)
    over_tokens = lambda x_BT: jnp.sum(x_BT * mask_BT)
    load_BE, balanced_BE = (
        _loads(x_BTA, config.num_experts) for x_BTA in (experts_BTA, balanced_BTA)
    )
    probs_BE = jnp.einsum("bte,bt->be", probs_BTE, mask_BT, precision="highest")
    finite_BTE = jnp.where(
        jnp.isfinite(logits_BTE), logits_BTE, 0.0
    )  # a hash's other experts stand at minus infinity
    first_BT, second_BT = _two_largest(jax.lax.stop_gradient(probs_BTE))
    return {
        "tokens": jnp.sum(mask_BT),
        "load": jnp.sum(load_BE, axis=0),
        "balance": balance_sum(balanced_BE, probs_BE, jnp.sum(mask_BT, axis=1), config),
        "z": over_tokens(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
        "logit_norm": over_tokens(jnp.linalg.norm(jax.lax.stop_gradient(finite_BTE), axis=-1)),
        "entropy": over_tokens(
            jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs_BTE)), axis=-1)
        ),
        "margin": over_tokens(first_BT - second_BT),
    }


def balance_sum(
    load_BE: jax.Array, probs_BE: jax.Array, tokens_B: jax.Array, config: MoEConfig
) -> jax.Array:
    """Each scope's balance loss times its tokens, summed; divided by all tokens it is their mean.

    The loss of a scope is E times the sum over experts of (share of assignments) x (mean
    probability) (Switch Transformer, eq. 4-6; GShard's is the same with A assignments): 1 where the
    load is even. The scope is a packed row, or all rows given.

    `route` counts `load_BE`. With a softmax those are the assignments made, by biases and groups
    too (DeepSeek-V2, eq. 24); with sigmoids each token's A largest scores, without biases and
    groups (DeepSeek-V3, eq. 17-20).
    """
    if config.balance_scope == "batch":
        load_BE, probs_BE, tokens_B = (
            jnp.sum(x, axis=0, keepdims=True) for x in (load_BE, probs_BE, tokens_B)
        )
    assignments_B = jnp.maximum(jnp.sum(load_BE, axis=-1), 1.0)
    products_B = jnp.einsum(
        "be,be->b", jax.lax.stop_gradient(load_BE), probs_BE, precision="highest"
    )
    return jnp.sum(config.num_experts * products_B / assignments_B)


def update_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """One step towards an even load, of size `rate`: up for experts below the mean, down above it
    (Wang et al. 2024, algorithm 1).

    `bias` and `load` are [..., E]; the load is the whole batch's.
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def jitter(x_BTD: jax.Array, keys_B: jax.Array, amount: float) -> jax.Array:
    """Multiplies by draws between 1 - amount and 1 + amount (Switch Transformer, section 2.2), each
    row with its own key.
    """
    draw = lambda key: jax.random.uniform(key, x_BTD.shape[1:], jnp.float32, 1 - amount, 1 + amount)
    return x_BTD * jax.vmap(draw)(keys_B).astype(x_BTD.dtype)


def hash_logits(tokens_BT: jax.Array, config: MoEConfig) -> jax.Array:
    """Logits [B, T, E] that send each token id to A distinct experts, with equal weights (Roller et
    al. 2021): 0, else minus infinity.

    The experts are first, first + 1, ..., around the end, with `first` a mixing of the id's bits,
    even over the experts.
    """
    bits = tokens_BT.astype(jnp.uint32) * jnp.uint32(
        0x9E3779B1
    )  # Knuth's multiplicative hash; the high bits are the mixed ones
    first_BT = ((bits >> 16) % config.num_experts).astype(jnp.int32)
    every_E = jnp.arange(config.num_experts, dtype=jnp.int32)
    distance_BTE = (every_E[None, None] - first_BT[..., None]) % config.num_experts
    return jnp.where(distance_BTE < config.experts_per_token, jnp.float32(0.0), -jnp.inf)
