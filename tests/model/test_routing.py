"""Every router by hand: the papers' formulas give experts, weights, drops and losses."""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.model import routing as routing_module
from moe.model.routing import capacity_table, jitter, update_bias
from moe.scaling.flops import component_counts

# Compiled one by one, the operations of a call take ten times as long as the whole call.
route = jax.jit(routing_module.route, static_argnames="config")
limit_to_capacity = jax.jit(routing_module.limit_to_capacity, static_argnames="config")
hash_logits = jax.jit(routing_module.hash_logits, static_argnames="config")

LOG2 = np.log(2.0)
# Softmax of these: [1/2, 1/4, 1/4], [1/4, 1/2, 1/4], [2/3, 1/6, 1/6].
LOGITS = jnp.array([[[LOG2, 0.0, 0.0], [0.0, LOG2, 0.0], [2 * LOG2, 0.0, 0.0]]])
TOP1 = MoEConfig(num_experts=3, experts_per_token=1, normalize_weights=False)
TOP2 = MoEConfig(num_experts=3, experts_per_token=2, normalize_weights=False)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


# A field that gives tokens other numbers of experts has a case here.
@pytest.mark.parametrize(
    "change",
    [{"router": router} for router in get_args(get_type_hints(MoEConfig)["router"])],
    ids=str,
)
def test_a_token_has_as_many_experts_as_are_counted(change):
    """FLOPs, active parameters and what follows from them are counted from the config."""
    config = MoEConfig(num_experts=8, capacity_factor=0.75, dispatch="capacity", **change)
    ids = np.arange(32).reshape(2, 16)
    logits = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
    if config.router == "hash":
        logits = hash_logits(jnp.asarray(ids), config)
    stats = route(logits, config).stats
    counts = component_counts(ModelConfig(moe=config), sequence_length=16)
    experts = next(count for count in counts if count.name == "experts")
    assert jnp.sum(stats.load) / stats.tokens == 8 * experts.active_parameters / experts.parameters


def test_top_1_as_in_switch():
    routing = route(LOGITS, TOP1)
    np.testing.assert_array_equal(routing.experts_BTA, [[[0], [1], [0]]])
    close(routing.weights_BTA, [[[1 / 2], [1 / 2], [2 / 3]]])
    close(routing.stats.load, [2, 1, 0])
    # E sum of share x mean probability: 3 (2/3 (1/2 + 1/4 + 2/3)/3 + 1/3 (1/4 + 1/2 + 1/6)/3),
    # times 3 tokens.
    close(routing.stats.balance_loss, 3 * 3 * (2 / 3 * 17 / 36 + 1 / 3 * 11 / 36))
    close(routing.stats.z_loss, np.log(4) ** 2 * 2 + np.log(6) ** 2)
    close(routing.stats.logit_norm, LOG2 * 4)
    close(routing.stats.top1_margin, 1 / 4 + 1 / 4 + 1 / 2)
    close(routing.stats.router_entropy, 2 * (1.5 * LOG2) + np.log(6) - 2 / 3 * np.log(4))
    assert routing.stats.tokens == 3


def test_top_2_unnormalised_as_in_olmoe():
    routing = route(LOGITS, TOP2)
    np.testing.assert_array_equal(
        routing.experts_BTA, [[[0, 1], [1, 0], [0, 1]]]
    )  # of equal scores the lower number wins
    close(routing.weights_BTA, [[[1 / 2, 1 / 4], [1 / 2, 1 / 4], [2 / 3, 1 / 6]]])
    close(routing.stats.load, [3, 3, 0])


def test_normalised_is_the_softmax_over_the_chosen_as_in_mixtral():
    routing = route(LOGITS, MoEConfig(num_experts=3, experts_per_token=2))
    close(routing.weights_BTA, [[[2 / 3, 1 / 3], [2 / 3, 1 / 3], [4 / 5, 1 / 5]]])
    close(routing.weights_BTA, jax.nn.softmax(jax.lax.top_k(LOGITS, 2)[0]))


def test_sigmoid_with_bias_and_scale_as_in_deepseek_v3():
    """The bias changes who is chosen, and not the weights."""
    logits = jnp.array([[[0.0, jnp.log(3.0), -jnp.log(3.0)]] * 3])  # sigmoids 1/2, 3/4, 1/4
    config = MoEConfig(
        num_experts=3,
        experts_per_token=2,
        router="sigmoid",
        weight_scale=2.5,
        bias_update_rate=0.001,
    )
    routing = route(logits, config, bias_E=jnp.array([-0.6, 0.0, 0.0]))
    np.testing.assert_array_equal(routing.experts_BTA[0, 0], [1, 2])
    close(routing.weights_BTA[0, 0], [2.5 * 3 / 4, 2.5 * 1 / 4])
    # Probabilities are the sigmoids' shares. The balance loss counts the largest scores, of experts
    # 0 and 1, and not the biased choice.
    close(routing.stats.balance_loss, 3 * 3 * (1 / 2 * 2 / 6 + 1 / 2 * 3 / 6))
    close(routing.stats.load, [0, 3, 3])


def test_the_balance_loss_of_deepseek_v3_counts_the_largest_scores_without_groups():
    """Eq. 17-20. Group {2, 3} is chosen, but experts 0 and 2 have the largest scores."""
    scores = [0.9, 0.1, 0.6, 0.6]
    logits, mask = (
        jax.scipy.special.logit(jnp.array([[scores] * 3])),
        jnp.array([[True, True, False]]),
    )
    config = MoEConfig(
        num_experts=4, experts_per_token=2, router="sigmoid", num_groups=2, balance_scope="row"
    )
    stats = route(logits, config, mask).stats
    close(stats.load, [0, 0, 2, 2])
    close(stats.balance_loss, 2 * 4 * (1 / 2 * 0.9 / 2.2 + 1 / 2 * 0.6 / 2.2))


def test_the_balance_loss_of_a_softmax_counts_the_choice():
    """DeepSeek-V2, eq. 24, which counts the tokens that select an expert."""
    config = MoEConfig(num_experts=3, experts_per_token=1, bias_update_rate=0.001)
    stats = route(LOGITS, config, bias_E=jnp.array([0.0, 0.0, 9.0])).stats
    close(stats.load, [0, 0, 3])
    close(stats.balance_loss, 3 * (1 / 4 + 1 / 4 + 1 / 6))


# A bias makes tokens choose experts 2 and 3, whose scores are tiny, or 0 in float32.
@pytest.mark.parametrize("low", [-25.0, -45.0, -1000.0])
@pytest.mark.parametrize(("router", "groups"), [("sigmoid", 1), ("softmax", 1), ("sigmoid", 2)])
def test_weights_of_the_smallest_scores_are_normalised_exactly(router, groups, low):
    """Of equal scores each weight is 1/2, and its derivatives are 1/4 and -1/4.

    A sigmoid so small is the exponential of its logit, so both routers have the same.
    """
    config = MoEConfig(num_experts=4, experts_per_token=2, router=router, num_groups=groups)
    logits, bias = jnp.array([[[-1.0, -1.0, low, low]]]), jnp.array([0.0, 0.0, 9.0, 9.0])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def first(logits):
        routing = route(logits, config, bias_E=bias)
        return routing.weights_BTA[0, 0, 0], routing

    (_, routing), gradient = first(logits)
    np.testing.assert_array_equal(routing.experts_BTA, [[[2, 3]]])
    close(routing.weights_BTA, 1 / 2)
    close(gradient, [[[0, 0, 1 / 4, -1 / 4]]])


@pytest.mark.parametrize("low", [-25.0, -1000.0])
def test_the_sigmoids_shares_are_exact_however_small(low):
    """The first two of equal scores are chosen: the loss is 4/2 (p_0 + p_1), and each p is 1/4."""
    config = MoEConfig(num_experts=4, experts_per_token=2, router="sigmoid")
    balance, gradient = jax.jit(
        jax.value_and_grad(lambda logits: route(logits, config).stats.balance_loss)
    )(jnp.full((1, 1, 4), low))
    close(balance, 1)
    # 2 p_e (1 - p_0 - p_1) for the chosen, and -2 p_e (p_0 + p_1) for the others.
    close(gradient, [[[1 / 4, 1 / 4, -1 / 4, -1 / 4]]])


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_one_expert_a_token_teaches_the_router(router):
    """One expert's weight over itself would be 1, without a gradient: it is the score."""
    config = MoEConfig(num_experts=3, experts_per_token=1, router=router)
    gradient = jax.jit(jax.grad(lambda logits: jnp.sum(route(logits, config).weights_BTA)))(LOGITS)
    assert jnp.abs(gradient).max(axis=-1).min() > 0.05
    with pytest.raises(
        ConfigError,
        match=r"^normalize_weights=True with experts_per_token=1 makes every weight 1.0.*False$",
    ):
        dataclasses.replace(config, normalize_weights=True)


def test_what_is_normalised_unless_a_config_says_so():
    assert MoEConfig(num_experts=4, experts_per_token=2).normalized
    assert MoEConfig(num_experts=4, experts_per_token=2, router="sigmoid").normalized
    assert not MoEConfig(num_experts=4, experts_per_token=2, normalize_weights=False).normalized
    assert MoEConfig(num_experts=4, experts_per_token=1, router="hash").normalized
    assert MoEConfig(
        num_experts=4, experts_per_token=1, router="hash", normalize_weights=True
    ).normalized
    assert not MoEConfig(num_experts=4, router="expert_choice", dispatch="dense").normalized
    with pytest.raises(
        ConfigError, match=r"^normalize_weights=True does not apply to router='expert_choice'"
    ):
        MoEConfig(num_experts=4, router="expert_choice", dispatch="dense", normalize_weights=True)


def test_groups_limit_the_choice():
    """Groups are judged by their two best: {0, 1} has 0.9 + 0.1, {2, 3} has 0.6 + 0.6."""
    logits = jax.scipy.special.logit(jnp.array([[[0.9, 0.1, 0.6, 0.6]] * 3]))
    config = MoEConfig(num_experts=4, experts_per_token=2, router="sigmoid", num_groups=2)
    np.testing.assert_array_equal(route(logits, config).experts_BTA[0, 0], [2, 3])
    both = MoEConfig(
        num_experts=4, experts_per_token=2, router="sigmoid", num_groups=2, groups_per_token=2
    )
    np.testing.assert_array_equal(route(logits, both).experts_BTA[0, 0], [0, 2])


def test_hash_routing_depends_on_the_token_alone():
    config = MoEConfig(num_experts=4, experts_per_token=2, router="hash")
    tokens = jnp.array([[7, 8, 7, 9, 256, 7]])
    routing = route(hash_logits(tokens, config), config)
    # 7 * 0x9E3779B1 = 0x538453D7 (mod 2^32), whose high half is 0 (mod 4); the others likewise.
    first = [((token * 0x9E3779B1) % 2**32 >> 16) % 4 for token in (7, 8, 7, 9, 256, 7)]
    assert first[0] == 0
    expected = [sorted((f, (f + 1) % 4)) for f in first]
    np.testing.assert_array_equal(routing.experts_BTA, [expected])
    close(routing.weights_BTA, 1 / 2)
    close(routing.stats.router_entropy, 6 * LOG2)
    assert np.isfinite(
        list(
            map(float, (routing.stats.z_loss, routing.stats.balance_loss, routing.stats.logit_norm))
        )
    ).all()


def test_hash_routing_is_even_over_tokens():
    config = MoEConfig(num_experts=16, experts_per_token=1, router="hash")
    load = route(hash_logits(jnp.arange(65536)[None], config), config).stats.load
    assert abs(load / 4096 - 1).max() < 0.02


def test_expert_choice():
    """E = 2, A = 1, capacity factor 1 and 4 real tokens of 5: each expert takes 2 of them.

    Both may take the same token. Padding is never taken.
    """
    probs = jnp.array([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.99, 0.01]]])
    mask = jnp.array([[True, True, True, True, False]])
    config = MoEConfig(
        num_experts=2,
        experts_per_token=1,
        router="expert_choice",
        dispatch="capacity",
        capacity_factor=1.0,
    )
    routing = route(jnp.log(probs), config, mask)
    np.testing.assert_array_equal(routing.experts_BTA, [[[0, 2], [0, 2], [2, 1], [2, 1], [2, 2]]])
    close(routing.weights_BTA, [[[0.9, 0], [0.8, 0], [0, 0.3], [0, 0.6], [0, 0]]])
    close(routing.stats.load, [2, 2])
    assert limit_to_capacity(routing, config, mask).stats.dropped == 0


def test_expert_choice_rounds_the_number_of_picks_down():
    """floor(1.5 * 3 real tokens * 1 / 2) = 2."""
    config = MoEConfig(
        num_experts=2,
        experts_per_token=1,
        router="expert_choice",
        dispatch="dense",
        capacity_factor=1.5,
    )
    routing = route(jnp.zeros((1, 4, 2)), config, jnp.array([[True, False, True, True]]))
    np.testing.assert_array_equal(
        routing.experts_BTA, [[[0, 1], [2, 2], [0, 1], [2, 2]]]
    )  # of equal ones the earlier


def test_padding_never_routes_and_never_counts():
    mask = jnp.array([[True, False, True]])
    routing = route(LOGITS, TOP2, mask)
    np.testing.assert_array_equal(routing.experts_BTA[0, 1], [3, 3])
    close(routing.weights_BTA[0, 1], 0)
    alone = route(LOGITS[:, ::2], TOP2)
    for actual, expected in zip(routing.stats, alone.stats, strict=True):
        close(actual, expected)


# Every token's first choice is expert 0.
CROWD = jnp.log(jnp.array([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.8, 0.2]]]))
# Each of the two experts has room for half of a row's tokens.
HALF = MoEConfig(
    num_experts=2,
    experts_per_token=1,
    dispatch="capacity",
    capacity_factor=1.0,
    normalize_weights=False,
)


def test_capacity_by_position():
    limited = limit_to_capacity(route(CROWD, HALF), HALF)  # room for 4 * 1 / 2 = 2
    np.testing.assert_array_equal(limited.experts_BTA, [[[0], [0], [2], [2]]])
    close(limited.weights_BTA, [[[0.6], [0.7], [0], [0]]])
    assert limited.stats.dropped == 2
    close(limited.stats.load, [4, 0])  # what the router asked for


def test_capacity_by_probability():
    config = dataclasses.replace(HALF, priority="probability")
    np.testing.assert_array_equal(
        limit_to_capacity(route(CROWD, config), config).experts_BTA, [[[2], [2], [0], [0]]]
    )


def places(probs, **changes):
    """Returns the experts of two tokens if each of three experts has room for one token."""
    config = MoEConfig(
        num_experts=3,
        experts_per_token=2,
        dispatch="capacity",
        capacity_factor=0.75,
        priority="probability",
    )
    config = dataclasses.replace(config, **changes)
    limited = limit_to_capacity(route(jnp.log(jnp.array([probs])), config), config)
    return limited.experts_BTA[0].tolist()


@pytest.mark.parametrize("normalize", [True, False])
def test_probability_is_batch_prioritized_routing(normalize):
    """Tokens come by their largest gate, and all first choices before second ones."""
    # Both choose expert 1: token 1 first, token 0 second, though with more probability.
    assert places([[0.5, 0.45, 0.05], [0.25, 0.4, 0.35]], normalize_weights=normalize) == [
        [0, 3],
        [1, 2],
    ]
    # Both choose expert 0 first, then 1, and the later token has the larger gate.
    assert places([[0.5, 0.45, 0.05], [0.6, 0.3, 0.1]], normalize_weights=normalize) == [
        [3, 3],
        [0, 1],
    ]
    assert places(
        [[0.5, 0.45, 0.05], [0.6, 0.3, 0.1]], normalize_weights=normalize, priority="position"
    ) == [[0, 1], [3, 3]]
    # Of equal gates the earlier token wins.
    assert places([[0.6, 0.1, 0.3], [0.6, 0.3, 0.1]], normalize_weights=normalize) == [
        [0, 2],
        [3, 1],
    ]


def test_the_gate_is_the_probability_and_not_its_share_of_the_chosen():
    """Normalised, token 1 has the larger first weight: 0.46/0.8 against 0.48/0.9."""
    assert places([[0.48, 0.42, 0.10], [0.46, 0.20, 0.34]]) == [[0, 1], [3, 2]]


FACTORS = (1e-3, 0.1, 0.3, 0.7, 1.0, 1.05, 1.1, 1.2, 1.25, 1.3, 2.3, 1.2345678, 4.0, 1e30)


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_capacities_are_exact(router):
    """Python's fractions say what the ceiling and the floor are for a decimal factor."""
    counts = range(201)
    for factor in FACTORS:
        for num_experts, choices in (
            (2, 1),
            (3, 2),
            (4, 1),
            (6, 5),
            (7, 1),
            (8, 8),
            (64, 8),
            (100, 3),
        ):
            config = MoEConfig(
                num_experts=num_experts,
                experts_per_token=choices,
                router=router,
                dispatch="capacity",
                capacity_factor=factor,
            )
            exact = [Fraction(str(factor)) * n * choices / num_experts for n in counts]
            rounded = [math.floor(x) if router == "expert_choice" else math.ceil(x) for x in exact]
            np.testing.assert_array_equal(capacity_table(config, 200), np.minimum(rounded, counts))


@pytest.mark.parametrize("factor", [0.3, 1.2, 2.3])
def test_a_row_keeps_as_many_as_there_is_room_for(factor):
    """Rows of 0 to 50 real tokens all want expert 0, which keeps its capacity of each."""
    mask = jnp.arange(50) < jnp.arange(51)[:, None]
    logits = jnp.broadcast_to(jnp.array([3.0, 2.0, 1.0, 0.0]), (51, 50, 4))
    config = MoEConfig(
        num_experts=4, experts_per_token=1, dispatch="capacity", capacity_factor=factor
    )
    limited = jax.jit(lambda: limit_to_capacity(route(logits, config, mask), config, mask))()
    kept = np.sum(np.asarray(limited.experts_BTA) == 0, axis=(1, 2))
    np.testing.assert_array_equal(
        kept, [min(n, math.ceil(Fraction(str(factor)) * n / 4)) for n in range(51)]
    )
    taken = jax.jit(
        lambda: route(logits, dataclasses.replace(config, router="expert_choice"), mask).experts_BTA
    )()
    picks = [min(n, math.floor(Fraction(str(factor)) * n / 4)) for n in range(51)]
    np.testing.assert_array_equal(np.sum(np.asarray(taken) < 4, axis=1), np.transpose([picks] * 4))


def test_first_choices_come_before_second_ones():
    """GShard: token 2's first choice takes expert 0's last place before token 0's second does."""
    logits = jnp.log(jnp.array([[[0.3, 0.6, 0.1], [0.6, 0.1, 0.3], [0.6, 0.1, 0.3]]]))
    config = MoEConfig(num_experts=3, experts_per_token=2, dispatch="capacity", capacity_factor=1.0)
    limited = limit_to_capacity(route(logits, config), config)  # room for 3 * 2 / 3 = 2
    np.testing.assert_array_equal(limited.experts_BTA, [[[1, 3], [0, 2], [0, 2]]])


def test_capacity_is_of_each_row_and_its_real_tokens():
    config = MoEConfig(num_experts=2, experts_per_token=1, dispatch="capacity", capacity_factor=1.0)
    mask = jnp.array([[True] * 4, [True, False, False, True]])
    limited = limit_to_capacity(route(jnp.concatenate([CROWD, CROWD]), config, mask), config, mask)
    np.testing.assert_array_equal(
        limited.experts_BTA[..., 0], [[0, 0, 2, 2], [0, 2, 2, 2]]
    )  # room for 2, and for 1
    assert limited.stats.dropped == 3


def test_balance_of_rows_and_of_the_batch():
    """Each of two rows chooses one expert alone: together they are even, apart they are not."""
    logits = jnp.array([[[9.0, -9.0]] * 3, [[-9.0, 9.0]] * 3])
    for scope, loss in (("batch", 1.0), ("row", 2.0)):
        stats = route(
            logits, MoEConfig(num_experts=2, experts_per_token=1, balance_scope=scope)
        ).stats
        np.testing.assert_allclose(stats.balance_loss / stats.tokens, loss, rtol=1e-6)


def test_the_gradient_of_the_balance_loss_moves_tokens_away():
    gradient = jax.jit(jax.grad(lambda logits: route(logits, TOP1).stats.balance_loss))(LOGITS)
    assert (np.asarray(gradient)[..., 0] > 0).all()  # the crowded expert's logits go down
    assert (np.asarray(gradient)[..., 2] < 0).all()  # the empty one's up
    # d/dlogits of 3/3 sum_e load_e p_e: p_0 (load_0 - sum_e load_e p_e), for the first token 1/2 (2
    # - 5/4).
    close(gradient[0, 0, 0], 1 / 2 * (2 - (2 / 2 + 1 / 4)))


def test_weights_have_gradients_and_choices_have_none():
    def weight(logits, bias):
        return jnp.sum(route(logits, TOP1, bias_E=bias).weights_BTA)

    by_logits, by_bias = jax.jit(jax.grad(weight, argnums=(0, 1)))(LOGITS, jnp.zeros(3))
    close(by_logits[0, 0], [1 / 4, -1 / 8, -1 / 8])  # of a softmax's 1/2
    close(by_bias, 0)


def test_the_bias_follows_the_load():
    close(update_bias(jnp.array([0.5, 0.0, 0.0]), jnp.array([6.0, 0.0, 3.0]), 0.1), [0.4, 0.1, 0.0])


def test_jitter_is_of_each_row_alone_and_bounded():
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), jnp.array([5, 6]))
    x = jnp.ones((2, 3, 64))
    noisy = jitter(x, keys, 0.1)
    assert 0.9 <= noisy.min() < 0.91 and 1.09 < noisy.max() <= 1.1
    close(noisy[1], jitter(x[1:], keys[1:], 0.1)[0])
    assert (noisy[0] != noisy[1]).any()


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(router):
    logits = jnp.array([[[1e4, -1e4], [-1e4, -1e4], [3e4, 3e4]]])
    config = MoEConfig(num_experts=2, experts_per_token=2, router=router)

    def total(logits):
        routing = route(logits, config)
        return jnp.sum(routing.weights_BTA) + sum(jnp.sum(value) for value in routing.stats)

    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


ROUTERS = {
    "softmax": MoEConfig(num_experts=4),
    "not normalised": MoEConfig(num_experts=4, normalize_weights=False),
    "sigmoid": MoEConfig(num_experts=4, router="sigmoid", num_groups=2, balance_scope="row"),
    "expert choice": MoEConfig(num_experts=4, router="expert_choice", dispatch="dense"),
    "by probability": MoEConfig(
        num_experts=4, dispatch="capacity", capacity_factor=0.5, priority="probability"
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_nan_in_padding_reaches_nothing(name):
    config, mask = ROUTERS[name], jnp.array([[True, False, True, True, False]] * 2)
    clean = jax.random.normal(jax.random.key(0), (2, 5, 4))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(logits):
        routing = limit_to_capacity(route(logits, config, mask), config, mask)
        losses = routing.stats.balance_loss + routing.stats.z_loss
        return jnp.sum(routing.weights_BTA**2) + losses, routing

    (expected, routing), gradient = total(clean)
    (actual, spoilt), spoilt_gradient = total(jnp.where(mask[..., None], clean, jnp.nan))
    assert np.isfinite(expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        (actual, spoilt, spoilt_gradient),
        (expected, routing, gradient),
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("name", ROUTERS)
def test_no_rows_and_no_tokens_route_nothing(name, shape):
    config = ROUTERS[name]
    routing = jax.jit(lambda logits: limit_to_capacity(route(logits, config), config))(
        jnp.zeros((*shape, 4))
    )
    assert routing.experts_BTA.shape[:2] == routing.weights_BTA.shape[:2] == shape
    assert all(not jnp.any(value) for value in routing.stats)


@pytest.mark.parametrize(
    ("logits", "mask", "config", "message"),
    [
        (
            (6, 8),
            None,
            MoEConfig(num_experts=8),
            "logits has shape (6, 8): give route logits [B, T, E] with E = num_experts = 8",
        ),
        (
            (1, 6, 8),
            None,
            MoEConfig(num_experts=4),
            "logits has shape (1, 6, 8): give route logits [B, T, E] with E = num_experts = 4",
        ),
        (
            (2, 6, 8),
            (6,),
            MoEConfig(num_experts=8),
            "mask has shape (6,): give route a mask [B, T] of shape (2, 6)",
        ),
        (
            (2, 6, 8),
            None,
            MoEConfig(),
            "num_experts=0 leaves a router nothing to choose from: set num_experts to 1 or more",
        ),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(logits, mask, config, message):
    with pytest.raises(ValueError) as caught:
        route(jnp.zeros(logits), config, None if mask is None else jnp.ones(mask, bool))
    assert str(caught.value) == message


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(TypeError, match=r"^mask is float32, and a mask is bool: give mask > 0"):
        route(jnp.zeros((2, 6, 8)), MoEConfig(num_experts=8), jnp.full((2, 6), 0.5))
