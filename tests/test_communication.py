"""What sparse layers send, read off compiled programs: on 8 virtual devices, and ahead of time for
8 H200 or TPUs (marker aot).
"""

import collections
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from moe.config import MoEConfig
from moe.model.experts import MoE
from moe.parallel.mesh import AXES, shardings, spec
from moe.parameters import unbox

ROWS, LENGTH, D = 16, 64, 32
MOE = MoEConfig(
    num_experts=16,
    experts_per_token=2,
    expert_dim=48,
    dispatch="capacity",
    exchange="all_to_all",
    capacity_factor=1.25,
)
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "u32": 4, "s64": 8}


def collectives(program: str) -> dict[str, list[int]]:
    """Bytes of each collective's result on one device, by kind: a tuple's parts added up, without
    the operands of an asynchronous start.
    """
    found = collections.defaultdict(list)
    kinds = r"all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all"
    for shape, kind, start in re.findall(rf"= (.*?) ({kinds})(-start)?\(", program):
        sizes = [
            BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        ]
        found[kind].append(sum(sizes[len(sizes) // 2 :] if start else sizes))
    return found


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


def sent(results: list[int], devices: int) -> float:
    """Bytes that leave a device: a part of each all-to-all stays."""
    return sum(results) * (devices - 1) / devices


def check_all_to_all(found: dict[str, list[int]], experts: int) -> None:
    """At most 1.3 times the rows that travel under an even load, there and back; no weight is
    gathered.
    """
    tokens = ROWS * LENGTH / 8
    needed = 2 * tokens * MOE.experts_per_token * D * 4 * (experts - 1) / experts
    assert 0.9 * needed < sent(found["all-to-all"], experts) <= 1.3 * needed
    assert (
        sum(found["all-gather"]) <= D * MOE.num_experts * 4
    )  # the router's weight: no expert's, and no activations
    assert not found["reduce-scatter"] and not found["collective-permute"]


def test_all_to_all_sends_the_rows_and_no_weights() -> None:
    check_all_to_all(
        collectives(compile_forward(MOE, make_mesh(jax.devices(), expert=8)).as_text()), 8
    )


def test_fsdp_gathers_each_weight_once() -> None:
    """Three weights of a device's 4 experts, whole along D; and the router's small one, over expert
    and then over fsdp.
    """
    found = collectives(compile_forward(MOE, make_mesh(jax.devices(), fsdp=2, expert=4)).as_text())
    weight = MOE.num_experts // 4 * D * MOE.expert_dim * 4
    assert sorted(found["all-gather"])[-3:] == [weight] * 3
    assert sum(found["all-gather"]) <= 3 * weight + 2 * D * MOE.num_experts * 4
    rows = 2 * ROWS * LENGTH / 8 * MOE.experts_per_token * D * 4 * 3 / 4
    assert sent(found["all-to-all"], 4) <= 1.3 * rows


def test_the_parser_adds_up_tuples() -> None:
    program = """
      %a = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={}
      %b = f32[8]{0} all-to-all(%z)
      %c = f32[8]{0} add(%z, %z)
    """
    assert collectives(program) == {"all-reduce": [32], "all-to-all": [32]}


def h200s() -> list:
    """Eight H200s that are not here. Their compiler is in jax-cuda13-plugin and jax-cuda13-pjrt; no
    driver is needed.
    """
    pytest.importorskip(
        "jax_cuda13_plugin", reason="needs pip install jax-cuda13-plugin jax-cuda13-pjrt"
    )
    from jax.experimental import topologies

    target = (Path(__file__).parent / "h200.textproto").read_text()
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology="1x1x8"
    ).devices


@pytest.mark.aot
def test_all_to_all_for_8_h200() -> None:
    check_all_to_all(
        collectives(compile_forward(MOE, make_mesh(h200s(), expert=8), "cuda").as_text()), 8
    )


@pytest.mark.aot
def test_ragged_exchange_compiles_for_8_h200() -> None:
    config = MoEConfig(
        num_experts=16, experts_per_token=2, expert_dim=48, exchange="ragged_all_to_all"
    )
    found = collectives(compile_forward(config, make_mesh(h200s(), expert=8), "cuda").as_text())
    assert len(found["ragged-all-to-all"]) == 2


def v5ps(monkeypatch: pytest.MonkeyPatch) -> list:
    """Eight TPU v5p that are not here. Their compiler is libtpu."""
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices


@pytest.mark.aot
def test_all_to_all_for_8_v5p(monkeypatch: pytest.MonkeyPatch) -> None:
    check_all_to_all(
        collectives(compile_forward(MOE, make_mesh(v5ps(monkeypatch), expert=8), "tpu").as_text()),
        8,
    )


@pytest.mark.aot
def test_ragged_exchange_compiles_for_8_v5p(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig(
        num_experts=16, experts_per_token=2, expert_dim=48, exchange="ragged_all_to_all"
    )
    found = collectives(
        compile_forward(config, make_mesh(v5ps(monkeypatch), expert=8), "tpu").as_text()
    )
    assert len(found["ragged-all-to-all"]) == 2
