"""Tests that replicas which add up once in a step compute what one device computes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moe.config import MeshConfig, RunConfig
from moe.model.transformer import Transformer
from moe.parallel.collectives.replicas import on_replicas
from moe.parameters import Declared, unbox
from moe.scaling.communication import least_collectives
from moe.scaling.programs import read_collectives
from tests.parallel.test_remat import EXCHANGES, compile_step
from tests.test_invariance import differences, run_config, step, step_from

MESHES = {
    "data": {"data": 8},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data, expert": {"data": 2, "expert": 4},
    "data, context": {"data": 2, "context": 4},
}
# Meshes on which parameters are gathered once, and the dispatch of their experts.
GATHERED_ONCE = [
    ({"data": 2, "fsdp": 2, "expert": 2}, "capacity, all-to-all"),
    # These take longer. Of tensor, plain tests count what it sends.
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, "dropless", marks=pytest.mark.slow),
    pytest.param({"data": 1, "fsdp": 2, "expert": 4}, "dropless", marks=pytest.mark.slow),
    pytest.param({"data": 1, "expert": 4, "tensor": 2}, "capacity", marks=pytest.mark.slow),
    pytest.param({"data": 1, "expert": 4, "context": 2}, "dense", marks=pytest.mark.slow),
]


def sparse_config(scope: str, dispatch: str = "dropless") -> RunConfig:
    """Returns a run of 4 microbatches on one device, whose layers are all sparse."""
    layout = ("one device", "scanned", "full", "4", "a third", dispatch, scope)
    return run_config(layout, first_dense_layers=0)


def with_mesh(config: RunConfig, sizes: dict[str, int], *, gather_once: bool = False) -> RunConfig:
    train = dataclasses.replace(config.train, gather_once=gather_once)
    return dataclasses.replace(config, mesh=MeshConfig(**sizes), train=train)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, difference in differences(found, expected).items():
        assert difference < 2e-5, f"{name} differs by {difference:.1e}"


@functools.cache
def on_one_device(scope: str) -> dict[str, Any]:
    return step(sparse_config(scope))


@pytest.mark.parametrize("scope", [pytest.param("row", marks=pytest.mark.slow), "batch"])
@pytest.mark.parametrize(
    "mesh",
    [
        # They take up to a minute each. Plain tests gather parameters once on such a mesh.
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in MESHES.values()
    ],
    ids=MESHES,
)
def test_replicas_of_a_sparse_model_compute_what_one_device_does(mesh, scope) -> None:
    """With scope "batch", the balance loss is that of a microbatch on all replicas."""
    assert_same(step(with_mesh(sparse_config(scope), mesh)), on_one_device(scope))


@pytest.mark.parametrize(("mesh", "dispatch"), GATHERED_ONCE, ids=str)
def test_a_sparse_model_that_is_gathered_once_computes_the_same(mesh, dispatch) -> None:
    found = step(with_mesh(sparse_config("batch", dispatch), mesh, gather_once=True))
    assert_same(found, on_one_device("batch"))


def dense_config() -> RunConfig:
    config = sparse_config("row")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, moe=type(config.model.moe)()),
        data=dataclasses.replace(config.data, sequence_length=16),
    )


@functools.cache
def dense_variables() -> tuple[Any, Any]:
    """Returns the declarations and the values of a dense model's parameters."""
    model, batch = Transformer(dense_config().model), {"tokens": jnp.zeros((1, 1), jnp.int32)}
    declared = jax.eval_shape(model.init, jax.random.key(0), batch)
    drawn = jax.jit(lambda key: unbox(model.init(key, batch)))(jax.random.key(0))
    empty = {"router_state": {}}
    return dict(declared) | empty, jax.device_get(dict(drawn)) | empty


@functools.cache
def dense_on_one_device() -> dict[str, Any]:
    return step_from(dense_config(), *dense_variables())


@pytest.mark.parametrize(
    ("mesh", "gather_once", "way"),
    [
        pytest.param({"data": 2, "context": 2, "fsdp": 2}, False, "ring", marks=pytest.mark.slow),
        pytest.param(
            {"data": 2, "context": 2, "tensor": 2}, False, "ulysses", marks=pytest.mark.slow
        ),
        pytest.param({"data": 1, "context": 2, "fsdp": 4}, True, "ring", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parts_of_rows_are_replicas_of_a_dense_model(mesh, gather_once, way) -> None:
    config = with_mesh(dense_config(), mesh, gather_once=gather_once)
    attention = dataclasses.replace(config.model.attention, context_parallelism=way)
    model = dataclasses.replace(config.model, attention=attention)
    found = step_from(dataclasses.replace(config, model=model), *dense_variables())
    assert_same(found, dense_on_one_device())


@pytest.mark.parametrize(
    ("fields", "axis"),
    [
        (EXCHANGES["all_gather"] | {"mesh.data": 8}, "data"),
        pytest.param(
            {"model.moe.num_experts": 0, "mesh.fsdp": 4, "mesh.context": 2},
            "context",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["data", "context"],
)
def test_gradients_of_copies_are_sent_once_in_a_step(fields, axis) -> None:
    fields = fields | {"train.batch_size": 32, "train.accumulation": 4}
    config, program, compiled = compile_step(fields)
    is_sum = lambda use: (use.kind, use.axes) == ("all-reduce", (axis,))
    least, sent = (
        sum(use.bytes for use in collectives if is_sum(use))
        for collectives in (
            least_collectives(config, config.mesh),
            read_collectives(compiled.as_text(), program.mesh.shape),
        )
    )
    assert 0.99 * least <= sent <= 1.02 * least


def test_gradients_of_what_stages_copy_are_summed_over_replicas_and_then_over_stages() -> None:
    """The compiler of GPUs makes one sum of these two, which sends the least that is counted."""
    stages, replicas = 2, 4
    fields = {"model.moe.num_experts": 0, "mesh.pipeline": stages, "mesh.data": replicas}
    fields |= {"train.batch_size": 32, "train.accumulation": 4}
    config, program, compiled = compile_step(fields)
    sums = {}
    for use in least_collectives(config, config.mesh):
        sums[use.axes] = sums.get(use.axes, 0) + use.bytes * (use.kind == "all-reduce")
    whole = sums["data", "pipeline"] / (1 - 1 / (stages * replicas))
    expected = sums["data",] + whole * (1 - 1 / replicas) + whole * (1 - 1 / stages)
    sent = sum(
        use.bytes
        for use in read_collectives(compiled.as_text(), program.mesh.shape)
        if use.kind == "all-reduce" and {"data", "pipeline"} & set(use.axes)
    )
    assert 0.99 * expected <= sent <= 1.02 * expected


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh.fsdp": 8},
        {"mesh.fsdp": 2, "mesh.data": 2, "mesh.pipeline": 2},
        {"mesh.fsdp": 4, "mesh.tensor": 2},
        EXCHANGES["all_gather"] | {"mesh.fsdp": 2, "mesh.expert": 4},
    ],
    ids=str,
)
def test_parameters_gathered_once_are_sent_once_in_a_step(mesh) -> None:
    fields = {"model.moe.num_experts": 0} if "mesh.expert" not in mesh else {}
    fields |= mesh | {"train.batch_size": 32, "train.accumulation": 4, "train.gather_once": True}
    config, program, compiled = compile_step(fields)
    # CPUs add up the whole stream over the tensor axis, where other chips scatter it.
    is_sum = lambda use: use.kind != "all-gather" and "tensor" in use.axes
    least, sent = (
        sum(use.bytes for use in collectives if not is_sum(use))
        for collectives in (
            least_collectives(config, config.mesh),
            read_collectives(compiled.as_text(), program.mesh.shape),
        )
    )
    assert 0.99 * least <= sent <= 1.02 * least


def test_weights_gathered_once_are_rounded_before_and_norms_are_not() -> None:
    """Replicas get float32 arrays, and their gradients are summed in float32."""
    draw = functools.partial(jax.random.normal, dtype=jnp.float32)
    params = {"w": draw(jax.random.key(0), (16, 4)), "scale": draw(jax.random.key(1), (16,))}
    declared = {
        "w": Declared(params["w"], dims="DF", kind="linear", fan_in=16),
        "scale": Declared(params["scale"], dims="D", kind="norm", fan_in=1),
    }

    def average(variables: Any, batch: Any, counts: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x / 8, variables["params"]), counts

    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))):
        run = on_replicas(average, ("fsdp",), {}, declared, jnp.bfloat16)
        found, _ = jax.jit(run)({"params": params}, {}, {})
    rounded = params["w"].astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.any(rounded != params["w"])
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], rounded)
    np.testing.assert_allclose(found["scale"], params["scale"], rtol=1e-6)
