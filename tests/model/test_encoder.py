"""Encoders, alone and with a decoder: the plain formula, layouts, precision and caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.model.transformer import Encoder, Transformer
from moe.parallel.mesh import shardings, spec
from moe.parameters import declarations, unbox
from tests.model import plain

SMALL = ModelConfig(
    vocab_size=16,
    num_layers=2,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    compute_dtype="float32",
)
EXPERT_CHOICE = MoEConfig(
    num_experts=4, expert_dim=8, router="expert_choice", dispatch="capacity", first_dense_layers=1
)
LENGTH = 8
# Two documents and padding, and one document.
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]], np.int32)


def encoder_batch(rows=2):
    """Packed rows. Padding holds a number that is no token."""
    tokens = np.random.default_rng(0).integers(0, 16, (rows, LENGTH), np.int32)
    segment_ids = np.tile(SEGMENT_IDS, (rows // 2, 1))
    return {
        "tokens": np.where(segment_ids > 0, tokens, -100),
        "segment_ids": segment_ids,
        "positions": np.tile(POSITIONS, (rows // 2, 1)),
    }


@functools.cache
def variables(model):
    example = jax.tree.map(lambda x: x[:1, :1], encoder_batch())
    return jax.jit(lambda key: unbox(model.init(key, example)))(jax.random.key(0))


def loss(model, variables, batch):
    """A function of all hidden states but those of padding, whose gradient has no small part."""
    hidden_BTD = model.apply(variables, batch).hidden.astype(jnp.float32)
    return jnp.sum(jnp.where(batch["segment_ids"][..., None] > 0, jnp.sin(3 * hidden_BTD), 0))


def gradients(model, batch):
    function = jax.value_and_grad(functools.partial(loss, model), allow_int=True)
    return jax.jit(function)(variables(model), batch)


def assert_same(actual, expected, tolerance=2e-5):
    """Compares each leaf within a tolerance of its largest number, which may not be 0."""

    def compare(path, a, b):
        largest = np.abs(b).max()
        assert np.isfinite(b).all() and largest > 0, path
        np.testing.assert_allclose(a, b, atol=tolerance * largest, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def test_an_encoder_equals_a_plain_one():
    model, batch = Encoder(SMALL), encoder_batch()
    hidden_BTD = model.apply(variables(model), batch).hidden
    params = plain.float64(variables(model)["params"])
    for row in range(2):
        ids, positions = batch["segment_ids"][row], batch["positions"][row]
        x = params["embedding"][np.where(ids > 0, batch["tokens"][row], 0)]
        sees = lambda t, s: ids[t] == ids[s]  # noqa: B023
        expected = plain.stack(SMALL, params, x, sees, positions)
        np.testing.assert_allclose(hidden_BTD[row], expected, atol=2e-5)


def test_a_later_token_changes_an_earlier_ones_hidden_state():
    model, batch = Encoder(SMALL), encoder_batch()
    apply = jax.jit(model.apply)
    before = apply(variables(model), batch).hidden
    tokens = batch["tokens"].copy()
    tokens[1, 7] = (tokens[1, 7] + 1) % 16
    after = apply(variables(model), batch | {"tokens": tokens}).hidden
    assert np.all(np.any(before[1] != after[1], axis=-1))
    np.testing.assert_array_equal(before[0], after[0])


MODELS = {
    "encoder": lambda **options: Encoder(dataclasses.replace(SMALL, **options)),
    "encoder of experts": lambda **options: Encoder(
        dataclasses.replace(SMALL, moe=EXPERT_CHOICE, **options)
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "change", [{"remat": "full"}, {"scan_layers": False}, {"remat": "full", "scan_layers": False}]
)
def test_a_loop_and_recomputation_change_nothing(model, change):
    expected = gradients(MODELS[model](), encoder_batch())
    assert_same(gradients(MODELS[model](**change), encoder_batch()), expected)


MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"expert": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "context": 2},
    {"tensor": 4, "context": 2},  # more devices than key/value heads
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("parallelism", ["ring", "ulysses"])
def test_eight_devices_are_one(model, sizes, parallelism):
    if parallelism == "ulysses" and "context" not in sizes:
        pytest.skip("nothing splits the sequence")
    if parallelism == "ulysses" and sizes.get("tensor") == 4:
        pytest.skip("Ulysses needs a head for each device of both axes")
    attention = dataclasses.replace(SMALL.attention, context_parallelism=parallelism)
    model, batch = MODELS[model](attention=attention), encoder_batch(rows=4)
    expected = gradients(model, batch)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    example = jax.tree.map(lambda x: x[:1, :1], batch)
    layout = shardings({"params": declarations(model, example)}, mesh)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec("BT", x.shape, mesh)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables(model), layout), jax.tree.map(place, batch)
        actual = jax.jit(jax.value_and_grad(functools.partial(loss, model)))(*placed)
    assert_same(actual, expected)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_close_to_float32(model):
    expected = gradients(MODELS[model](), encoder_batch())
    narrow = MODELS[model](compute_dtype="bfloat16")
    assert narrow.apply(variables(narrow), encoder_batch()).hidden.dtype == jnp.bfloat16
    value, gradient = gradients(narrow, encoder_batch())
    np.testing.assert_allclose(value, expected[0], atol=1.0)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_experts_choose_tokens_in_an_encoder_alone():
    config = dataclasses.replace(SMALL, moe=EXPERT_CHOICE)
    stats = Encoder(config).apply(variables(Encoder(config)), encoder_batch()).stats
    assert float(stats[1][0]["load"].sum()) > 0
    with pytest.raises(ConfigError, match=r"^moe.router='expert_choice' looks at later tokens"):
        jax.eval_shape(Transformer(config).init, jax.random.key(0), encoder_batch())


def test_an_encoder_of_one_segment_needs_tokens_alone():
    model, tokens = Encoder(SMALL), encoder_batch()["tokens"][1:]
    got = model.apply(variables(model), {"tokens": tokens}).hidden
    expected = model.apply(variables(model), encoder_batch()).hidden[1:]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rows_lie_as_their_batch_on_explicit_axes():
    model, batch, mesh = Encoder(SMALL), encoder_batch(rows=8), jax.make_mesh((4, 2), ("data", "x"))
    expected = model.apply(variables(model), batch).hidden
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        hidden = jax.jit(model.apply)(variables(model), placed).hidden
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    assert hidden.sharding.spec[0] == "data"
