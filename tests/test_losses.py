"""Cross-entropy in chunks against the plain formula, and the memory that it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import losses
from moe.config import MoEConfig


@jax.jit
def plain_cross_entropy(hidden, weight_DV, targets, mask):
    log_probs = jax.nn.log_softmax((hidden @ weight_DV).astype(jnp.float64), axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, picked, 0.0))


def inputs(batch=3, length=13, width=8, vocab=11, dtype=np.float64):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(batch, length, width)).astype(dtype)
    weight = rng.normal(size=(width, vocab)).astype(dtype)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    return hidden, weight, targets, rng.random((batch, length)) > 0.3


@functools.cache
def expected_loss_and_gradients():
    with jax.enable_x64(True):
        return jax.jit(jax.value_and_grad(plain_cross_entropy, argnums=(0, 1)))(*inputs())


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_chunks_equal_the_plain_formula(chunk):
    hidden, weight, targets, mask = inputs()

    def chunked(hidden, weight):
        return losses.cross_entropy_sum(hidden, lambda h: h @ weight, targets, mask, chunk)

    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, weight)
    expected, expected_gradients = expected_loss_and_gradients()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(
            gradient, wanted, rtol=1e-5, atol=1e-5
        )  # sums of up to 39 terms of size 1


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=(1, 2))
def loss_and_gradients(chunk, hidden, weight, targets, mask):
    return losses.cross_entropy_sum(hidden, lambda h: h @ weight, targets, mask, chunk)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("wrong", [-100, -1, 11, 300])
def test_a_target_outside_the_vocabulary_is_nan_unless_it_is_masked(wrong, chunk):
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    targets[1, 2], mask[1, 2] = wrong, True
    for leaf in jax.tree.leaves(loss_and_gradients(chunk, hidden, weight, targets, mask)):
        assert np.isnan(leaf).any()
    mask[1, 2] = False
    value, gradients = loss_and_gradients(chunk, hidden, weight, targets, mask)
    with jax.enable_x64(True):
        expected = plain_cross_entropy(hidden, weight, np.clip(targets, 0, 10), mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients) and not np.any(
        gradients[0][1, 2]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [4, 100])
def test_what_a_masked_position_holds_changes_nothing(chunk, value):
    hidden, weight, targets, mask = inputs(dtype=np.float32)
    spoilt = np.where(mask[..., None], hidden, value).astype(np.float32)
    expected = loss_and_gradients(chunk, hidden, weight, targets, mask)
    actual = loss_and_gradients(chunk, spoilt, weight, targets, mask)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_no_position_has_no_loss(shape):
    hidden, weight = jnp.ones((*shape, 8)), jnp.ones((8, 11))
    targets, mask = jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
    total = lambda weight: losses.cross_entropy_sum(hidden, lambda h: h @ weight, targets, mask, 4)
    value, gradient = jax.value_and_grad(total)(weight)
    assert value == 0 and not gradient.any()


def test_chunks_are_as_equal_as_can_be():
    seen = []

    def unembed(hidden):
        seen.append(hidden.shape[1])
        return hidden @ weight

    hidden, weight, targets, mask = inputs(length=513, dtype=np.float32)
    losses.cross_entropy_sum(hidden, unembed, targets, mask, chunk=512)
    assert set(seen) == {257}


def test_a_batch_without_targets_has_loss_zero():
    sums = {
        "loss": jnp.zeros(()),
        "targets": jnp.zeros(()),
        "tokens": jnp.zeros(()),
        "router": {},
    }
    assert losses.metrics(sums)["loss"] == 0
    assert losses.objective(sums, sums, MoEConfig()) == 0


def router_stats(*repeats):
    """Returns the statistics of a kind of layer: 4 tokens each, and loads of its own."""
    load = jnp.float32(repeats)
    zeros = {name: jnp.zeros(len(load)) for name in losses.RouterStats._fields}
    return losses.RouterStats(**zeros | {"tokens": jnp.full(len(load), 4.0), "load": load})


def test_statistics_of_sparse_layers_come_in_the_order_of_the_layers():
    """Layers: dense, sparse, dense, sparse; then two kinds of sparse layers, twice."""
    first = (None, router_stats([1, 7], [2, 6]))
    second = (router_stats([3, 5], [5, 3]), router_stats([4, 4], [6, 2]))
    sums = losses.in_layer_order((first, second))
    np.testing.assert_array_equal(sums.load[:, 0], [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(sums.tokens, [4] * 6)
    assert losses.in_layer_order(((None,), (None, None))) is None


def test_router_metrics_by_hand():
    stats = router_stats([6, 2], [8, 0])._replace(
        dropped=jnp.array([2.0, 0.0]), z_loss=jnp.array([4.0, 8.0])
    )
    metrics = jax.jit(losses.router_metrics)(stats)
    np.testing.assert_allclose(metrics["load"], [[3 / 4, 1 / 4], [1, 0]])
    np.testing.assert_allclose(metrics["max_vio"], [1 / 2, 1])
    np.testing.assert_allclose(metrics["load_variation"], [1 / 2, 1])
    entropy = -(3 / 4 * np.log2(3 / 4) + 1 / 4 * np.log2(1 / 4))
    np.testing.assert_allclose(metrics["load_entropy"], [entropy, 0], rtol=1e-6)
    np.testing.assert_array_equal(metrics["dead_experts"], [0, 1])
    np.testing.assert_array_equal(metrics["dropped_fraction"], [1 / 4, 0])
    np.testing.assert_array_equal(metrics["z_loss"], [1, 2])


def test_memory_stays_under_a_quarter_of_the_logits():
    vocab, length, width = 128 * 1024, 4096, 512
    weight = jax.ShapeDtypeStruct((width, vocab), jnp.float32)
    hidden = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)

    def loss(hidden, weight, targets, mask):
        return losses.cross_entropy_sum(hidden, lambda h: h @ weight, targets, mask, chunk=256)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(hidden, weight, targets, mask).compile()
    logits = 4 * vocab * length
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4
