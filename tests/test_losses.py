"""Sums and counts of a batch, and the numbers that are reported of them, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe import losses
from moe.config import MoEConfig


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
