"""Every public function in a process that has set JAX up otherwise: 64-bit types, promotion, meshes
of other kinds, transformations.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe import losses
from moe.config import DataConfig, ModelConfig, MoEConfig, OptimizerConfig, RunConfig, TrainConfig
from moe.cross_entropy import Unembedding, cross_entropy_sum
from moe.inference.generate import Sampling, generate, keep_likeliest
from moe.kernels.attention import flash_attention
from moe.model import routing
from moe.model.attention import Attention
from moe.model.dispatch import Weights, dropless
from moe.model.experts import MoE
from moe.model.layers import FeedForward
from moe.model.tokens import TokenInfo
from moe.model.transformer import Transformer
from moe.parallel.collectives import expert as expert_parallel
from moe.parallel.context import ring_attention, ulysses_attention
from moe.parameters import unbox
from moe.tasks.language_modelling import counts, next_token_loss
from moe.training.train_step import make_program


@contextlib.contextmanager
def strict_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


# Both kinds of promotion are errors or nothing, so that one trace finds both.
SETTINGS = {"64-bit types": lambda: jax.enable_x64(True), "strict promotion": strict_promotion}
SPARSE = MoEConfig(num_experts=4, experts_per_token=2, expert_dim=8)
DENSE = ModelConfig(
    vocab_size=256,
    num_layers=2,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    compute_dtype="float32",
)
MODELS = {
    "dense": DENSE,
    "sparse": dataclasses.replace(DENSE, moe=SPARSE, compute_dtype="bfloat16"),
    "tied, first layer dense": dataclasses.replace(
        DENSE,
        tied_embeddings=True,
        moe=dataclasses.replace(
            SPARSE, first_dense_layers=1, num_shared_experts=1, dispatch="capacity"
        ),
    ),
}


def rows(batch=8, length=6):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (batch, length)), jnp.int32)
    segments = jnp.asarray(
        np.where(np.arange(length) < length - 1, 1, 0)[None].repeat(batch, 0), jnp.int32
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return {
        "tokens": tokens,
        "targets": tokens,
        "loss_mask": segments > 0,
        "segment_ids": segments,
        "positions": positions,
    }


def activations(batch=8, length=6, width=16, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, length, width)), dtype)


@functools.cache
def variables(model, *shape_of_x):
    """The variables of a model, for a batch of tokens, or of a layer, for activations."""
    example = activations(*shape_of_x) if shape_of_x else rows()
    return jax.jit(lambda key: unbox(model.init(key, example)))(jax.random.key(0))


def model_loss(config):
    model, loss_fn = Transformer(config), next_token_loss(3)

    def loss(variables, batch):
        output = model.apply(variables, batch)
        sums = loss_fn(output, model.apply(variables, method="unembedding"), batch)
        return losses.objective(sums, counts(batch), config.moe), losses.metrics(sums)

    return loss


def layer_loss(config):
    """A sum of all that a sparse layer returns, with draws, padding and biases."""
    layer = MoE(config)

    def loss(variables, x, tokens):
        y, routed = layer.apply(variables, x, tokens)
        return jnp.sum(y.astype(jnp.float32)) + sum(
            jnp.sum(value) for value in routed.stats
        ), routed

    return loss


def tokens_of(batch):
    rows = jnp.arange(batch["tokens"].shape[0], dtype=jnp.uint32)
    return TokenInfo.from_batch(batch | {"row_keys": jax.vmap(jax.random.key)(rows)}, DENSE)


def layer_case(dtype="float32", **options):
    config = dataclasses.replace(SPARSE, **options)
    layer, tokens, x = MoE(config), tokens_of(rows()), activations(dtype=dtype)
    params = jax.jit(lambda: unbox(layer.init(jax.random.key(0), x, tokens)))()
    return jax.value_and_grad(layer_loss(config), argnums=(0, 1), has_aux=True), (params, x, tokens)


def program_case(config):
    model = dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, jitter=0.1, bias_update_rate=0.01)
    )
    run = RunConfig(
        model=model,
        data=DataConfig(sequence_length=6),
        optimizer=OptimizerConfig(warmup_fraction=0.25),
        train=TrainConfig(batch_size=8, accumulation=2, steps=4),
    )
    program = make_program(run, jax.devices()[:1])

    def steps(batch):
        state = program.init_state()
        state, metrics = program.train_step(state, batch)
        return state, metrics, program.eval_step(state.variables, batch)

    return steps, (rows(),)


def experts_case():
    """The experts without their router, and the plan of an exchange."""
    rng = np.random.default_rng(0)
    gate, up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((4, 16, 8), (4, 16, 8), (4, 8, 16))
    )
    x, experts, weights = (
        activations(dtype="bfloat16")[0],
        jnp.asarray(rng.integers(0, 4, (6, 2))),
        jnp.ones((6, 2), jnp.float32),
    )
    loads = jnp.asarray([[3, 1], [2, 4]], jnp.int32)

    def function(x, experts, weights, gate, up, down, loads):
        y = dropless(x, experts, weights, Weights(gate, up, down)).y_ND
        plan = (
            expert_parallel.plan_exchange(loads, room=4),
            expert_parallel.received_experts(loads, jnp.int32(1), room=6),
        )
        return (
            y,
            plan,
            keep_likeliest(x.astype(jnp.float32), 3, 0.9),
            routing.update_bias(weights, weights, 0.1),
        )

    return function, (x, experts.astype(jnp.int32), weights, gate, up, down, loads)


CASES = {f"loss and gradient, {name}": lambda config=config: (
    jax.value_and_grad(model_loss(config), has_aux=True), (variables(Transformer(config)), rows())
) for name, config in MODELS.items()}  # fmt: skip
CASES |= {
    f"steps, {name}": functools.partial(program_case, MODELS[name]) for name in ("dense", "sparse")
}
CASES |= {
    "MoE, softmax, dropless": functools.partial(
        layer_case, dtype="bfloat16", num_groups=2, groups_per_token=1, jitter=0.1
    ),
    "MoE, sigmoid, capacity": functools.partial(
        layer_case, router="sigmoid", dispatch="capacity", bias_update_rate=0.1
    ),
    "MoE, probability, dense": functools.partial(
        layer_case, dispatch="dense", num_shared_experts=1, balance_scope="row"
    ),
    "MoE, hash, capacity": functools.partial(
        layer_case, "bfloat16", router="hash", dispatch="capacity", priority="probability"
    ),
    "MoE, expert choice": functools.partial(
        layer_case, router="expert_choice", dispatch="capacity"
    ),
    "experts alone": experts_case,
}


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@functools.cache
def usual_types(case):
    function, arguments = CASES[case]()
    return types(jax.eval_shape(function, *arguments))


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
# The steps of the sparse model trace all of these but for the capacity, which layers have too.
SLOW_TO_TRACE = (
    "loss and gradient, dense",
    "loss and gradient, sparse",
    "loss and gradient, tied, first layer dense",
    "steps, dense",
)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "case", [exhaustive(case) if case in SLOW_TO_TRACE else case for case in CASES]
)
def test_a_setting_of_the_process_changes_no_type(case, setting):
    """Traced alone: mixed types and ranks are found while tracing, and so is a float64 that nobody
    asked for.
    """
    function, arguments = CASES[case]()
    with SETTINGS[setting]():
        found = types(jax.eval_shape(function, *arguments))
    assert found == usual_types(case)


@contextlib.contextmanager
def all_settings():
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        yield


def same(actual, expected, rtol=1e-5):
    """Within `rtol` of each leaf's largest number."""

    def compare(a, b):
        if not jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = np.float64(np.asarray(a)), np.float64(np.asarray(b))
            np.testing.assert_allclose(a, b, atol=rtol * max(np.abs(b).max(initial=0), 1e-3))

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize(
    "case", [case if case.startswith("MoE") else exhaustive(case) for case in CASES]
)
def test_all_settings_together_change_no_type(case):
    """With 64-bit types argsort makes int64, which strict promotion does not mix with int32."""
    function, arguments = CASES[case]()
    with all_settings():
        found = types(jax.eval_shape(function, *arguments))
    assert found == usual_types(case)


@pytest.mark.parametrize(
    "case", [exhaustive("loss and gradient, sparse"), "MoE, sigmoid, capacity"]
)
def test_all_settings_together_change_no_number(case):
    function, arguments = CASES[case]()
    expected = jax.jit(function)(*arguments)
    with all_settings():
        same(jax.jit(function)(*arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.7, 3, 0.9)])
def test_text_is_generated_with_all_settings(sampling):
    config = dataclasses.replace(DENSE, moe=SPARSE)
    model, prompts = Transformer(config), [np.array([1, 2, 3]), np.array([4])]
    arguments = {"max_new_tokens": 3, "end_id": -1, "sampling": sampling}
    expected = generate(model, variables(model), prompts, **arguments)
    with all_settings():
        found = generate(model, variables(model), prompts, **arguments)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]


def layout(mesh, tree, *spec):
    """Puts each array of a tree on the mesh, laid out by `spec`.

    Without `spec`, all axes of the mesh split the first dimension whose size they divide.
    """

    def put(x):
        axes = spec or (mesh.axis_names,)
        split = next((dim for dim, size in enumerate(x.shape) if size % 8 == 0), None)
        entries = axes if spec else (() if split is None else (None,) * split + axes)
        return jax.device_put(x, NamedSharding(mesh, P(*entries)))

    return jax.tree.map(put, tree)


def sum_of_sines(tree):
    return sum(
        jnp.sum(jnp.sin(x.astype(jnp.float32)))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


def results_and_gradients(function, argnums):
    """Returns a function of what `function` returns and of its gradients, which calls it once."""

    def total(variables, x):
        results = function(variables, x)
        return sum_of_sines(results), results

    return jax.value_and_grad(total, argnums, has_aux=True)


def transformer_on(variables, batch):
    model = Transformer(dataclasses.replace(DENSE, moe=SPARSE), capture=("residual",))
    output = model.apply(variables, batch)
    return model.apply(variables, output.hidden, method="unembed"), output.stats, output.captured


def moe_on(dispatch):
    return lambda variables, x: MoE(
        dataclasses.replace(SPARSE, dispatch=dispatch, num_shared_experts=1)
    ).apply(variables, x)


def attention_on(variables, x):
    return Attention(DENSE).apply(
        variables, x, TokenInfo.from_batch({"tokens": jnp.zeros(x.shape[:2], jnp.int32)}, DENSE)
    )[0]


def attention_variables():
    example = activations()
    positions = TokenInfo.from_batch({"tokens": jnp.zeros(example.shape[:2], jnp.int32)}, DENSE)
    return unbox(Attention(DENSE).init(jax.random.key(0), example, positions))


def shared_moe_variables():
    return variables(MoE(dataclasses.replace(SPARSE, num_shared_experts=1)), 8)


ON_MESHES = {
    "Transformer": (
        transformer_on,
        lambda: (variables(Transformer(dataclasses.replace(DENSE, moe=SPARSE))), rows()),
    ),
    "MoE, dropless": (moe_on("dropless"), lambda: (shared_moe_variables(), activations())),
    "MoE, capacity": (moe_on("capacity"), lambda: (shared_moe_variables(), activations())),
    "FeedForward": (
        lambda v, x: FeedForward(24).apply(v, x),
        lambda: (variables(FeedForward(24), 8), activations()),
    ),
    "Attention": (attention_on, lambda: (attention_variables(), activations())),
}


@pytest.mark.parametrize(
    ("function", "names"),
    # All parts of a Transformer are plain cases of their own.
    [(name, ("data", "fsdp")) for name in ON_MESHES if name != "Transformer"]
    + [pytest.param("Transformer", ("data", "fsdp"), marks=pytest.mark.slow)]
    + [("MoE, capacity", ("rows", "expert"))]
    + [
        exhaustive(name, ("rows", "expert"))
        for name in ("Transformer", "MoE, dropless", "FeedForward", "Attention")
    ],
)
def test_explicit_axes_change_nothing(function, names):
    """jax.make_mesh makes Explicit axes by default. Inputs and weights are split over both, results
    lie as the inputs do.
    """
    function, make = ON_MESHES[function]
    arguments = make()
    run = results_and_gradients(function, argnums=0)
    (_, expected), expected_gradient = jax.jit(run)(*arguments)
    mesh = jax.make_mesh((4, 2), names)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with jax.set_mesh(mesh):
        placed = layout(mesh, arguments[0]), layout(mesh, arguments[1], names)
        (_, found), gradient = jax.jit(run)(*placed)
    same(found, expected)
    same(gradient, expected_gradient, rtol=1e-4)
    assert jax.tree.leaves(found)[0].sharding.spec[0] == names


@pytest.mark.slow
def test_explicit_axes_without_jit():
    function, make = ON_MESHES["MoE, dropless"]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    expected = function(*make())
    with jax.set_mesh(mesh):
        layer_variables, x = make()
        same(function(layout(mesh, layer_variables), layout(mesh, x, "data")), expected)
        unbox(MoE(SPARSE).init(jax.random.key(0), layout(mesh, x, "data")))


@pytest.mark.parametrize(
    ("sizes", "batch"), [exhaustive((1, 8, 1), 1), ((4, 1, 2), 4), exhaustive((2, 2, 2), 3)]
)
def test_a_batch_that_the_mesh_cannot_split_is_copied(sizes, batch):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "expert"), (AxisType.Auto,) * 3)
    function = moe_on("dropless")
    x, layer_variables = activations(batch), shared_moe_variables()
    run = results_and_gradients(function, argnums=(0, 1))
    (_, expected), expected_gradient = jax.jit(run)(layer_variables, x)
    with jax.set_mesh(mesh):
        (_, found), gradient = jax.jit(run)(layer_variables, x)
    same(found, expected)
    same(gradient, expected_gradient, rtol=1e-4)


def sparse_on(exchange):
    config = dataclasses.replace(
        SPARSE, dispatch="capacity", exchange=exchange, num_shared_experts=1, capacity_factor=2.0
    )
    return lambda variables, x: MoE(config).apply(variables, x)[0]


ON_MANUAL_AXES = {
    "MoE, all_to_all": (sparse_on("all_to_all"), shared_moe_variables, ("all-to-all",)),
    "MoE, all_gather": (
        sparse_on("all_gather"),
        shared_moe_variables,
        ("all-gather", "reduce-scatter"),
    ),
    "Attention": (attention_on, attention_variables, ()),
}


@pytest.mark.parametrize("axis", ["data", "pipeline"])
@pytest.mark.parametrize("name", ON_MANUAL_AXES)
def test_a_manual_axis_leaves_the_others_their_layouts_and_exchange(name, axis):
    """Inside a shard_map over one axis, the others split rows, weights and experts as outside."""
    function, make_variables, collectives = ON_MANUAL_AXES[name]
    mesh = jax.make_mesh((2, 2, 2), (axis, "fsdp", "expert"), (AxisType.Auto,) * 3)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(), P(axis)),
        out_specs=P(axis),
        axis_names={axis},
        check_vma=False,
    )
    gradients = lambda function: jax.jit(
        jax.value_and_grad(lambda v, x: sum_of_sines(function(v, x)), argnums=(0, 1))
    )
    arguments = make_variables(), activations()
    expected = gradients(function)(*arguments)
    with jax.set_mesh(mesh):
        same(gradients(mapped)(*arguments), expected, rtol=1e-4)
        program = jax.jit(mapped).lower(*arguments).compile().as_text()
    assert all(f" {collective}(" in program for collective in collectives)


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_a_sparse_layer_takes_its_own_experts_where_a_shard_map_has_split_them(exchange):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), (AxisType.Auto,) * 2)
    function, variables, x = sparse_on(exchange), shared_moe_variables(), activations()
    specs = jax.tree.map(lambda w: P("expert") if w.ndim == 3 else P(), variables)
    rows = P(("data", "expert"))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False
    )
    gradients = lambda function: jax.jit(
        jax.value_and_grad(lambda v, x: sum_of_sines(function(v, x)), argnums=(0, 1))
    )
    expected = gradients(function)(variables, x)
    with jax.set_mesh(mesh):
        same(gradients(mapped)(variables, x), expected, rtol=1e-4)


def test_pure_functions_take_explicit_axes_as_they_are():
    config = dataclasses.replace(SPARSE, num_groups=2, groups_per_token=1)

    def function(x, tokens):
        routed = routing.route(x[..., :4], config, tokens > 9)
        loss = cross_entropy_sum(x, Unembedding(jnp.eye(16)), tokens % 16, tokens > 9, chunk=4)
        return routed, loss, routing.hash_logits(tokens, config) == 0

    arrays, mesh = (activations(), rows()["tokens"]), jax.make_mesh((4, 2), ("data", "fsdp"))
    expected = jax.jit(function)(*arrays)
    with jax.set_mesh(mesh):
        same(jax.jit(function)(*layout(mesh, arrays, "data")), expected)


def heads(batch=8, length=8):
    return jnp.asarray(np.random.default_rng(2).normal(size=(batch, length, 4, 8)), jnp.float32)


def test_flash_attention_says_what_explicit_axes_need_and_runs_with_it():
    q, mesh = heads(), jax.make_mesh((4, 2), ("data", "fsdp"))
    attend = functools.partial(flash_attention, causal=True)
    part = P("data")
    wrapped = jax.shard_map(attend, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    run = lambda attend: jax.jit(jax.value_and_grad(lambda q: jnp.sum(jnp.sin(attend(q, q, q)))))
    expected = run(attend)(q)
    with jax.set_mesh(mesh):
        q = layout(mesh, q, "data")
        with pytest.raises(
            ValueError,
            match=r"q \(8, 8, 4, 8\) is split over Explicit mesh axes, .*jax.shard_map over these",
        ):
            attend(q, q, q)
        same(run(wrapped)(q), expected)


@pytest.mark.parametrize("attention", [flash_attention, ring_attention, ulysses_attention])
def test_attention_says_that_shard_map_must_not_check_its_axes(attention):
    mesh, q = (
        jax.make_mesh((2,), ("context",), (AxisType.Auto,), devices=jax.devices()[:2]),
        heads(),
    )
    keywords = {"causal": True} | ({} if attention is flash_attention else {"axis_name": "context"})
    split = P("context") if attention is flash_attention else P(None, "context")
    run = functools.partial(attention, implementation="reference", **keywords)
    mapped = functools.partial(jax.shard_map, run, mesh=mesh, in_specs=split, out_specs=split)
    with pytest.raises(
        ValueError,
        match=r"q .* is inside a jax.shard_map that checks \['context'\]: give it check_vma=False",
    ):
        mapped()(q, q, q)
    same(
        jax.jit(mapped(check_vma=False))(q, q, q),
        flash_attention(q, q, q, causal=True, implementation="reference"),
    )


def test_experts_say_what_shard_map_and_explicit_axes_need():
    function, (x, *arrays) = experts_case()
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(
        lambda x: function(jnp.concatenate([x, x]), *arrays)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with pytest.raises(
        ValueError,
        match=r"x_ND \(6, 16\) is inside a jax.shard_map that checks \['data'\]: "
        r"give it check_vma=False",
    ):
        mapped(x)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            ValueError,
            match=r"x_ND \(6, 16\) is split over Explicit .* inside a jax.shard_map over these",
        ),
    ):
        function(layout(mesh, x, "data"), *arrays)


def transformed(function, variables, x):
    """By name: the function under a transformation, and what it must equal."""
    loss = lambda v, x: sum_of_sines(function(v, x))
    rows = jax.tree.map(lambda x: x[:, None], x)
    by_row = [
        function(variables, jax.tree.map(lambda x: x[row], rows))  # noqa: B023
        for row in range(jax.tree.leaves(x)[0].shape[0])
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_row)
    return {
        "vmap": (lambda: jax.vmap(function, (None, 0))(variables, rows), stacked),
        "scan": (
            lambda: jax.lax.scan(lambda _, row: (None, function(variables, row)), None, rows)[1],
            stacked,
        ),
        "checkpoint": (
            lambda: jax.grad(jax.checkpoint(loss))(variables, x),
            jax.grad(loss)(variables, x),
        ),
        "vmap of gradients": (
            lambda: jax.tree.map(
                lambda x: jnp.sum(x, 0), jax.vmap(jax.grad(loss), (None, 0))(variables, rows)
            ),
            jax.grad(
                lambda v: sum(
                    loss(v, jax.tree.map(lambda x: x[row], rows))  # noqa: B023
                    for row in range(len(by_row))
                )
            )(variables),
        ),
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["MoE, dropless", "Transformer", "MoE, capacity", "Attention"])
def test_transformations_around_a_module_change_nothing(function):
    function, make = ON_MESHES[function]
    variables, x = make()
    cases = transformed(jax.jit(function), variables, jax.tree.map(lambda x: x[:2], x))
    for run, expected in cases.values():
        same(jax.jit(run)(), expected, rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
def test_a_sparse_layer_has_second_derivatives_in_reverse_mode_alone(dispatch):
    """In dense dispatch they agree with finite differences, and the others agree with dense."""
    x, params = activations(1, 4), variables(MoE(SPARSE), 8)
    apply = lambda dispatch, v: MoE(dataclasses.replace(SPARSE, dispatch=dispatch)).apply(v, x)[0]
    gradient = lambda dispatch, v: jax.grad(lambda v: sum_of_sines(apply(dispatch, v)))(v)
    second = lambda dispatch: jax.grad(lambda v: sum_of_sines(gradient(dispatch, v)))(params)
    if dispatch == "dense":
        direction = jax.tree.map(
            lambda leaf: (
                1e-3 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
            ),
            params,
        )
        ahead, behind = (
            sum_of_sines(gradient(dispatch, jax.tree.map(op, params, direction)))
            for op in (jnp.add, jnp.subtract)
        )
        slope = sum(
            jnp.sum(a * b)
            for a, b in zip(
                jax.tree.leaves(second(dispatch)), jax.tree.leaves(direction), strict=True
            )
        )
        np.testing.assert_allclose(2 * slope, ahead - behind, rtol=2e-2)
    else:
        same(second(dispatch), second("dense"), rtol=1e-4)
    with pytest.raises(TypeError, match=r"forward-mode .* to a custom_vjp function"):
        jax.jvp(functools.partial(apply, dispatch), (params,), (params,))


def test_symbolic_shapes_are_refused_in_one_line():
    batch, length = jax.export.symbolic_shape("b, t")
    model = Transformer(DENSE)
    export = lambda shape: jax.export.export(jax.jit(model.apply))(
        variables(model), {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}
    )
    for shape in ((batch, 6), (8, length)):
        with pytest.raises(
            ValueError,
            match=r"^tokens \(.*\) has a symbolic size, .*: export a program for each shape",
        ):
            export(shape)
    export((8, 6))
    for dispatch in ("dense", "dropless"):
        layer = MoE(dataclasses.replace(SPARSE, dispatch=dispatch))
        run = lambda shape: jax.export.export(jax.jit(layer.apply))(  # noqa: B023
            variables(MoE(SPARSE), 8), jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        with (
            pytest.raises(ValueError, match=r"^x_BTD \(.*\) has a symbolic size")
            if dispatch != "dense"
            else contextlib.nullcontext()
        ):
            run((batch, 6, 16))
        with pytest.raises(ValueError, match=r"^x_BTD \(.*\) has a symbolic size"):
            run((8, length, 16))


@pytest.mark.parametrize(
    "model",
    [
        Transformer(dataclasses.replace(DENSE, num_layers=1)),
        # tests/model/test_dispatch.py gives both strategies NumPy arrays, too.
        *(
            pytest.param(MoE(dataclasses.replace(SPARSE, dispatch=d)), marks=pytest.mark.slow)
            for d in ("capacity", "dropless")
        ),
    ],
)
def test_numpy_arrays_are_arrays_too(model):
    """As parameters, which a checkpoint may give as NumPy arrays, and as inputs; outside of jit,
    which would make them JAX's.
    """
    arrays, x = (
        (variables(model), rows(2))
        if isinstance(model, Transformer)
        else (variables(model, 2), activations(2))
    )
    expected = jax.tree.leaves(jax.jit(model.apply)(arrays, x))
    actual = jax.tree.leaves(model.apply(*jax.tree.map(np.asarray, (arrays, x))))
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
