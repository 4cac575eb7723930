"""Dispatch strategies against a plain loop over tokens and experts, and the exchanges between
devices against one device.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.model.experts import (
    MoE,
    Weights,
    capacity_dispatch,
    dense_dispatch,
    dropless,
    run_experts,
)
from moe.model.routing import route
from moe.model.tokens import TokenInfo
from moe.model.transformer import Transformer
from moe.parallel import expert as expert_parallel
from moe.parameters import unbox

E, A, D, F = 4, 2, 6, 5
CONFIG = MoEConfig(num_experts=E, experts_per_token=A, expert_dim=F)


def through(make_dispatch, x, experts, combine, *weights):
    dispatch = make_dispatch(experts, combine, E)
    return dispatch.receive(Weights(*weights)(dispatch.send(x)))


DISPATCHES = {
    "dense": functools.partial(through, dense_dispatch),
    "capacity": functools.partial(
        through,
        lambda experts, *rest: capacity_dispatch(
            experts, *rest, capacity=int(loads(experts).max())
        ),
    ),
    "dropless": lambda x, experts, combine, *weights: dropless(
        x, experts, combine, Weights(*weights)
    ),
    "dropless, blocks of 3": lambda x, experts, combine, *weights: dropless(
        x, experts, combine, Weights(*weights), block=3
    ),
    "dropless, blocks of 1": lambda x, experts, combine, *weights: dropless(
        x, experts, combine, Weights(*weights), block=1
    ),
}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.float32(rng.normal(size=shape)) for shape in ((E, D, F), (E, D, F), (E, F, D)))


def loads(experts):
    return np.bincount(np.ravel(experts), minlength=E)[:E]


def routed(tokens=14, seed=0):
    """Rows, experts (some of them E: nowhere; the first without tokens, the last with the most) and
    weights.
    """
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E - 1)[:A] for _ in range(tokens)])
    experts[rng.random((tokens, A)) < 0.2] = E
    experts = np.append(np.argsort(np.argsort(loads(experts))), E)[experts]
    return (
        jnp.float32(rng.normal(size=(tokens, D))),
        jnp.int32(experts),
        jnp.float32(rng.random((tokens, A)) * (experts < E)),
    )


def plain(x, experts, combine, gate, up, down):
    y = np.zeros_like(x)
    for n in range(len(x)):
        for a in range(experts.shape[1]):
            if (e := experts[n, a]) < len(gate):
                hidden = jax.nn.silu(x[n] @ gate[e]) * (x[n] @ up[e])
                y[n] += combine[n, a] * (hidden @ down[e])
    return y


def close(actual, expected, rtol=1e-6):
    """Within `rtol` of the largest number: sums of five and six products of that size may cancel to
    anything smaller.
    """
    np.testing.assert_allclose(actual, expected, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", DISPATCHES)
def test_a_dispatch_equals_a_loop_over_tokens(name):
    arguments = (*routed(), *weights())
    close(DISPATCHES[name](*arguments), plain(*map(np.asarray, arguments)))


@pytest.mark.parametrize("name", list(DISPATCHES)[1:])
def test_a_dispatch_has_the_oracles_gradients(name):
    x, experts, combine = routed()
    target = jnp.float32(np.random.default_rng(1).normal(size=x.shape))

    def loss(dispatch, x, combine, *weights):
        return jnp.sum(dispatch(x, experts, combine, *weights) * target)

    gradients = [
        jax.grad(functools.partial(loss, DISPATCHES[which]), range(5))(x, combine, *weights())
        for which in ("dense", name)
    ]
    assigned = np.asarray(experts < E)  # an assignment to nowhere has a weight that nothing reads
    gradients = [(g[0], np.where(assigned, g[1], 0), *g[2:]) for g in gradients]
    for expected, actual in zip(*gradients, strict=True):
        close(actual, expected)


def test_dropless_takes_the_most_uneven_load():
    """All assignments to one expert, each to an expert of its own, and all to nowhere fill no more
    blocks than there are.
    """
    x = jnp.float32(np.random.default_rng(0).normal(size=(40, D)))
    combine = jnp.ones((40, 1))
    for experts in (
        jnp.zeros((40, 1), jnp.int32),
        jnp.arange(40, dtype=jnp.int32)[:, None] % E,
        jnp.full((40, 1), E),
    ):
        y = dropless(x, experts, combine, Weights(*weights()), block=8)
        close(y, plain(*map(np.asarray, (x, experts, combine, *weights()))))


def test_capacity_rows_lie_by_expert():
    """Experts 2, 0, 0, 2, 2 with room for 3: two rows of 0, none of 1, three of 2."""
    experts = jnp.array([[2], [0], [0], [2], [2]])
    dispatch = capacity_dispatch(experts, jnp.ones((5, 1)), 3, capacity=3)
    rows = dispatch.send(jnp.arange(1.0, 6.0)[:, None])
    np.testing.assert_array_equal(rows[..., 0], [[2, 3, 0], [0, 0, 0], [1, 4, 5]])
    np.testing.assert_array_equal(dispatch.receive(rows)[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(dispatch.dropped_N, 0)


def test_a_row_beyond_an_experts_room_takes_no_others_place():
    """Two experts get three tokens and have room for two; -1 and 7 are no experts at all."""
    experts = jnp.array([[0], [0], [0], [2], [2], [2], [-1], [7]])
    dispatch = capacity_dispatch(experts, jnp.ones((8, 1)), 3, capacity=2)
    rows = dispatch.send(jnp.arange(1.0, 9.0)[:, None])
    np.testing.assert_array_equal(rows[..., 0], [[1, 2], [0, 0], [4, 5]])
    np.testing.assert_array_equal(dispatch.receive(rows)[:, 0], [1, 2, 0, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(dispatch.dropped_N, [0, 0, 1, 0, 0, 1, 0, 0])
    gradient = jax.grad(lambda x: jnp.sum(dispatch.receive(dispatch.send(x))))(jnp.ones((8, 1)))
    np.testing.assert_array_equal(gradient[:, 0], [1, 1, 0, 1, 1, 0, 0, 0])


def test_a_dropped_assignment_adds_nothing_even_where_another_row_is_nan():
    """The token 0 has no expert, the token 4 no room, and the last of all rows is NaN."""
    experts = jnp.array([[2], [0], [1], [1], [1]])
    dispatch = capacity_dispatch(experts, jnp.ones((5, 1)), 2, capacity=2)
    rows = jnp.array([[[1.0], [0.0]], [[2.0], [jnp.nan]]])
    np.testing.assert_array_equal(dispatch.receive(rows)[:, 0], [0, 1, 2, jnp.nan, 0])
    gradient = jax.vjp(dispatch.send, jnp.ones((5, 1)))[1](rows)[0]
    np.testing.assert_array_equal(gradient[:, 0], [0, 1, 2, jnp.nan, 0])


MESH = (2, 4), ("data", "expert"), (AxisType.Auto,) * 2


def batch(seed=0, rows=8, length=5):
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, normalize_weights=False)
    routing = route(
        jnp.float32(rng.normal(size=(rows, length, E))),
        config,
        jnp.array(rng.random((rows, length)) < 0.8),
    )
    return jnp.float32(rng.normal(size=(rows, length, D))), routing.experts_BTA, routing.weights_BTA


def emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What the collective does, by gathering everything: sender s's rows from input_offsets[me] on
    go to output_offsets[me] of mine.
    """
    me = jax.lax.axis_index(axis_name)
    gather = lambda x: jax.lax.all_gather(x, axis_name)
    operands, starts, sizes, offsets = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    index = jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        place = index - offsets[sender, me]
        inside = (place >= 0) & (place < sizes[sender, me])
        rows = (
            operands[sender]
            .at[jnp.where(inside, place + starts[sender, me], operand.shape[0])]
            .get(mode="fill", fill_value=0)
        )
        output = jnp.where(inside[:, None], rows, output)
    return output


def over_mesh(config, capacity, x, experts, combine, *weights):
    mesh = jax.make_mesh(*MESH)
    rows, of_experts = PartitionSpec(("data", "expert")), PartitionSpec("expert")
    function = functools.partial(run_experts, config, capacity)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows,) * 3 + (of_experts,) * 3,
        out_specs=(rows, rows),
        check_vma=False,
    )
    return jax.jit(mapped)(x, experts, combine, *weights)


EXCHANGES = [
    ("all_gather", "dense"),
    ("all_gather", "capacity"),
    ("all_gather", "dropless"),
    ("all_to_all", "capacity"),
]


@pytest.mark.parametrize(("exchange", "dispatch"), [*EXCHANGES, ("ragged_all_to_all", "dropless")])
def test_an_exchange_equals_one_device(exchange, dispatch, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    config = dataclasses.replace(CONFIG, exchange=exchange, dispatch=dispatch, receive_factor=4.0)
    x, experts, combine = batch()
    target = jnp.float32(np.random.default_rng(1).normal(size=x.shape))

    def loss(run, x, combine, *weights):
        return jnp.sum(run(config, 5, x, experts, combine, *weights)[0] * target)

    y, dropped = over_mesh(config, 5, x, experts, combine, *weights())
    close(y, run_experts(config, 5, x, experts, combine, *weights())[0])
    assert not dropped.any()
    expected, actual = (
        jax.grad(functools.partial(loss, run), range(5))(x, combine, *weights())
        for run in (run_experts, over_mesh)
    )
    assigned = np.asarray(experts < E)
    close(np.where(assigned, actual[1], 0), np.where(assigned, expected[1], 0))
    for index in (0, 2, 3, 4):
        close(actual[index], expected[index])


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_what_overflows_an_experts_rows_is_counted_and_passes_by(exchange):
    """An unlimited caller gives experts 2 or 3 of a row's 5 tokens; they have room for 1."""
    config = dataclasses.replace(
        CONFIG, exchange=exchange, dispatch="capacity", experts_per_token=1, normalize_weights=False
    )
    x, _, _ = batch()
    experts, combine = (
        jnp.broadcast_to(jnp.array([0, 1, 0, 1, 0])[:, None], (8, 5, 1)),
        jnp.ones((8, 5, 1)),
    )
    y, dropped = over_mesh(config, 1, x, experts, combine, *weights())
    assert dropped.sum() == 8 * 3
    free = plain(
        *map(
            np.asarray,
            (x.reshape(40, D), experts.reshape(40, 1), combine.reshape(40, 1), *weights()),
        )
    )
    np.testing.assert_allclose(
        y, np.where(np.asarray(dropped)[..., None] > 0, 0, free.reshape(x.shape)), atol=1e-5
    )


def test_what_overflows_a_ragged_exchange_is_counted_and_passes_by(monkeypatch):
    """Everything goes to device 0, which has room for as many rows as one device sends: the first
    device's.
    """
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    config = dataclasses.replace(
        CONFIG, exchange="ragged_all_to_all", experts_per_token=1, receive_factor=1.0
    )
    x, _, _ = batch()
    experts, combine = jnp.zeros((8, 5, 1), jnp.int32), jnp.ones((8, 5, 1))
    y, dropped = over_mesh(config, 5, x, experts, combine, *weights())
    kept = np.array(
        [True, False, False, False] * 2
    )  # of each data row's four devices, one row of the batch each
    np.testing.assert_array_equal(dropped, np.broadcast_to(~kept[:, None], (8, 5)))
    np.testing.assert_array_equal(y[~kept], 0)
    close(y[kept], run_experts(config, 5, x, experts, combine, *weights())[0][kept])


def test_the_plan_of_an_exchange_by_hand():
    """Two devices of one expert each: 3 and 1 rows from device 0, 2 and 4 from device 1, and room
    for 4.
    """
    plan = expert_parallel.plan_exchange(jnp.array([[3, 1], [2, 4]]), room=4)
    np.testing.assert_array_equal(plan.starts_PP, [[0, 3], [0, 2]])
    np.testing.assert_array_equal(plan.offsets_PP, [[0, 0], [3, 1]])
    np.testing.assert_array_equal(plan.sizes_PP, [[3, 1], [1, 3]])
    np.testing.assert_array_equal(
        expert_parallel.received_experts(jnp.array([[3, 1], [2, 4]]), jnp.array(1), room=6),
        [0, 0, 0, 0, 0, 1],
    )


def test_the_layer_is_usable_alone_and_leaves_padding_out():
    layer = MoE(CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    variables = unbox(layer.init(jax.random.key(1), x))
    y, routing = layer.apply(variables, x)
    assert y.shape == x.shape and routing.sums["tokens"] == 10 and routing.sums["dropped"] == 0
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    padded, routing = layer.apply(variables, x, TokenInfo(jnp.zeros((2, 5), jnp.int32), mask))
    np.testing.assert_allclose(padded[mask], y[mask], atol=1e-6)
    np.testing.assert_array_equal(padded[1, 3:], 0)
    assert routing.sums["load"].sum() == 8 * A


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
def test_what_float32_is_claimed_for_is_float32_on_every_chip(dispatch):
    """In a bfloat16 model all matmuls of float32 are the router's and its sums'. By default TPUs
    and GPUs would round their operands.
    """
    layer, x = (
        MoE(MoEConfig(num_experts=4, expert_dim=8, dispatch=dispatch, num_shared_experts=1)),
        jnp.ones((2, 8, 8), jnp.bfloat16),
    )
    params = unbox(jax.eval_shape(layer.init, jax.random.key(0), x))

    def loss(params, x):
        y, routed = layer.apply(params, x)
        return jnp.sum(y.astype(jnp.float32)) + sum(
            jnp.sum(value) for value in routed.sums.values()
        )

    program = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .trace(params, x)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    matmuls = re.findall(r"dot_general.*: \(tensor<[^>]*f32>, tensor<[^>]*f32>\)", program)
    assert (
        len(matmuls) >= 5
    )  # the logits, their two gradients, and the gradients of the balance loss
    assert [matmul for matmul in matmuls if "precision = [HIGHEST, HIGHEST]" not in matmul] == []


def test_bfloat16_activations_are_routed_in_float32():
    layer = MoE(CONFIG)
    x = jax.random.normal(jax.random.key(0), (2, 5, D), jnp.bfloat16)
    variables = unbox(layer.init(jax.random.key(1), x))
    y, routing = layer.apply(variables, x)
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


@pytest.mark.parametrize("factor", [1.2, 0.7, 1.3])
@pytest.mark.parametrize(
    "changes",
    [
        {"dispatch": "dense"},
        {"dispatch": "capacity"},
        {"dispatch": "dropless"},
        {"dispatch": "capacity", "priority": "probability"},
    ],
)
def test_a_row_of_a_batch_changes_no_other(changes, factor):
    """The second row crowds expert 0 of 4; the first crowds it too, or crowds another.

    With 50 tokens float32 puts 1.2 * 50 / 4 above 15.
    """
    config = MoEConfig(
        num_experts=4, experts_per_token=1, expert_dim=F, capacity_factor=factor, **changes
    )
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
        return jnp.sum(jnp.where(mask[..., None], y, 0.0) ** 2) + routed.sums[
            "balance"
        ] + routed.sums["z"], routed

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
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves((routed.sums, gradient)))


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
        variables = unbox(
            jax.eval_shape(noisy.init, jax.random.key(0), *arguments)
        )  # which draws no jitter
        with pytest.raises(
            ValueError,
            match=r"^jitter=0.1 draws from keys that are not there: pass tokens=.* in training, and set jitter",
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
        return jnp.sum(y**2) + routed.sums["balance"], (y, routed)

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(step)(variables, x)
    with jax.set_mesh(
        jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    ):
        actual = jax.jit(step)(variables, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), actual, expected)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_biases_steer_the_choice_whenever_they_are_given(scan_layers):
    """Also by a config that does not move them: such as one that evaluates or fine-tunes what was
    trained with them.
    """
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
    cases = (
        (config, biased),
        (still, biased),
        (still, drawn),
        (config, drawn),
        (still, {"params": drawn["params"]}),
    )
    hidden = [
        jax.jit(Transformer(c).apply)(variables, batch).hidden.astype(jnp.float32)
        for c, variables in cases
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-6)
    np.testing.assert_allclose(hidden[2], hidden[3], atol=1e-6)
    np.testing.assert_allclose(hidden[2], hidden[4], atol=1e-6)
    assert np.any(abs(hidden[1] - hidden[2]) > 1e-2)
    assert "router_state" not in jax.eval_shape(Transformer(still).init, jax.random.key(0), batch)
