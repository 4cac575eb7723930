"""What sparse layers send, read off compiled programs: on 8 virtual devices, and ahead of time for
8 H200 or TPUs (marker aot).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from ml_collections import ConfigDict

from configs import dense_7b
from launch.compiled_step import abstract_batch, lower_step
from moe.config import MoEConfig, RunConfig
from moe.model.experts import MoE
from moe.parallel.mesh import AXES, shardings, spec
from moe.parameters import unbox
from moe.scaling.communication import least_collectives
from moe.scaling.programs import read_collectives
from moe.training.train_step import make_program

ROOT = Path(__file__).parents[1]
ROWS, LENGTH, D = 16, 64, 32
MOE = MoEConfig(
    num_experts=16,
    experts_per_token=2,
    expert_dim=48,
    dispatch="capacity",
    exchange="all_to_all",
    capacity_factor=1.25,
)


def compile_forward(config: MoEConfig, mesh: jax.sharding.Mesh, platform: str = "cpu"):
    """One layer's forward pass in float32, on `mesh`."""
    layer = MoE(config)
    x = jax.ShapeDtypeStruct(
        (ROWS, LENGTH, D),
        jnp.float32,
        sharding=NamedSharding(mesh, spec("BTD", (ROWS, LENGTH, D), mesh)),
    )
    declared = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        unbox(declared),
        shardings(declared, mesh),
    )
    forward = jax.jit(lambda variables, x: layer.apply(variables, x)[0], out_shardings=x.sharding)
    with (
        jax.set_mesh(mesh)
        if platform == "cpu"
        else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    ):
        return forward.trace(variables, x).lower(lowering_platforms=(platform,)).compile()


def make_mesh(devices: list, **sizes: int) -> jax.sharding.Mesh:
    shape = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(
        np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def sent(program: Any, mesh: jax.sharding.Mesh) -> Counter[str]:
    """Returns the bytes that a device sends, by the kind of collective and by its kind and axes."""
    found: Counter[str] = Counter()
    for use in read_collectives(program.as_text(), mesh.shape):
        found[use.kind] += round(use.bytes)
        found[f"{use.kind} {'*'.join(use.axes)}"] += round(use.bytes)
    return found


def rows_sent(experts: int) -> float:
    """Returns the bytes of rows that leave a device under an even load, there and back."""
    tokens = ROWS * LENGTH / 8
    return 2 * tokens * MOE.experts_per_token * D * 4 * (experts - 1) / experts


def check_all_to_all(found: Counter[str], experts: int) -> None:
    """At most 1.3 times the rows that travel under an even load, there and back; no weight is
    gathered.
    """
    assert 0.9 * rows_sent(experts) < found["all-to-all"] <= 1.3 * rows_sent(experts)
    # The router's weight is gathered: no expert's, and no activations.
    assert found["all-gather"] <= D * MOE.num_experts * 4
    assert not found["reduce-scatter"] and not found["collective-permute"]


def test_all_to_all_sends_the_rows_and_no_weights() -> None:
    mesh = make_mesh(jax.devices(), expert=8)
    check_all_to_all(sent(compile_forward(MOE, mesh), mesh), 8)


def test_fsdp_gathers_each_weight_once() -> None:
    """Three weights of a device's 4 experts, whole along D; and the router's small one, over expert
    and then over fsdp.
    """
    mesh = make_mesh(jax.devices(), fsdp=2, expert=4)
    found = sent(compile_forward(MOE, mesh), mesh)
    weights = 3 * MOE.num_experts // 4 * D * MOE.expert_dim * 4 / 2  # a device sends its half
    assert weights <= found["all-gather fsdp"] <= weights + D * MOE.num_experts * 4
    assert found["all-gather"] <= weights + 2 * D * MOE.num_experts * 4
    assert found["all-to-all expert"] == found["all-to-all"] <= 1.3 * rows_sent(4)


DENSE_STEP = {
    "model.num_layers": 4,
    "model.model_dim": 64,
    "model.feed_forward_dim": 128,
    "model.compute_dtype": "float32",  # a CPU's collectives have no bfloat16
    "data.sequence_length": 32,
    "train.batch_size": 16,
    "train.accumulation": 2,
    "train.loss_chunk": 8,
}


def compile_step(
    values: ConfigDict, fields: dict[str, Any], devices: list, platform: str
) -> tuple[RunConfig, Any, jax.sharding.Mesh]:
    """Returns a config with changed fields, its compiled train step, and its mesh."""
    values.update_from_flattened_dict(fields)
    config = RunConfig.from_config_dict(values)
    program = make_program(config, devices)
    lowered = lower_step(program, abstract_batch(config, program), platform)
    return config, lowered.compile(), program.mesh


@pytest.mark.parametrize(
    ("remat", "scanned"),
    [
        ("none", True),
        ("full", False),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_a_step_gathers_weights_and_scatters_gradients_as_often_as_it_must(remat, scanned) -> None:
    """The recomputed forward pass gathers for the gradients too, and the loss gathers once."""
    fields = {"model.remat": remat, "model.scan_layers": scanned, "mesh.fsdp": 8, "mesh.data": 1}
    config, compiled, mesh = compile_step(
        RunConfig.config_dict(), DENSE_STEP | fields, jax.devices(), "cpu"
    )
    found = sent(compiled, mesh)
    least: Counter[str] = Counter()
    for collective in least_collectives(config, config.mesh):
        least[collective.kind] += round(collective.bytes)
    assert found["all-gather"] <= 1.01 * least["all-gather"]
    # XLA's CPU compiler adds a gradient up and then cuts it, where others scatter the sum.
    sums = found["reduce-scatter"] + found["all-reduce"] / 2
    assert sums <= 1.02 * least["reduce-scatter"]
    # No gathered weight waits for the backward pass: there are no whole weights of all layers.
    assert "f32[4,64,128]" not in compiled.as_text()


def test_stages_exchange_no_rows_of_other_devices() -> None:
    """A stage reads ids, segments and positions of all microbatches, each device of its own rows.

    The partitioner would gather the rows of all devices, and the angles of their positions.
    """
    layout = {"mesh.pipeline": 2, "mesh.fsdp": 4, "mesh.data": 1}
    _, compiled, mesh = compile_step(
        RunConfig.config_dict(), DENSE_STEP | layout, jax.devices(), "cpu"
    )
    gathers = [
        use
        for use in read_collectives(compiled.as_text(), mesh.shape)
        if use.kind == "all-gather" and use.what.endswith("stack._run_stages")
    ]
    assert gathers and all(use.axes == ("pipeline",) for use in gathers)
    # At most 16 bytes of ids, positions, segments and masks for each of a device's 2 x 32 tokens,
    # and two angles for each pair of a head's numbers.
    head_dim = RunConfig.config_dict().model.head_dim
    assert sum(use.bytes for use in gathers) <= 2 * 32 * (16 + 4 * head_dim)


TIED_LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"mesh.fsdp": 8},
    "fsdp, microbatches": {"mesh.fsdp": 8, "train.accumulation": 2},
    "data, fsdp": {"mesh.data": 2, "mesh.fsdp": 4},
    "fsdp, tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
    "pipeline, fsdp": {"mesh.pipeline": 2, "mesh.fsdp": 4, "train.accumulation": 2},
}


TIED_SLOW = ("fsdp", "fsdp, microbatches")


@pytest.mark.parametrize(
    "layout",
    # "data, fsdp" goes the same way as "fsdp", with and without microbatches.
    [
        pytest.param(layout, marks=pytest.mark.slow if name in TIED_SLOW else ())
        for name, layout in TIED_LAYOUTS.items()
    ],
    ids=TIED_LAYOUTS,
)
def test_the_gradients_of_a_tied_table_are_summed_over_devices_once(layout) -> None:
    """Each device first adds up its own gradients of both ends of the model."""
    fields = DENSE_STEP | {"model.tied_embeddings": True, "mesh.data": 1, "train.accumulation": 1}
    config, compiled, mesh = compile_step(
        RunConfig.config_dict(), fields | layout, jax.devices(), "cpu"
    )
    (least,) = (
        collective.bytes
        for collective in least_collectives(config, config.mesh)
        if (collective.kind, collective.what) == ("reduce-scatter", "embedding: gradients")
    )
    # A CPU's program has no other scatters over fsdp: it adds up the gradients of layers.
    assert sent(compiled, mesh)["reduce-scatter fsdp"] == least


@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_a_backward_pass_without_remat_gathers_no_tokens_again(layout) -> None:
    """It forgets gathered weights. What was gathered of the tokens is kept."""
    fields = DENSE_STEP | {"model.remat": "none", "mesh.data": 1}
    if layout == "tensor":
        fields |= {"mesh.fsdp": 2, "mesh.tensor": 4, "model.num_heads": 4, "model.num_kv_heads": 4}
    else:
        fields |= {"mesh.fsdp": 2, "mesh.expert": 4, "model.moe.num_experts": 4}
        fields |= {"model.moe.expert_dim": 64, "model.moe.exchange": "all_gather"}
    config, compiled, mesh = compile_step(RunConfig.config_dict(), fields, jax.devices(), "cpu")
    found = sent(compiled, mesh)[f"all-gather {layout}"]
    least = sum(
        collective.bytes
        for collective in least_collectives(config, config.mesh)
        if (collective.kind, collective.axes) == ("all-gather", (layout,))
    )
    assert 0 < found <= 1.1 * least


def h200s() -> list:
    """Eight H200s that are not here. Their compiler is in jax-cuda13-plugin and jax-cuda13-pjrt; no
    driver is needed.
    """
    pytest.importorskip(
        "jax_cuda13_plugin", reason="needs pip install jax-cuda13-plugin jax-cuda13-pjrt"
    )
    from jax.experimental import topologies

    target = (ROOT / "moe" / "scaling" / "programs" / "h200.textproto").read_text()
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology="1x1x8"
    ).devices


def check_ragged(found: Counter[str], width: int = D) -> None:
    """Exactly the rows of an even load, there and back; and the plans of the exchange."""
    rows = rows_sent(8) * width / D
    assert rows <= found["all-to-all expert"] <= 1.01 * rows


RAGGED = MoEConfig(num_experts=16, experts_per_token=2, expert_dim=48, exchange="ragged_all_to_all")


@pytest.mark.aot
def test_all_to_all_for_8_h200() -> None:
    mesh = make_mesh(h200s(), expert=8)
    check_all_to_all(sent(compile_forward(MOE, mesh, "cuda"), mesh), 8)


@pytest.mark.aot
def test_ragged_exchange_for_8_h200() -> None:
    mesh = make_mesh(h200s(), expert=8)
    check_ragged(sent(compile_forward(RAGGED, mesh, "cuda"), mesh))


def v5ps(monkeypatch: pytest.MonkeyPatch) -> list:
    """Eight TPU v5p that are not here. Their compiler is libtpu."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices


@pytest.mark.aot
def test_all_to_all_for_8_v5p(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(v5ps(monkeypatch), expert=8)
    check_all_to_all(sent(compile_forward(MOE, mesh, "tpu"), mesh), 8)


@pytest.mark.aot
def test_ragged_exchange_for_8_v5p(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(v5ps(monkeypatch), expert=8)
    # Its program pads each row to 128 numbers.
    check_ragged(sent(compile_forward(RAGGED, mesh, "tpu"), mesh), width=128)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("remat", "gather_once"), [("none", False), ("full", False), ("full", True)]
)
def test_a_dense_step_on_8_h200_sends_the_least(remat: str, gather_once: bool) -> None:
    """dense_7b with 4 microbatches of 64 rows, or of 32 rows without remat."""
    rows = {"none": 32, "full": 64}[remat]
    fields = {"model.remat": remat, "train.batch_size": rows, "train.accumulation": 4}
    fields |= {"train.gather_once": gather_once}
    fields |= {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1}
    config, compiled, mesh = compile_step(dense_7b.get_config(), fields, h200s(), "cuda")
    found = sent(compiled, mesh)
    least = sum(collective.bytes for collective in least_collectives(config, config.mesh))
    total = sum(found[kind] for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    assert total <= 1.001 * least
