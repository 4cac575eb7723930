"""The sparse layer as a Flax module: alone, with padding, on meshes, and what it refuses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.model.experts import MoE
from moe.model.routing import route
from moe.model.tokens import TokenInfo
from moe.model.transformer import Transformer
from moe.parameters import unbox

E, A, D, F = 4, 2, 6, 5
CONFIG = MoEConfig(num_experts=E, experts_per_token=A, expert_dim=F)


def test_the_layer_is_usable_alone_and_leaves_padding_out():
    layer = MoE(CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    variables = unbox(jax.jit(layer.init)(jax.random.key(1), x))
    y, routing = jax.jit(layer.apply)(variables, x)
    assert y.shape == x.shape and routing.stats.tokens == 10 and routing.stats.dropped == 0
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    tokens = TokenInfo(jnp.zeros((2, 5), jnp.int32), mask)
    padded, routing = jax.jit(layer.apply)(variables, x, tokens)
    np.testing.assert_allclose(padded[mask], y[mask], atol=1e-6)
    np.testing.assert_array_equal(padded[1, 3:], 0)
    assert routing.stats.load.sum() == 8 * A


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
def test_what_float32_is_claimed_for_is_float32_on_every_chip(dispatch):
    """In a bfloat16 model only the router and its statistics have matmuls in float32.

    By default TPUs and GPUs would round their operands.
    """
    layer, x = (
        MoE(MoEConfig(num_experts=4, expert_dim=8, dispatch=dispatch, num_shared_experts=1)),
        jnp.ones((2, 8, 8), jnp.bfloat16),
    )
    params = unbox(jax.eval_shape(layer.init, jax.random.key(0), x))

    def loss(params, x):
        y, routed = layer.apply(params, x)
        return jnp.sum(y.astype(jnp.float32)) + sum(jnp.sum(value) for value in routed.stats)

    program = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .trace(params, x)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    matmuls = re.findall(r"dot_general.*: \(tensor<[^>]*f32>, tensor<[^>]*f32>\)", program)
    # These are the logits, their two gradients, and the gradients of the balance loss.
    assert len(matmuls) >= 5
    assert [matmul for matmul in matmuls if "precision = [HIGHEST, HIGHEST]" not in matmul] == []


def test_bfloat16_activations_are_routed_in_float32():
    layer = MoE(CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, D), jnp.bfloat16)
    variables = unbox(jax.jit(layer.init)(jax.random.key(1), x))
    y, routing = jax.jit(layer.apply)(variables, x)
    assert y.dtype == jnp.bfloat16 and routing.weights_BTA.dtype == jnp.float32
    logits = x.astype(jnp.float32) @ variables["params"]["router"]
    np.testing.assert_array_equal(routing.experts_BTA, route(logits, CONFIG).experts_BTA)


def layer_and_variables(config, x, **tokens):
    layer = MoE(config)
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    init = jax.jit(
        lambda key: unbox(layer.init(key, x, TokenInfo(ids, tokens.get("mask_BT", ids == 0))))
    )
    return layer, init(jax.random.key(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"dispatch": "dense"},
        {"dispatch": "dropless"},
        *(
            {"dispatch": "capacity", "capacity_factor": factor} | priority
            for factor in (1.2, 0.7, 1.3)
            for priority in ({}, {"priority": "probability"})
        ),
    ],
    ids=str,
)
def test_a_row_of_a_batch_changes_no_other(changes):
    """The second row crowds expert 0 of 4; the first crowds it too, or crowds another.

    With 50 tokens float32 puts 1.2 * 50 / 4 above 15.
    """
    config = MoEConfig(num_experts=4, experts_per_token=1, expert_dim=F, **changes)
    x = jax.random.normal(jax.random.key(0), (2, 50, D))
    layer, variables = layer_and_variables(config, x)
    variables["params"]["router"] = jnp.eye(D)[:, :4] * 5.0
    x = x.at[1, :, 0].set(9.0)
    both, alone = x.at[0, :, 0].set(9.0), x.at[0, :, 1].set(99.0)
    apply = jax.jit(layer.apply)
    (y, routed), (other, _) = apply(variables, both), apply(variables, alone)
    np.testing.assert_array_equal(y[1], other[1])
    assert (y[0] != other[0]).any()
    np.testing.assert_array_equal(routed.experts_BTA[0, :, 0], routed.experts_BTA[1, :, 0])
    np.testing.assert_allclose(apply(variables, x[1:])[0][0], y[1], atol=1e-5)


DISPATCH_CONFIGS = {
    "dense": {"dispatch": "dense"},
    "capacity": {"dispatch": "capacity", "capacity_factor": 1.0},
    "dropless": {"dispatch": "dropless"},
    "expert choice": {"dispatch": "capacity", "router": "expert_choice"},
    "jitter": {"jitter": 0.1},
}


@pytest.mark.parametrize("name", DISPATCH_CONFIGS)
def test_nan_in_padding_reaches_nothing(name):
    """Neither other tokens, losses and statistics, nor any gradient."""
    config = dataclasses.replace(CONFIG, num_shared_experts=1, **DISPATCH_CONFIGS[name])
    mask = jnp.array([[True] * 3 + [False] * 2, [False] + [True] * 4])
    clean = jax.random.normal(jax.random.key(0), (2, 5, D))
    layer, variables = layer_and_variables(config, clean, mask_BT=mask)
    keys = jax.random.split(jax.random.key(2), 2) if config.jitter else None

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x):
        y, routed = layer.apply(
            {"params": params}, x, TokenInfo(jnp.zeros((2, 5), jnp.int32), mask, keys)
        )
        losses = routed.stats.balance_loss + routed.stats.z_loss
        return jnp.sum(jnp.where(mask[..., None], y, 0.0) ** 2) + losses, routed

    (value, routed), gradients = loss(variables["params"], clean)
    assert np.isfinite(value)
    spoilt = loss(variables["params"], jnp.where(mask[..., None], clean, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, spoilt, ((value, routed), gradients))


@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)])
@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
def test_no_rows_and_no_tokens_are_a_layers_too(dispatch, shape):
    layer, variables = layer_and_variables(
        dataclasses.replace(CONFIG, dispatch=dispatch, num_shared_experts=1), jnp.zeros(shape)
    )
    (total, routed), gradient = jax.jit(
        jax.value_and_grad(
            lambda variables: (lambda y, routed: (jnp.sum(y), routed))(
                *layer.apply(variables, jnp.zeros(shape))
            ),
            has_aux=True,
        )
    )(variables)
    assert total == 0 and routed.experts_BTA.shape == (*shape[:2], A)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves((routed.stats, gradient)))


def test_what_a_layer_cannot_do_is_refused_in_one_line():
    x, tokens = (
        jnp.zeros((2, 5, D)),
        TokenInfo(jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool)),
    )
    for config, arguments, message in (
        (MoEConfig(), (x,), "num_experts=0 makes a sparse layer without experts"),
        (CONFIG, (x[0],), r"x has shape \(5, 6\): give MoE activations \[B, T, D\]"),
        (
            dataclasses.replace(CONFIG, router="hash"),
            (x,),
            "router='hash' chooses by token ids, and tokens=None has none: pass tokens",
        ),
    ):
        for call in (
            lambda: MoE(config).init(jax.random.key(0), *arguments),  # noqa: B023
            lambda: MoE(config).apply({}, *arguments),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"^{message}") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert issubclass(ConfigError, ValueError)
    noisy = MoE(dataclasses.replace(CONFIG, jitter=0.1))
    for arguments in ((x,), (x, tokens)):
        # `init` draws no jitter.
        variables = unbox(jax.eval_shape(noisy.init, jax.random.key(0), *arguments))
        with pytest.raises(
            ValueError,
            match=r"^jitter=0.1 draws from keys that are not there: pass tokens=.*, and set jitter",
        ):
            jax.eval_shape(noisy.apply, variables, *arguments)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "rows", "dispatch", "exchange"),
    [
        ({"fsdp": 8}, 1, "capacity", "all_to_all"),
        ({"data": 4, "expert": 2}, 4, "dropless", "all_gather"),
        slow({"fsdp": 8}, 1, "dropless", "all_gather"),
        slow({"data": 4, "expert": 2}, 4, "capacity", "all_to_all"),
        slow({"fsdp": 2, "expert": 4}, 2, "capacity", "all_to_all"),
        slow({"data": 2, "fsdp": 2, "tensor": 2}, 3, "dropless", "all_gather"),
    ],
)
def test_a_batch_too_small_for_the_mesh_is_copied(sizes, rows, dispatch, exchange):
    """B gives up its axes; D must not take them. Outputs and gradients are those without a mesh."""
    config = MoEConfig(
        num_experts=8, experts_per_token=2, expert_dim=4, dispatch=dispatch, exchange=exchange
    )
    x = jax.random.normal(jax.random.key(0), (rows, 6, 16))
    layer, variables = layer_and_variables(config, x)

    def loss(variables, x):
        y, routed = layer.apply(variables, x)
        return jnp.sum(y**2) + routed.stats.balance_loss, (y, routed)

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(step)(variables, x)
    with jax.set_mesh(
        jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    ):
        actual = jax.jit(step)(variables, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), actual, expected)


# An unrolled loop has the same body.
@pytest.mark.parametrize("scan_layers", [True, slow(False)])
def test_biases_steer_the_choice_whenever_they_are_given(scan_layers):
    """A config that does not move biases obeys them too, as in evaluation or fine-tuning."""
    moe = MoEConfig(num_experts=E, experts_per_token=A, expert_dim=F, bias_update_rate=0.1)
    config = ModelConfig(
        num_layers=2,
        model_dim=8,
        feed_forward_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        moe=moe,
        scan_layers=scan_layers,
        compute_dtype="float32",
    )
    still = dataclasses.replace(config, moe=dataclasses.replace(moe, bias_update_rate=0.0))
    batch = {"tokens": jnp.arange(12)[None]}
    drawn = unbox(jax.jit(Transformer(config).init)(jax.random.key(0), batch))
    biased = drawn | {
        "router_state": jax.tree.map(lambda bias: bias.at[..., 1].set(5.0), drawn["router_state"])
    }
    moving, obeying = (jax.jit(Transformer(c).apply) for c in (config, still))
    cases = (
        (moving, biased),
        (obeying, biased),
        (obeying, drawn),
        (moving, drawn),
        (obeying, {"params": drawn["params"]}),
    )
    hidden = [apply(variables, batch).hidden.astype(jnp.float32) for apply, variables in cases]
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-6)
    np.testing.assert_allclose(hidden[2], hidden[3], atol=1e-6)
    np.testing.assert_allclose(hidden[2], hidden[4], atol=1e-6)
    assert np.any(abs(hidden[1] - hidden[2]) > 1e-2)
    assert "router_state" not in jax.eval_shape(Transformer(still).init, jax.random.key(0), batch)
