"""Tests that weights are gathered, and gradients added up, in any number of turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.model.layers import einsum, look_up
from moe.parallel.collectives import weights
from moe.scaling.programs import read_collectives

MESHES = {"fsdp": {"fsdp": 8}, "fsdp, expert": {"fsdp": 2, "expert": 4}}


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


@pytest.fixture(params=["cpu", "TPU v5"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of the devices, as the collectives see it: TPUs take several steps and rounds."""
    monkeypatch.setattr(weights, "chip", lambda mesh: request.param)
    # So few devices would gather at once.
    rounds = weights._rounds
    monkeypatch.setattr(weights, "_rounds", lambda axes, smallest: rounds(axes, smallest=8))
    return request.param


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("shape", [(64, 3), (3, 64), (1, 64, 2), (2, 64, 2, 3)])
def test_a_scatter_adds_up_and_a_gather_joins(mesh, shape, kind) -> None:
    dim, axes = shape.index(64), tuple(mesh)
    parts = np.random.default_rng(0).integers(0, 9, (8, *shape)).astype(np.float32)
    split = P(*(axes if place == dim else None for place in range(len(shape))))
    on_mesh = functools.partial(jax.shard_map, mesh=make_mesh(**mesh), check_vma=False)
    scatter = on_mesh(lambda x: weights.scatter(x[0], axes, dim), in_specs=P(axes), out_specs=split)
    gather = on_mesh(lambda x: weights.gather(x, axes, dim), in_specs=split, out_specs=P())
    sums = jax.jit(scatter)(parts)
    np.testing.assert_array_equal(sums, parts.sum(axis=0))
    np.testing.assert_array_equal(jax.jit(gather)(sums), sums)


@pytest.mark.parametrize("batch", [8, 3], ids=["rows are split", "rows are copied"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_gradients_of_weights_are_the_same_in_turns(mesh, batch, kind) -> None:
    x_BTD, w_DF = jnp.ones((batch, 4, 16)).at[1].set(2.0), jnp.full((16, 6), 0.5)
    table_VD = jnp.arange(80.0).reshape(5, 16)
    ids_BT = jnp.arange(batch * 4).reshape(batch, 4) % 5

    def loss(w_DF: jax.Array, table_VD: jax.Array) -> jax.Array:
        rows_BTD = look_up("float32", table_VD, ids_BT)
        return jnp.sum(jnp.sin(einsum("BTD,DF->BTF", x_BTD + 0.01 * rows_BTD, w_DF)))

    expected = jax.grad(loss, (0, 1))(w_DF, table_VD)
    with jax.set_mesh(make_mesh(**mesh)):
        found = jax.jit(jax.grad(loss, (0, 1)))(w_DF, table_VD)
    for gradient, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((4096, 14_336), 0),
        ((14_336, 4096), 1),
        ((128_256, 2048), 1),
        ((1, 4096, 14_336), 1),
        ((8, 4096, 14_336), 1),
        ((8, 14_336, 4096), 2),
        ((4096, 32, 128), 0),
        ((8, 4096, 32, 128), 1),
        ((8, 32, 128, 4096), 3),
    ],
    ids=str,
)
def test_the_compiler_of_v5p_scatters_what_it_is_told_to(shape, dim, monkeypatch) -> None:
    """The gradients of one layer and of stacked layers, of attention, experts and vocabulary."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    mesh = Mesh(
        np.array(devices).reshape(8, 8), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2
    )

    def scatter(factors: jax.Array) -> jax.Array:
        gradient = jnp.broadcast_to(factors[0, 0], shape) * factors[0, 1]
        return weights.scatter(gradient, ("fsdp", "expert"), dim)

    rows = P(("fsdp", "expert"))
    split = P(*(("fsdp", "expert") if place == dim else None for place in range(len(shape))))
    mapped = jax.shard_map(scatter, mesh=mesh, in_specs=rows, out_specs=split, check_vma=False)
    with jax.set_mesh(mesh):
        sharded = jax.ShapeDtypeStruct((64, 2), jnp.float32, sharding=NamedSharding(mesh, rows))
        program = jax.jit(mapped).lower(sharded).compile().as_text() or ""
    kinds = {use.kind for use in read_collectives(program, mesh.shape) if use.bytes > 1e6}
    assert "reduce-scatter" in kinds and "all-reduce" not in kinds
