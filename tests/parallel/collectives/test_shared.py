"""Tests the gradient of a table that both ends of a model share, on 8 virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.cross_entropy import Unembedding, cross_entropy_sum
from moe.model.layers import look_up
from moe.parallel.collectives.shared import share
from tests.test_communication import make_mesh

V, D = 12, 16
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, expert, context": {"fsdp": 2, "expert": 2, "context": 2},
}


def loss(table_VD: jax.Array, ids_BT: jax.Array, companion_PVD: jax.Array | None) -> jax.Array:
    x_BTD = jnp.sin(look_up("float32", table_VD, ids_BT, companion_PVD))
    unembedding = Unembedding(table_VD, "VD", companion_PVD)
    return 0.5 * cross_entropy_sum(x_BTD, unembedding, (ids_BT + 1) % V, ids_BT != 3, chunk=2)


def shared_loss(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    return loss(table_VD, ids_BT, share(table_VD, "VD"))


@pytest.mark.parametrize("batch", [8, 3], ids=["rows are split", "rows are copied"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_shared_table_has_the_gradient_of_both_ends(mesh, batch) -> None:
    table_VD = jax.random.normal(jax.random.key(0), (V, D))
    ids_BT = jnp.arange(4 * batch).reshape(batch, 4) % V
    expected = jax.grad(loss)(table_VD, ids_BT, None)
    with jax.set_mesh(make_mesh(jax.devices(), **mesh)):
        found = jax.jit(jax.grad(shared_loss))(table_VD, ids_BT)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_companion_sums_in_float32_and_returns_the_tables_dtype() -> None:
    table_VD = jnp.ones((2, D), jnp.bfloat16)

    def total(table_VD: jax.Array) -> jax.Array:
        companion_PVD = share(table_VD, "VD")
        assert companion_PVD is not None and companion_PVD.dtype == jnp.float32
        return jnp.sum(look_up("bfloat16", table_VD, jnp.zeros((8, 512), int), companion_PVD))

    with jax.set_mesh(make_mesh(jax.devices(), fsdp=8)):
        gradient = jax.jit(jax.grad(total))(table_VD)
    assert gradient.dtype == jnp.bfloat16
    # In bfloat16, a sum of ones stays at 256.
    np.testing.assert_array_equal(gradient[0].astype(jnp.float32), 8 * 512)


def test_nothing_is_shared_where_no_axis_splits_tokens() -> None:
    table_VD = jnp.ones((V, D))
    assert share(table_VD, "VD") is None
    with jax.set_mesh(make_mesh(jax.devices(), tensor=4, pipeline=2)):
        assert share(table_VD, "VD") is None
