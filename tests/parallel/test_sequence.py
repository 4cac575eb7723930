"""Tests the residual stream whose tokens the tensor axis splits: values, memory and what is sent.

Other tests compare more layouts with a tensor axis: `tests/test_invariance.py` (fsdp, expert),
`test_pipeline.py`, and `tests/model/test_encoder.py` (encoders and cross-attention).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.compiled_step import abstract_batch, lower_step
from moe.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from moe.model.experts import MoE
from moe.parallel.mesh import make_mesh, spec
from moe.parallel.sequence import gather_time, join_time, scatter_time, splits_time
from moe.parameters import unbox
from moe.scaling.communication import least_collectives
from moe.scaling.programs import read_collectives
from moe.training.train_step import make_program
from tests.parallel.test_pipeline import DENSE, FLAT, drawn, plain_model, run_of, with_moe
from tests.test_invariance import differences, step_from

ROOT = Path(__file__).parents[2]
SHARED = with_moe(FLAT, dispatch="dropless")
CASES: dict[str, tuple[ModelConfig, dict[str, int], int, dict[str, Any]]] = {
    "dense, more devices than key/value heads": (
        DENSE,
        {"fsdp": 2, "tensor": 4},
        16,
        {"remat": "full"},
    ),
    "sparse, beside context": (
        SHARED,
        {"fsdp": 2, "context": 2, "tensor": 2},
        16,
        {"remat": "full", "scan_layers": False},
    ),
    "sparse, four parts of a row": (
        with_moe(FLAT, dispatch="capacity", exchange="all_to_all"),
        {"expert": 2, "tensor": 4},
        16,
        {},
    ),
    "a row that four devices cannot split": (SHARED, {"fsdp": 2, "tensor": 4}, 18, {}),
}


def run_with(model: ModelConfig, mesh: dict[str, int], length: int) -> RunConfig:
    config = run_of(model, mesh)
    return dataclasses.replace(config, data=DataConfig(sequence_length=length))


# Those that take a minute. Another sparse case is plain.
SLOW = {
    "sparse, beside context": pytest.mark.slow,
    "a row that four devices cannot split": pytest.mark.slow,
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW.get(case, ())) for case in CASES])
def test_a_split_stream_computes_what_one_device_does(case: str) -> None:
    """Compares the loss, every gradient, and the router's statistics."""
    model, mesh, length, fields = CASES[case]
    plain = plain_model(model)
    variables = drawn(plain)
    expected = step_from(run_with(plain, {}, length), *variables)
    actual = step_from(run_with(dataclasses.replace(model, **fields), mesh, length), *variables)
    for name, difference in differences(actual, expected).items():
        assert difference < 2e-5, f"{name} differs by {difference:.1e}"


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return make_mesh(run_of(dataclasses.replace(DENSE, num_heads=8, num_kv_heads=8), sizes))


def test_the_tensor_axis_splits_time_between_matmuls_alone() -> None:
    mesh = mesh_of(fsdp=2, context=2, tensor=2)
    batch, P = ("data", "fsdp", "expert"), jax.sharding.PartitionSpec
    assert spec("BtD", (16, 8, 64), mesh) == P(batch, ("context", "tensor"), ())
    assert spec("BTD", (16, 8, 64), mesh) == P(batch, "context", ())
    # Six tokens of a row make two parts, but not four. One token, as in decoding, stays whole.
    assert spec("BtD", (16, 6, 64), mesh) == P(batch, "context", ())
    assert spec("BtD", (16, 1, 64), mesh) == P(batch, (), ())


def test_gathers_and_scatters_change_no_value() -> None:
    """By hand: the gradient of a sum of products is the other factor, whatever is laid out how."""
    x = jax.random.normal(jax.random.key(0), (4, 8, 16))
    for function in (gather_time, scatter_time, join_time):
        loss = lambda x: jnp.sum(jnp.sin(function(x)))  # noqa: B023
        np.testing.assert_array_equal(function(x), x)
        np.testing.assert_array_equal(jax.grad(loss)(x), jnp.cos(x))
        with jax.set_mesh(mesh_of(fsdp=2, tensor=4)):
            np.testing.assert_array_equal(jax.jit(function)(x), x)
            np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), jnp.cos(x), rtol=1e-6)


def test_a_sparse_layer_leaves_rows_whole_that_context_cannot_split() -> None:
    """Of 6 tokens, tensor=2 could have halves. But 4 devices of context cannot split the row."""
    layer = MoE(MoEConfig(num_experts=4, expert_dim=8))
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    variables = unbox(jax.jit(layer.init)(jax.random.key(1), x))
    expected, _ = jax.jit(layer.apply)(variables, x)
    with jax.set_mesh(mesh_of(context=4, tensor=2)):
        assert not splits_time(6) and splits_time(8)
        actual, _ = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_sparse_layer_in_a_guests_shard_map_has_the_rows_it_was_given() -> None:
    """The guest's axis splits 12 tokens into 6, which the layer's own axes then split or not."""
    layer = MoE(MoEConfig(num_experts=4, expert_dim=8))
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    variables = unbox(jax.jit(layer.init)(jax.random.key(1), x))
    P = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        lambda variables, x: layer.apply(variables, x)[0],
        mesh=mesh_of(context=2, tensor=4).abstract_mesh,
        in_specs=(P(), P(None, "context")),
        out_specs=P(None, "context"),
        axis_names={"context"},
        check_vma=False,
    )
    expected, _ = jax.jit(layer.apply)(variables, x)
    with jax.set_mesh(mesh_of(context=2, tensor=4)):
        np.testing.assert_allclose(jax.jit(mapped)(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_no_row_of_a_sparse_layer_has_no_output() -> None:
    layer = MoE(MoEConfig(num_experts=4, expert_dim=8))
    variables = unbox(jax.jit(layer.init)(jax.random.key(1), jnp.zeros((2, 8, 16))))
    with jax.set_mesh(mesh_of(fsdp=2, tensor=4)):
        y, _ = jax.jit(layer.apply)(variables, jnp.zeros((0, 8, 16)))
    assert y.shape == (0, 8, 16)


def stored(config: RunConfig, layers: int, rows: int) -> set[int]:
    """Returns the tokens of a row in each array [layers, rows, tokens, D] of a step's program."""
    program = make_program(config)
    text = lower_step(program, abstract_batch(config, program), "cpu").compile().as_text()
    assert text is not None
    found = re.findall(rf"\[{layers},{rows},(\d+),{config.model.model_dim}\]", text)
    return set(map(int, found))


@pytest.mark.parametrize(
    ("length", "tokens"), [(64, 16), pytest.param(66, 66, marks=pytest.mark.slow)]
)
def test_full_remat_stores_a_device_s_own_tokens(length, tokens) -> None:
    """For all layers together, a row's 64 tokens are stored in 4 parts, or whole if 66 are."""
    model = ModelConfig(
        vocab_size=256, num_layers=5, model_dim=48, num_heads=4, num_kv_heads=4, head_dim=12
    )
    config = RunConfig(
        model=dataclasses.replace(model, feed_forward_dim=56, remat="full"),
        data=DataConfig(sequence_length=length),
        mesh=MeshConfig(data=1, fsdp=2, tensor=4),
        train=TrainConfig(batch_size=6),
    )
    assert stored(config, layers=5, rows=3) == {tokens}


def chips(platform: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns 8 chips that are not here."""
    from jax.experimental import topologies

    if platform == "tpu":
        pytest.importorskip("libtpu", reason="needs pip install -e '.[aot]'")
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    else:
        pytest.importorskip("jax_cuda13_plugin", reason="needs pip install -e '.[aot]'")
        target = (ROOT / "moe/scaling/programs/h200.textproto").read_text()
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology="1x1x8"
        )
    return list(found.devices)


REAL = ModelConfig(
    vocab_size=8192,
    num_layers=4,
    model_dim=1024,
    feed_forward_dim=2816,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    remat="full",
)
EXPERTS = MoEConfig(num_experts=8, experts_per_token=2, expert_dim=1024)
LAYERS = {"dense": REAL, "sparse": dataclasses.replace(REAL, moe=EXPERTS)}


@pytest.mark.aot
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_tensor_axis_of_8_chips_scatters_its_sums(
    platform: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer has 4 scatters and 6 gathers, and no sum of activations that all devices get."""
    config = RunConfig(
        model=LAYERS[layers],
        data=DataConfig(sequence_length=2048),
        mesh=MeshConfig(data=1, fsdp=2, tensor=4),
        train=TrainConfig(batch_size=8),
    )
    program = make_program(config, chips(platform, monkeypatch))
    compiled = lower_step(program, abstract_batch(config, program), platform).compile()
    sent: dict[str, float] = {}
    for use in read_collectives(compiled.as_text() or "", program.mesh.shape):
        if "tensor" in use.axes:
            sent[use.kind] = sent.get(use.kind, 0.0) + use.bytes
    least = {
        use.kind: use.bytes
        for use in least_collectives(config, config.mesh)
        if use.axes == ("tensor",)
    }
    for kind, size in least.items():
        assert sent.pop(kind) == pytest.approx(size, rel=0.03)
    assert sum(sent.values()) < 0.01 * sum(least.values())
