"""An upcycled model against the dense one that it is made of.

It has the same function if that is promised, and the same scale otherwise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.interop.compatible import check_upcycle
from moe.interop.upcycle import stack_layers, unstack_layers, upcycle
from moe.model.experts import MoE
from moe.model.layers import FeedForward
from moe.model.tokens import TokenInfo
from moe.model.transformer import Transformer
from moe.parameters import unbox

DENSE = ModelConfig(
    vocab_size=16,
    num_layers=4,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qk_norm=True,
    compute_dtype="float32",
)
TOKENS = jnp.array(np.random.default_rng(1).integers(0, 16, (2, 9)))


def sparse(dispatch="dense", **moe):
    return dataclasses.replace(DENSE, moe=MoEConfig(dispatch=dispatch, **moe))


@functools.cache
def init(config, seed=0):
    """Variables of a model, its parameters drawn by numpy, which needs no compiling."""
    shapes = unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), {"tokens": TOKENS}))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.array(rng.normal(0, 0.25, leaf.shape), leaf.dtype), shapes["params"]
    )
    zeros = jax.tree.map(lambda leaf: jnp.array(np.zeros(leaf.shape), leaf.dtype), shapes)
    return zeros | {"params": params}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables):
    model = Transformer(config)
    return model.apply(
        variables, model.apply(variables, {"tokens": TOKENS}).hidden, method="unembed"
    )


def upcycled(config, noise=0.0, key=2):
    check_upcycle(DENSE, config)
    new = init(config, seed=1)
    run = jax.jit(functools.partial(upcycle, dense=DENSE, config=config, noise=noise))
    return new | {"params": run(init(DENSE)["params"], new["params"], jax.random.key(key))}


def distance(config, variables):
    """Returns the largest difference from the dense model's logits, whose size is about 1."""
    return np.max(np.abs(logits(config, variables) - logits(DENSE, init(DENSE))))


EXACT = {
    "copies": {"num_experts": 4, "expert_dim": 24},
    "copies in some layers": {
        "num_experts": 4,
        "expert_dim": 24,
        "first_dense_layers": 1,
        "layer_period": 2,
    },
    "copies, scaled weights": {
        "num_experts": 4,
        "expert_dim": 24,
        "router": "sigmoid",
        "weight_scale": 2.5,
    },
    "copies, biases": {
        "num_experts": 4,
        "expert_dim": 24,
        "router": "sigmoid",
        "bias_update_rate": 0.001,
    },
    "copies, hash": {
        "num_experts": 4,
        "expert_dim": 24,
        "router": "hash",
        "normalize_weights": False,
    },
    "copies, room for all": {
        "num_experts": 4,
        "expert_dim": 24,
        "dispatch": "capacity",
        "capacity_factor": 2.0,
    },
    "slices": {"num_experts": 8, "expert_dim": 12, "experts_per_token": 2},
    "slices, two copies chosen": {
        "num_experts": 9,
        "expert_dim": 8,
        "experts_per_token": 6,
        "dispatch": "dropless",
    },
    "slices, hash": {
        "num_experts": 6,
        "expert_dim": 8,
        "experts_per_token": 3,
        "router": "hash",
        "weight_scale": 3.0,
    },
    "slices, all chosen": {
        "num_experts": 4,
        "expert_dim": 12,
        "experts_per_token": 4,
        "normalize_weights": False,
    },
    "slices, groups": {"num_experts": 8, "expert_dim": 12, "num_groups": 2},
    "slices, two of four shared": {"num_experts": 4, "expert_dim": 6, "num_shared_experts": 2},
}


@pytest.mark.parametrize("name", EXACT)
def test_the_function_is_preserved(name):
    config = sparse(**EXACT[name])
    assert distance(config, init(config, seed=1)) > 0.5
    assert distance(config, upcycled(config)) < 1e-5


@pytest.mark.parametrize(
    "moe",
    [
        {"num_experts": 4, "expert_dim": 24, "normalize_weights": False},
        {"num_experts": 8, "expert_dim": 12, "experts_per_token": 3},
        {"num_experts": 8, "expert_dim": 12, "router": "hash", "experts_per_token": 3},
        {"num_experts": 4, "expert_dim": 24, "dispatch": "capacity", "capacity_factor": 0.5},
    ],
)
def test_elsewhere_the_function_is_near(moe):
    """The conditions in the docstring are not too narrow: without them, functions differ."""
    config = sparse(**moe)
    assert 1e-3 < distance(config, upcycled(config)) < distance(config, init(config, seed=1))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_weights_that_are_not_normalised_are_right_at_equal_scores(router):
    config = sparse(
        num_experts=4, expert_dim=24, router=router, normalize_weights=False, weight_scale=1.5
    )
    variables = upcycled(config)
    variables["params"]["layers_0"]["block_0"]["moe"]["router"] *= 0
    assert distance(config, variables) < 1e-5


def test_slices_are_right_on_average_over_choices():
    """A token of each id passes one slice of three; the mean over ids is the whole's output."""
    config = sparse(num_experts=6, expert_dim=8, router="hash", experts_per_token=1)
    layer = unstack_layers(upcycled(config)["params"], config)[2]["moe"]
    dense = unstack_layers(init(DENSE)["params"], DENSE)[2]["feed_forward"]
    ids_BT = jnp.array([[0], [12], [2], [1], [10], [4]])  # which the hash sends to experts 0 to 5
    x_BTD = jnp.broadcast_to(jax.random.normal(jax.random.key(3), (1, 1, 16)), (6, 1, 16))
    got_BTD, routed = MoE(config.moe).apply(
        {"params": layer}, x_BTD, TokenInfo(ids_BT, ids_BT >= 0)
    )
    assert routed.experts_BTA.ravel().tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(
        jnp.mean(got_BTD, axis=0), FeedForward(24).apply({"params": dense}, x_BTD)[0], atol=1e-5
    )


def test_experts_are_slices_and_all_else_is_copied():
    config = sparse(
        num_experts=6, expert_dim=6, num_shared_experts=1, experts_per_token=3, first_dense_layers=3
    )
    params, dense = upcycled(config)["params"], init(DENSE)["params"]
    before = unstack_layers(dense, DENSE)[3]["feed_forward"]
    moe = unstack_layers(params, config)[3]["moe"]
    for expert, columns in enumerate((slice(6, 12), slice(12, 18), slice(18, 24)) * 2):
        np.testing.assert_array_equal(moe["gate"][expert], before["gate"][:, columns])
        np.testing.assert_array_equal(moe["up"][expert], before["up"][:, columns])
        np.testing.assert_array_equal(moe["down"][expert], 3 * before["down"][columns])
    for name in ("gate", "up"):
        np.testing.assert_array_equal(moe["shared"][name], before[name][:, :6])
    np.testing.assert_array_equal(moe["shared"]["down"], before["down"][:6])
    drawn = unstack_layers(init(config, seed=1)["params"], config)[3]["moe"]["router"]
    np.testing.assert_array_equal(moe["router"], drawn[:, [0, 0, 0, 3, 3, 3]])
    for name in ("embedding", "unembedding", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], dense[name])
    for number in range(3):
        jax.tree.map(
            np.testing.assert_array_equal,
            unstack_layers(params, config)[number],
            unstack_layers(dense, DENSE)[number],
        )


def test_a_router_that_cannot_choose_whole_copies_is_kept_as_drawn():
    config = sparse(num_experts=4, expert_dim=12, experts_per_token=1)
    routers = [
        tree["params"]["layers_0"]["block_0"]["moe"]["router"]
        for tree in (upcycled(config), init(config, seed=1))
    ]
    np.testing.assert_array_equal(*routers)


def test_the_tree_is_a_new_models():
    config = sparse(
        num_experts=4,
        expert_dim=12,
        num_shared_experts=1,
        first_dense_layers=1,
        layer_period=2,
        bias_update_rate=0.1,
    )
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        for tree in (upcycled(config), init(config))
    ]
    assert shapes[0] == shapes[1]


def test_noise_is_a_fraction_of_each_matrix_and_a_function_of_the_key():
    config = sparse(num_experts=4, expert_dim=12)
    plain, noisy, same, other = (
        upcycled(config, noise, key)["params"]["layers_0"]["block_0"]["moe"]
        for noise, key in ((0.0, 2), (0.1, 2), (0.1, 2), (0.1, 3))
    )
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(noisy[name], same[name])
        assert np.all(noisy[name] != other[name])
        added, deviation = noisy[name] - plain[name], np.std(plain[name], axis=(2, 3))
        np.testing.assert_allclose(
            np.std(added, axis=(2, 3)) / deviation, 0.1, rtol=0.25
        )  # of 192 draws each
        assert (
            np.max(np.abs(np.corrcoef(np.reshape(added, (16, -1))) - np.eye(16))) < 0.4
        )  # 4 layers of 4 experts
    np.testing.assert_array_equal(noisy["router"], plain["router"])


def numbered_layers(config):
    return [{"number": jnp.full(2, number)} for number in range(config.num_layers)]


def test_layers_are_numbered_through_groups():
    grouped = dataclasses.replace(
        DENSE, num_layers=6, moe=MoEConfig(num_experts=2, first_dense_layers=1, layer_period=2)
    )
    stacks = stack_layers(numbered_layers(grouped), grouped)
    assert jax.tree.map(lambda x: x[:, 0].tolist(), stacks) == {
        "layers_0": {"block_0": {"number": [0]}},
        "layers_1": {"block_0": {"number": [1, 3]}, "block_1": {"number": [2, 4]}},
        "layers_2": {"block_0": {"number": [5]}},
    }
    plain = dataclasses.replace(grouped, moe=MoEConfig())
    regrouped = stack_layers(unstack_layers(stacks, grouped), plain)
    assert regrouped["layers_0"]["block_0"]["number"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"vocab_size": 32},
            "model.vocab_size=32 is 16 in the run to start from: set model.vocab_size to 16",
        ),
        (
            {"num_layers": 5},
            "model.num_layers=5 is 4 in the run to start from: set model.num_layers to 4",
        ),
        (
            {"model_dim": 32},
            "model.model_dim=32 is 16 in the run to start from: set model.model_dim to 16",
        ),
        (
            {"feed_forward_dim": 48},
            "model.feed_forward_dim=48 is 24 in the run to start from: "
            "set model.feed_forward_dim to 24",
        ),
        (
            {"num_heads": 2},
            "model.num_heads=2 is 4 in the run to start from: set model.num_heads to 4",
        ),
        (
            {"tied_embeddings": True},
            "model.tied_embeddings=True is False in the run to start from: "
            "set model.tied_embeddings to False",
        ),
        (
            {"rope_base": 5e5},
            "model.rope_base=500000.0 is 10000.0 in the run to start from: "
            "set model.rope_base to 10000.0",
        ),
        (
            {"moe": MoEConfig()},
            "model.moe.num_experts=0 leaves every layer dense: "
            "set model.moe.num_experts to 1 or more",
        ),
        (
            {"moe": MoEConfig(num_experts=4, expert_dim=10)},
            "model.moe.expert_dim=10 does not divide model.feed_forward_dim=24: "
            "set model.moe.expert_dim to a divisor of 24",
        ),
        (
            {"moe": MoEConfig(num_experts=4, expert_dim=8, num_shared_experts=3)},
            "model.moe.num_shared_experts=3 leaves the routed experts none of the 3 slices of "
            "width 8: set model.moe.num_shared_experts to at most 2",
        ),
        (
            {"moe": MoEConfig(num_experts=4, expert_dim=8)},
            "model.moe.num_experts=4 cannot hold 3 slices equally often: "
            "set model.moe.num_experts to 6",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_refused(change, problem):
    with pytest.raises(ConfigError) as error:
        check_upcycle(DENSE, dataclasses.replace(sparse(num_experts=4, expert_dim=12), **change))
    assert str(error.value) == problem


def test_a_sparse_model_is_not_upcycled():
    config = sparse(num_experts=4, expert_dim=12)
    with pytest.raises(
        ConfigError,
        match=r"num_experts=4 of the run to start from is sparse already: "
        "set --from to a dense run",
    ):
        check_upcycle(config, config)
