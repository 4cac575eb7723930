"""The model against a plain numpy-style one, its causality, packing, caches and layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moe.config import ModelConfig, MoEConfig
from moe.model import stack
from moe.model.cache import fits_cache, init_cache, update_cache
from moe.model.layers import einsum, look_up, rms_norm, swiglu
from moe.model.transformer import Transformer
from moe.parameters import declarations, is_declared, unbox
from tests.model import plain

SMALL = ModelConfig(
    vocab_size=16,
    num_layers=3,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qk_norm=True,
    compute_dtype="float32",
)


# A variant of attention has a config here.
VARIANTS = pytest.mark.parametrize("config", [SMALL], ids=["plain"])


@functools.cache
def init(config=SMALL, seed=0):
    init = jax.jit(
        lambda key: unbox(Transformer(config).init(key, {"tokens": jnp.zeros((1, 1), jnp.int32)}))
    )
    return plain.draw_scales(init(jax.random.key(seed)))


def tokens(batch=2, length=9, vocab=16, seed=1):
    return jnp.array(np.random.default_rng(seed).integers(0, vocab, (batch, length)))


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, variables, batch):
    return Transformer(config).apply(variables, batch).hidden


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables, batch):
    model = Transformer(config)
    return model.apply(variables, model.apply(variables, batch).hidden, method="unembed")


def plain_transformer(params, row):
    """Logits [T, V] of one row."""
    params, positions = plain.float64(params), np.arange(len(row))
    x = params["embedding"][row]
    hidden = plain.stack(SMALL, params, x, lambda t, s: s <= t, positions)
    return hidden @ params["unembedding"]


def test_equals_a_plain_transformer():
    variables, rows = init(), tokens()
    for row, got in zip(rows, logits(SMALL, variables, {"tokens": rows}), strict=True):
        np.testing.assert_allclose(
            got, plain_transformer(variables["params"], np.asarray(row)), atol=2e-5
        )


@VARIANTS
def test_no_position_sees_a_later_one(config):
    variables, rows = init(config), tokens(batch=1)
    changed = rows.at[0, 5].set((rows[0, 5] + 1) % 16)
    before, after = (logits(config, variables, {"tokens": x})[0] for x in (rows, changed))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert np.all(np.any(before[5:] != after[5:], axis=-1))


@VARIANTS
def test_packed_documents_do_not_see_each_other(config):
    variables, rows = init(config), tokens(batch=1, length=9)
    packed = {
        "tokens": rows,
        "segment_ids": jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
        "positions": jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1]]),
    }
    together = logits(config, variables, packed)[0]
    np.testing.assert_allclose(
        together[:4], logits(config, variables, {"tokens": rows[:, :4]})[0], atol=1e-5
    )
    np.testing.assert_allclose(
        together[4:7], logits(config, variables, {"tokens": rows[:, 4:7]})[0], atol=1e-5
    )


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def loss_and_gradient(config, variables, rows):
    return jnp.sum(jnp.sin(logits(config, variables, {"tokens": rows})))


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "full"},
        # tests/test_invariance.py has unrolled loops as well.
        pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
        {"remat": "save_attention", "scan_layers": False},
    ],
)
@VARIANTS
def test_layouts_give_the_same_loss_and_gradients(config, change):
    variables, rows = init(config), tokens()
    value, gradient = loss_and_gradient(config, variables, rows)
    changed = dataclasses.replace(config, **change)
    other, other_gradient = loss_and_gradient(changed, variables, rows)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        gradient,
        other_gradient,
    )


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_tokens_are_integers(dtype):
    rows = {"tokens": tokens().astype(dtype)}
    with pytest.raises(TypeError, match=f"tokens are {dtype}: give token ids, as int32"):
        jax.eval_shape(Transformer(SMALL).init, jax.random.key(0), rows)


def test_an_array_that_no_layer_has_cannot_be_captured():
    model = Transformer(SMALL, capture=("residuals",))
    with pytest.raises(ValueError, match="'residuals', which no layer has: name 'residual' and"):
        jax.eval_shape(model.init, jax.random.key(0), {"tokens": tokens()})


def test_full_remat_keeps_less():
    config = dataclasses.replace(SMALL, num_layers=16, model_dim=64, feed_forward_dim=256)
    variables, rows = init(config), tokens(batch=8, length=128)

    def temporary_bytes(config):
        loss = lambda variables: jnp.sum(logits(config, variables, {"tokens": rows}))
        return (
            jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary_bytes(dataclasses.replace(config, remat="full")) < temporary_bytes(config) / 2


@VARIANTS
def test_the_cache_changes_nothing(config):
    model, variables, rows = Transformer(config), init(config), tokens(batch=2, length=9)
    apply = jax.jit(model.apply)
    expected = apply(variables, {"tokens": rows}).hidden
    # The first row's prompt has 5 tokens, the second's 3 and two of padding, which later tokens
    # must overwrite. A prompt reads no cache.
    prompt, cache = rows.at[1, 3:5].set(0)[:, :5], model.init_cache(batch_size=2, length=12)
    for start in (jax.tree.map(lambda x: x * jnp.nan, cache), cache):
        output = apply(variables, {"tokens": prompt}, start)
        np.testing.assert_allclose(output.hidden[0], expected[0, :5], atol=1e-5)
        np.testing.assert_allclose(output.hidden[1, :3], expected[1, :3], atol=1e-5)
    lengths = np.array([5, 3])
    for count in (1, 3):  # tokens at a time, from where each row stands
        positions = jnp.array(lengths)[:, None] + jnp.arange(count)
        new = jnp.take_along_axis(rows, positions, axis=1)
        output = apply(variables, {"tokens": new, "positions": positions}, output.cache)
        np.testing.assert_allclose(
            output.hidden, expected[np.arange(2)[:, None], positions], atol=1e-5
        )
        lengths += count


@pytest.mark.parametrize("wrong", [-1, -17, 16, 300])
def test_a_token_outside_the_vocabulary_has_no_other_ones_value(wrong):
    hidden = hidden_states(SMALL, init(), {"tokens": tokens().at[0, 4].set(wrong)})
    assert np.isnan(hidden[0, 4:]).all() and np.isfinite(hidden[1]).all()
    gradient = jax.vjp(
        lambda table: look_up("float32", table, jnp.array([[wrong, 3]])), jnp.ones((16, 2))
    )[1](jnp.ones((1, 2, 2)))[0]
    np.testing.assert_array_equal(gradient, np.eye(16)[3][:, None] * np.ones(2))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32", "int64"])
def test_ids_and_positions_may_have_any_integer_dtype(dtype):
    """A vocabulary of 256 and a cache of 300 slots are more than int8 and uint8 can count."""
    ids = np.array([[3, 127]], dtype)
    found = look_up("float32", jnp.arange(512.0).reshape(256, 2), ids)
    np.testing.assert_array_equal(found[..., 0], [[6, 254]])
    cache = init_cache(SMALL, layers=1, batch_size=1, length=300)
    assert np.all(fits_cache(cache, {"tokens": ids, "positions": ids}))
    keys = jnp.ones((1, 2, *cache.key_LBSKH.shape[3:]))
    written = update_cache(cache, 0, keys, keys, jnp.asarray(ids)).key_LBSKH
    np.testing.assert_array_equal(np.flatnonzero(written[0, 0, :, 0, 0]), [3, 127])


def test_a_vocabulary_over_devices_has_rows_for_its_own_tokens_alone():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    table, ids = jnp.arange(32.0).reshape(16, 2), jnp.array([[-1, 0, 3, 4], [15, 16, 17, -16]])
    with jax.set_mesh(mesh):
        value, pull_back = jax.vjp(jax.jit(lambda table: look_up("float32", table, ids)), table)
        gradient = pull_back(jnp.ones_like(value))[0]
    np.testing.assert_array_equal(value[..., 0], [[np.nan, 0, 6, 8], [30, np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(gradient[:, 0], np.isin(np.arange(16), [0, 3, 4, 15]))


def test_padding_may_hold_any_number():
    rows, segments = tokens(), jnp.array([[1] * 6 + [0] * 3] * 2)
    expected, got = (
        hidden_states(SMALL, init(), {"tokens": x, "segment_ids": segments})
        for x in (rows, rows.at[:, 6:].set(-100))
    )
    np.testing.assert_array_equal(got[:, :6], expected[:, :6])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_an_empty_batch_is_refused(shape):
    with pytest.raises(ValueError, match=r"tokens have shape .*: give at least one row"):
        Transformer(SMALL).apply(init(), {"tokens": jnp.zeros(shape, jnp.int32)})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"tokens": (2, 9)},
            "tokens have 9 positions and the cache has 8: make the cache with length=9 or more",
        ),
        ({"tokens": (2, 9), "positions": (2, 9)}, "tokens have 9 positions"),
        (
            {"tokens": (3, 1)},
            "tokens have 3 rows and the cache has 2: make the cache with batch_size=3",
        ),
        ({"tokens": (2, 1), "positions": (2, 1), "segment_ids": (2, 1)}, "leave segment_ids out"),
    ],
)
def test_what_a_cache_cannot_take_is_refused(batch, message):
    model = Transformer(SMALL)
    arrays = {name: jnp.ones(shape, jnp.int32) for name, shape in batch.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, init(), arrays, model.init_cache(batch_size=2, length=8))


def test_tokens_beyond_the_cache_are_nan_and_change_nothing():
    model, variables, rows = Transformer(SMALL), init(), tokens()
    apply = jax.jit(model.apply)
    prompt = apply(variables, {"tokens": rows[:, :6]}, model.init_cache(batch_size=2, length=8))
    # The first row has slots for two more tokens; the second one's stand before the first slot, in
    # turn where they should not, and in the last slot.
    positions = jnp.array([[6, 7, 8], [-1, 7, 7]])
    output = apply(variables, {"tokens": rows[:, 6:], "positions": positions}, prompt.cache)
    assert np.isnan(output.hidden[0, 2]).all() and np.isnan(output.hidden[1, [0, 2]]).all()
    expected = apply(variables, {"tokens": rows}).hidden
    np.testing.assert_allclose(output.hidden[0, :2], expected[0, 6:8], atol=1e-5)
    for before, after in zip(
        jax.tree.leaves(prompt.cache), jax.tree.leaves(output.cache), strict=True
    ):
        np.testing.assert_array_equal(before[:, :, :6], after[:, :, :6])
        assert np.isfinite(after[:, 0]).all()


@pytest.mark.parametrize(
    "segments",
    [[1, 1, 2, 2], [0, 0, 1, 1], [1, 0, 1, 0]],
    ids=["two documents", "padding first", "a gap"],
)
def test_a_prompt_that_is_not_one_document_from_its_start_is_nan(segments):
    model, rows = Transformer(SMALL), tokens(length=4)
    batch = {"tokens": rows, "segment_ids": jnp.array([[1, 1, 1, 0], segments])}
    hidden = jax.jit(model.apply)(init(), batch, model.init_cache(batch_size=2, length=8)).hidden
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).any()


def test_tied_embeddings_share_one_table():
    config = dataclasses.replace(SMALL, tied_embeddings=True)
    variables = init(config)
    assert "unembedding" not in variables["params"]
    hidden = jnp.eye(16)[None]
    got = Transformer(config).apply(variables, hidden, method="unembed")[0]
    np.testing.assert_allclose(got, variables["params"]["embedding"].T, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "platform", "dtype"), [("cpu", "cpu", "float32"), ("TPU v5p", "tpu", "bfloat16")]
)
def test_cache_suits_the_chip_of_the_mesh(kind, platform, dtype):
    """A program for a chip that is not here must not get the cache of the attached device."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    model = Transformer(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    with jax.sharding.use_abstract_mesh(mesh):
        cache = jax.eval_shape(lambda: model.init_cache(batch_size=1, length=4))
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {dtype}


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    variables = init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert hidden_states(config, variables, {"tokens": tokens()}).dtype == jnp.bfloat16
    got = logits(config, variables, {"tokens": tokens()})
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logits(SMALL, variables, {"tokens": tokens()}), atol=0.15)


def test_logits_are_not_rounded_to_the_compute_dtype():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    got = logits(config, init(config), {"tokens": tokens()})
    assert np.mean(got == got.astype(jnp.bfloat16)) < 0.1


def test_the_weight_gradient_is_summed_in_float32():
    x, w = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.grad(lambda w: jnp.sum(einsum("BTD,DF->BTF", x, w).astype(jnp.float32)))(w)
    assert gradient.dtype == jnp.float32 and gradient[0, 0] == 4096
    odd = jax.grad(lambda w: jnp.sum(einsum("BTD,DF->BTF", x[:, :4095], w).astype(jnp.float32)))(w)
    assert odd[0, 0] == 4095  # which bfloat16 cannot hold


def test_declarations_match_the_parameters():
    declared = declarations(Transformer(SMALL))
    params = init()["params"]
    for leaf, value in zip(
        jax.tree.leaves(declared, is_leaf=is_declared), jax.tree.leaves(params), strict=True
    ):
        assert (
            leaf.value.shape == value.shape
            and len(leaf.dims) == value.ndim
            and value.dtype == jnp.float32
        )
        if leaf.kind != "norm":
            scale = (
                (2 * SMALL.num_layers) ** -0.5
                if leaf.dims == "LNHD" or leaf.fan_in == SMALL.feed_forward_dim
                else 1.0
            )
            assert np.std(value) == pytest.approx(scale * leaf.fan_in**-0.5, rel=0.15)


def test_a_block_is_traced_once_for_all_layers_of_its_group(monkeypatch):
    variables, traced, name = init(), [], stack.name_layer_input
    monkeypatch.setattr(stack, "name_layer_input", lambda x: traced.append(x.shape) or name(x))
    jax.eval_shape(Transformer(SMALL).apply, variables, {"tokens": tokens()})
    assert traced == [(2, 9, 16)]


def test_apply_draws_the_parameters_that_init_draws():
    """Flax's other way to make variables, which has to trace what `init` traces."""
    model, batch, key = Transformer(SMALL), {"tokens": tokens()}, jax.random.key(0)
    draw = lambda key: model.apply({}, batch, rngs={"params": key}, mutable=["params"])[1]
    drawn, expected = (unbox(jax.jit(f)(key)) for f in (draw, lambda key: model.init(key, batch)))
    jax.tree.map(np.testing.assert_array_equal, drawn["params"], expected["params"])


def test_program_and_compile_size_do_not_grow_with_depth():
    def program_lines(num_layers):
        config = dataclasses.replace(SMALL, num_layers=num_layers)
        variables = jax.eval_shape(lambda: init(config))
        loss = lambda variables: jnp.sum(logits(config, variables, {"tokens": tokens()}))
        return len(jax.jit(jax.grad(loss)).lower(variables).compile().as_text().splitlines())

    assert program_lines(32) <= 1.1 * program_lines(4)


def test_swiglu_has_the_gradients_of_its_formula():
    gate, up, g = jax.random.normal(jax.random.key(0), (3, 4, 8))
    value, gradients = jax.vjp(swiglu, gate, up)
    expected, expected_gradients = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients(g), expected_gradients(g), rtol=1e-5, atol=1e-6)


SPARSE = dataclasses.replace(
    SMALL,
    num_layers=2,
    moe=MoEConfig(num_experts=4, expert_dim=8, num_shared_experts=1, first_dense_layers=1),
)


# tests/test_guests.py and tests/model/test_experts.py have plain ones.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [({"data": 4, "expert": 2}, 4), ({"fsdp": 8}, 1)],
)
def test_a_batch_too_small_for_the_mesh_is_copied(sizes, rows):
    """The batch gives up its axes, and no other dimension takes them: results are one device's."""
    model, batch = Transformer(SPARSE), {"tokens": tokens(batch=rows)}

    def loss(params):
        output = model.apply({"params": params}, batch)
        return jnp.mean(model.apply({"params": params}, output.hidden, method="unembed") ** 2)

    params = init(SPARSE)["params"]
    expected = jax.jit(jax.value_and_grad(loss))(params)
    with jax.set_mesh(
        jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    ):
        actual = jax.jit(jax.value_and_grad(loss))(params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max() + 1e-7),
        actual,
        expected,
    )


def test_jitter_is_neither_forgotten_in_training_nor_drawn_in_evaluation():
    noisy = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, jitter=0.1))
    variables, batch = init(SPARSE), {"tokens": tokens()}
    with pytest.raises(ValueError, match=r"^jitter=0.1 draws from keys that are not there"):
        jax.eval_shape(Transformer(noisy).apply, variables, batch)
    keys = jax.random.split(jax.random.key(0), 2)
    quiet, drawn, plain = (
        jax.jit(model.apply)(variables, batch).hidden
        for model, batch in (
            (Transformer(noisy).without_jitter(), batch),
            (Transformer(noisy), batch | {"row_keys": keys}),
            (Transformer(SPARSE), batch),
        )
    )
    np.testing.assert_array_equal(quiet, plain)
    assert np.abs(drawn - plain).max() > 1e-4


@pytest.mark.parametrize(
    ("dtype", "dims", "shape"),
    [
        ("float32", "BtD", (2, 5, 64)),
        ("bfloat16", "BtD", (2, 5, 64)),
        ("float32", "BTNH", (2, 5, 3, 64)),
    ],
)
def test_the_norm_and_its_gradients_are_those_of_its_formula(dtype, dims, shape):
    """It keeps its input and a number for each token, so no float32 array of activations."""
    x, grad = jax.random.normal(jax.random.key(0), (2, *shape)).astype(dtype)
    scale = jax.random.uniform(jax.random.key(1), (64,))

    def formula(x, scale):
        x = x.astype(jnp.float32)
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale

    expected, pull_back = jax.vjp(formula, x, scale)
    actual, own_pull_back = jax.vjp(functools.partial(rms_norm, 0.1, dims), x, scale)
    assert actual.dtype == x.dtype
    tolerance = (
        {"rtol": 2e-2, "atol": 1e-2} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    )
    for ours, plain_ in zip(
        (actual, *own_pull_back(grad)),
        (expected, *pull_back(grad.astype(jnp.float32))),
        strict=True,
    ):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(plain_, np.float32), **tolerance
        )
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,))
    rows = jax.P("data")
    sharded = jax.shard_map(
        jax.grad(lambda scale, x: rms_norm(0.1, dims, x, scale).sum().astype(jnp.float32)),
        mesh=mesh,
        in_specs=(jax.P(), rows),
        out_specs=jax.P(),
    )
    assert jax.eval_shape(sharded, scale, x).shape == scale.shape
    kept = [leaf for leaf in jax.tree.leaves(own_pull_back) if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in kept] == [x.dtype]
