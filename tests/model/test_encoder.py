"""Encoders, alone and with a decoder: the plain formula, layouts, precision and caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe.config import ConfigError, ModelConfig, MoEConfig
from moe.model.transformer import Encoder, EncoderDecoder, Transformer
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
    qk_norm=True,
    compute_dtype="float32",
)
EXPERT_CHOICE = MoEConfig(
    num_experts=4, expert_dim=8, router="expert_choice", dispatch="capacity", first_dense_layers=1
)
LENGTH = 8
# Two documents and padding, and one document.
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]], np.int32)
DECODER_LENGTH = 4
DECODER_SEGMENT_IDS = np.array([[1, 2, 2, 0], [1] * 4], np.int32)
DECODER_POSITIONS = np.array([[0, 0, 1, 0], [0, 1, 2, 3]], np.int32)


def encoder_batch(rows=2):
    """Packed rows. Padding holds a number that is no token."""
    tokens = np.random.default_rng(0).integers(0, 16, (rows, LENGTH), np.int32)
    segment_ids = np.tile(SEGMENT_IDS, (rows // 2, 1))
    return {
        "tokens": np.where(segment_ids > 0, tokens, -100),
        "segment_ids": segment_ids,
        "positions": np.tile(POSITIONS, (rows // 2, 1)),
    }


def batch_of(model, rows=2):
    """A batch for a model. A decoder's rows are shorter, so that one end is told from another."""
    encoder = encoder_batch(rows)
    if isinstance(model, Encoder):
        return encoder
    tokens = np.random.default_rng(1).integers(0, 16, (rows, DECODER_LENGTH), np.int32)
    decoder = {
        "tokens": tokens,
        "segment_ids": np.tile(DECODER_SEGMENT_IDS, (rows // 2, 1)),
        "positions": np.tile(DECODER_POSITIONS, (rows // 2, 1)),
    }
    return decoder | {f"encoder_{name}": value for name, value in encoder.items()}


@functools.cache
def variables(model):
    example = jax.tree.map(lambda x: x[:1, :1], batch_of(model))
    drawn = jax.jit(lambda key: unbox(model.init(key, example)))(jax.random.key(0))
    return plain.draw_scales(drawn)


def loss(model, variables, batch):
    """A function of what the model computes of real tokens. No part of its gradient is small."""
    computed = model.apply(variables, batch).hidden
    if isinstance(model, EncoderDecoder):
        computed = model.apply(variables, computed, method="unembed")
    is_real_BT1 = batch["segment_ids"][..., None] > 0
    return jnp.sum(jnp.where(is_real_BT1, jnp.sin(3 * computed.astype(jnp.float32)), 0))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, variables, batch):
    return jax.value_and_grad(functools.partial(loss, model))(variables, batch)


def gradients(model, batch):
    return loss_and_gradients(model, variables(model), batch)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, variables, batch, cache=None, method=None):
    """Runs a model as one program, which tests with the same model and shapes share."""
    return model.apply(variables, batch, *([] if cache is None else [cache]), method=method)


def assert_same(actual, expected, tolerance=2e-5):
    """Compares each leaf within a tolerance of its largest number, which may not be 0."""

    def compare(path, a, b):
        largest = np.abs(b).max()
        assert np.isfinite(b).all() and largest > 0, path
        np.testing.assert_allclose(a, b, atol=tolerance * largest, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def test_an_encoder_equals_a_plain_one():
    model, batch = Encoder(SMALL), encoder_batch()
    hidden_BTD = apply(model, variables(model), batch).hidden
    params = plain.float64(variables(model)["params"])
    for row in range(2):
        ids, positions = batch["segment_ids"][row], batch["positions"][row]
        x = params["embedding"][np.where(ids > 0, batch["tokens"][row], 0)]
        sees = lambda t, s: ids[t] == ids[s]  # noqa: B023
        expected = plain.stack(SMALL, params, x, sees, positions)
        np.testing.assert_allclose(hidden_BTD[row], expected, atol=2e-5)


def test_a_later_token_changes_an_earlier_ones_hidden_state():
    model, batch = Encoder(SMALL), encoder_batch()
    before = apply(model, variables(model), batch).hidden
    tokens = batch["tokens"].copy()
    tokens[1, 7] = (tokens[1, 7] + 1) % 16
    after = apply(model, variables(model), batch | {"tokens": tokens}).hidden
    assert np.all(np.any(before[1] != after[1], axis=-1))
    np.testing.assert_array_equal(before[0], after[0])


def encoder_decoder(**options):
    """Dense layers, of which the encoder has fewer."""
    config = dataclasses.replace(SMALL, **options)
    return EncoderDecoder(config, dataclasses.replace(config, num_layers=1))


def sparse_encoder_decoder(**options):
    """A decoder whose tokens choose experts, and an encoder whose experts choose tokens."""
    config = dataclasses.replace(SMALL, **options)
    decoder = dataclasses.replace(config, moe=MoEConfig(num_experts=4, expert_dim=8))
    moe = dataclasses.replace(EXPERT_CHOICE, first_dense_layers=0)
    return EncoderDecoder(decoder, dataclasses.replace(config, num_layers=1, moe=moe))


MODELS = {
    "encoder": lambda **options: Encoder(dataclasses.replace(SMALL, **options)),
    "encoder of experts": lambda **options: Encoder(
        dataclasses.replace(SMALL, moe=EXPERT_CHOICE, **options)
    ),
    "encoder-decoder": encoder_decoder,
    "encoder-decoder of experts": sparse_encoder_decoder,
}


def test_an_encoder_decoder_equals_a_plain_one():
    model = encoder_decoder()
    batch, params = batch_of(model), plain.float64(variables(model)["params"])
    hidden_BTD = apply(model, variables(model), batch).hidden
    for row in range(2):
        ids, encoder_ids = batch["segment_ids"][row], batch["encoder_segment_ids"][row]
        embed = lambda tokens, ids: params["embedding"][np.where(ids > 0, tokens, 0)]
        memory = plain.stack(
            model.encoder_config,
            params["encoder"],
            embed(batch["encoder_tokens"][row], encoder_ids),
            lambda t, s: encoder_ids[t] == encoder_ids[s],  # noqa: B023
            batch["encoder_positions"][row],
        )
        expected = plain.stack(
            model.config,
            params["decoder"],
            embed(batch["tokens"][row], ids),
            lambda t, s: s <= t and ids[t] == ids[s],  # noqa: B023
            batch["positions"][row],
            memory,
            lambda t, s: ids[t] == encoder_ids[s],  # noqa: B023
        )
        np.testing.assert_allclose(hidden_BTD[row], expected, atol=2e-5)
        one_row = hidden_BTD[row : row + 1]
        logits = apply(model, variables(model), one_row, method="unembed")[0]
        np.testing.assert_allclose(logits, expected @ params["unembedding"], atol=1e-4)


def slow(cases):
    """Marks cases that plain tests need not run, since others have the same choices in pairs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


# The loop is the decoder's, which tests/test_invariance.py unrolls as well.
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("change", [{"remat": "full"}, {"scan_layers": False}], ids=str)
def test_a_loop_and_recomputation_change_nothing(model, change):
    plainest, changed = MODELS[model](), MODELS[model](**change)
    expected = gradients(plainest, batch_of(plainest, rows=4))
    assert_same(gradients(changed, batch_of(changed, rows=4)), expected)


MESHES = [
    ("ring", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("ring", {"expert": 2, "context": 2, "tensor": 2}),
    ("ring", {"tensor": 4, "context": 2}),  # more devices than key/value heads
    ("ulysses", {"fsdp": 2, "expert": 2, "context": 2}),
]


# Two parts and experts compile for longest, and have nothing that the two have not. A third mesh
# with a ring would be one too many.
LAYOUTS = [(*MESHES[0], "encoder"), (*MESHES[1], "encoder of experts")]
OTHER_LAYOUTS = [
    (*mesh, model) for mesh in MESHES for model in MODELS if (*mesh, model) not in LAYOUTS
]


@pytest.mark.parametrize(
    ("parallelism", "sizes", "model"), [*LAYOUTS, *slow(OTHER_LAYOUTS)], ids=str
)
def test_eight_devices_are_one(model, parallelism, sizes):
    attention = dataclasses.replace(SMALL.attention, context_parallelism=parallelism)
    reference, model = MODELS[model](), MODELS[model](attention=attention)
    batch = batch_of(model, rows=4)
    expected = gradients(reference, batch)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    example = jax.tree.map(lambda x: x[:1, :1], batch)
    layout = shardings({"params": declarations(model, example)}, mesh)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec("BT", x.shape, mesh)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables(model), layout), jax.tree.map(place, batch)
        actual = loss_and_gradients(model, *placed)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "model",
    [
        "encoder",
        *slow([["encoder of experts"], ["encoder-decoder"], ["encoder-decoder of experts"]]),
    ],
)
def test_bfloat16_is_close_to_float32(model):
    wide, narrow = MODELS[model](), MODELS[model](compute_dtype="bfloat16")
    batch = batch_of(wide, rows=4)
    expected = gradients(wide, batch)
    hidden = jax.eval_shape(narrow.apply, variables(narrow), batch).hidden
    assert hidden.dtype == jnp.bfloat16
    value, gradient = gradients(narrow, batch)
    np.testing.assert_allclose(value, expected[0], atol=1.0)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_experts_choose_tokens_in_an_encoder_alone():
    config = dataclasses.replace(SMALL, moe=EXPERT_CHOICE)
    stats = apply(Encoder(config), variables(Encoder(config)), encoder_batch()).stats
    assert float(stats[1][0].load.sum()) > 0
    with pytest.raises(ConfigError, match=r"^moe.router='expert_choice' looks at later tokens"):
        jax.eval_shape(Transformer(config).init, jax.random.key(0), encoder_batch())


def test_an_encoder_without_logits_says_how_to_make_them():
    unembed = functools.partial(Encoder(SMALL).init, method="unembed")
    with pytest.raises(ValueError, match="has no unembedding: make it with makes_logits=True"):
        jax.eval_shape(unembed, jax.random.key(0), jnp.zeros((1, 1, SMALL.model_dim)))


def test_an_encoder_of_one_segment_needs_tokens_alone():
    model, tokens = Encoder(SMALL), encoder_batch()["tokens"][1:]
    got = apply(model, variables(model), {"tokens": tokens}).hidden
    expected = apply(model, variables(model), encoder_batch()).hidden[1:]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("model", ["encoder", "encoder-decoder"])
def test_rows_lie_as_their_batch_on_explicit_axes(model):
    model, mesh = MODELS[model](), jax.make_mesh((4, 2), ("data", "x"))
    batch = batch_of(model, rows=8)
    expected = apply(model, variables(model), batch).hidden
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        hidden = apply(model, variables(model), placed).hidden
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    assert hidden.sharding.spec[0] == "data"


def one_document():
    """Rows of one document each, with padding on the right, and a memory likewise."""
    rng = np.random.default_rng(2)
    encoder_ids = np.array([[1] * 8, [1] * 5 + [0] * 3], np.int32)
    return {
        "tokens": rng.integers(0, 16, (2, 9), np.int32),
        "encoder_tokens": rng.integers(0, 16, (2, LENGTH), np.int32),
        "encoder_segment_ids": encoder_ids,
    }


@pytest.mark.parametrize(
    "model",
    # A cache holds keys and values, whatever the layers have beside attention.
    ["encoder-decoder", pytest.param("encoder-decoder of experts", marks=pytest.mark.slow)],
)
def test_a_cache_changes_nothing(model):
    model, batch = MODELS[model](), one_document()
    rows = np.arange(2)[:, None]
    expected = apply(model, variables(model), batch).hidden
    # The second row's prompt is 3 tokens and 2 of padding. The cache has more slots than needed.
    segment_ids = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    prompt = batch | {"tokens": batch["tokens"][:, :5], "segment_ids": segment_ids}
    cache = model.init_cache(batch_size=2, length=12, encoder_length=10)
    output = apply(model, variables(model), prompt, cache)
    np.testing.assert_allclose(output.hidden[0], expected[0, :5], atol=1e-5)
    np.testing.assert_allclose(output.hidden[1, :3], expected[1, :3], atol=1e-5)
    lengths = np.array([5, 3])
    for count in (1, 3):  # tokens at a time
        positions = lengths[:, None] + np.arange(count, dtype=np.int32)
        later = {"tokens": batch["tokens"][rows, positions], "positions": positions}
        output = apply(model, variables(model), later, output.cache)
        np.testing.assert_allclose(output.hidden, expected[rows, positions], atol=1e-5)
        lengths += count


def test_a_memory_may_be_shorter_than_what_is_decoded():
    model = encoder_decoder()
    batch = {"tokens": one_document()["tokens"], "encoder_tokens": np.ones((2, 1), np.int32)}
    expected = apply(model, variables(model), batch).hidden
    cache = model.init_cache(batch_size=2, length=9, encoder_length=1)
    prompt = batch | {"tokens": batch["tokens"][:, :2]}
    cache = apply(model, variables(model), prompt, cache).cache
    positions = np.broadcast_to(np.arange(2, 9, dtype=np.int32), (2, 7))
    later = {"tokens": batch["tokens"][:, 2:], "positions": positions}
    got = apply(model, variables(model), later, cache).hidden
    np.testing.assert_allclose(got, expected[:, 2:], atol=1e-5)


@pytest.mark.parametrize(
    "ids", [[1, 1, 2, 2, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [2] * 8], ids=str
)
def test_a_memory_that_is_not_the_prompts_document_from_its_start_is_nan(ids):
    model, batch = encoder_decoder(), one_document()
    batch["encoder_segment_ids"][1] = ids
    cache = model.init_cache(batch_size=2, length=9, encoder_length=8)
    hidden = apply(model, variables(model), batch, cache).hidden
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()


@pytest.mark.parametrize(
    ("names", "with_cache", "message"),
    [
        (["tokens"], False, "the batch has no encoder_tokens"),
        (["tokens"], True, "the batch has neither positions nor encoder_tokens"),
        (["tokens", "positions", "encoder_tokens"], True, "leave encoder_tokens out"),
        (["tokens", "encoder_tokens"], True, "make the cache with encoder_length=8 or more"),
    ],
)
def test_what_an_encoder_decoder_cannot_take_is_refused(names, with_cache, message):
    model = encoder_decoder()
    batch = one_document() | {"positions": np.zeros((2, 9), np.int32)}
    cache = model.init_cache(batch_size=2, length=9, encoder_length=7) if with_cache else None
    fields = {name: batch[name] for name in names}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, variables(model), fields, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 32}, r"^model_dim=16 of the decoder differs from the encoder's 32"),
        ({"moe": MoEConfig(num_experts=2)}, r"^moe.num_experts=4 of the decoder differs"),
    ],
)
def test_parts_that_share_no_table_are_refused(change, message):
    config = dataclasses.replace(SMALL, moe=MoEConfig(num_experts=4, expert_dim=8))
    model = EncoderDecoder(config, dataclasses.replace(SMALL, **change))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), batch_of(model))


@pytest.mark.slow
def test_layers_of_both_parts_draw_independently():
    """Jitter folds the number of a layer, counted through both parts, into the keys of the rows."""
    numbers = [
        stack.first_layer
        for stack in (
            encoder_decoder().bind(variables(encoder_decoder())).encoder,
            encoder_decoder().bind(variables(encoder_decoder())).decoder,
        )
    ]
    assert numbers == [0, 1]
    model = sparse_encoder_decoder()
    jittered = dataclasses.replace(model.config.moe, jitter=0.1)
    noisy = model.clone(config=dataclasses.replace(model.config, moe=jittered))
    batch = batch_of(model) | {"row_keys": jax.random.split(jax.random.key(0), 2)}
    models = (noisy, model, noisy.without_jitter())
    hidden = [apply(m, variables(model), batch).hidden for m in models]
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-4
    np.testing.assert_array_equal(hidden[2], hidden[1])
