"""The RULES table, and the hosts' parts of a batch."""

import dataclasses
import functools
import importlib
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe.config import ConfigError, MeshConfig, ModelConfig, RunConfig, TrainConfig
from moe.parallel import mesh as mesh_module
from moe.parallel.mesh import (
    arrange_devices,
    axis_size,
    constrain,
    global_batch,
    host_rows,
    per_shard,
    spec,
)
from moe.parameters import Declared, unbox

ROOT = Path(__file__).parents[2]
DIMS = {"tokens": "BT", "loss_mask": "BT"}


def make_mesh(**sizes):
    model = ModelConfig(num_heads=8, num_kv_heads=4)
    return mesh_module.make_mesh(
        RunConfig(mesh=MeshConfig(**sizes), model=model, train=TrainConfig(batch_size=16))
    )


def test_parameters_and_activations_follow_one_table():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch, dim = ("data", "fsdp", "expert"), ("fsdp", "expert")
    assert spec("DF", (64, 64), mesh) == P(dim, "tensor")
    assert spec("LNHD", (3, 8, 5, 64), mesh) == P("pipeline", "tensor", (), dim)
    assert spec("VD", (64, 64), mesh) == P("tensor", dim)
    # An expert's own weights have given the expert axis to E.
    assert spec("EDF", (8, 64, 64), mesh) == P("expert", "fsdp", "tensor")
    # B takes both, so an activation's D is whole on each device.
    assert spec("BTD", (16, 8, 64), mesh) == P(batch, "context", ())
    assert spec("BTNH", (16, 8, 8, 16), mesh) == P(batch, "context", "tensor", ())
    # D is also whole where B is too small to be split: B's axes split no other dimension.
    assert spec("BTD", (1, 8, 64), mesh) == P((), "context", ())


def test_fewer_key_value_heads_than_the_tensor_axis_are_copied():
    mesh = make_mesh(data=1, tensor=8)
    assert spec("DKH", (64, 4, 16), mesh) == P(("fsdp", "expert"), (), ())
    assert spec("DKH", (64, 8, 16), mesh) == P(("fsdp", "expert"), "tensor", ())


def test_a_parameter_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="dimension F of DF has size 63"):
        spec("DF", (64, 63), make_mesh(data=4, tensor=2))


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((3, 5))
    assert constrain(x, "BT") is x


def test_a_mesh_with_other_axes_is_left_alone():
    devices = np.array(jax.devices())
    x = jnp.ones((8, 4, 2))
    with jax.set_mesh(Mesh(devices, ("batch",), axis_types=(AxisType.Auto,))):
        assert constrain(x, "BTD") is x
    mesh = Mesh(devices.reshape(4, 2), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data", "other")))
        kept = jax.jit(lambda x: constrain(x, "BTD"))(split)
    assert kept.sharding.is_equivalent_to(split.sharding, 3)


def inside_shard_map(function, mesh, axis):
    """`function` inside a shard_map that makes one axis of the mesh Manual, over rows."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=P(axis),
        out_specs=P(axis),
        axis_names={axis},
        check_vma=False,
    )


@pytest.mark.parametrize("axis", ["data", "pipeline"])
def test_layouts_survive_a_manual_axis(axis):
    mesh = jax.make_mesh((2, 2, 2), (axis, "fsdp", "context"), (AxisType.Auto,) * 3)
    x, seen = jnp.arange(8.0 * 4 * 2).reshape(8, 4, 2), []

    def add_up(x_BTD):
        seen.append(x_BTD.shape)
        size = axis_size("context")
        return (jax.lax.psum(x_BTD, "context") if size > 1 else x_BTD,)

    def function(x_BTD):
        return per_shard(add_up, ("BTD",), ("B-D",), constrain(2 * x_BTD, "BTD"))[0]

    run = jax.jit(inside_shard_map(function, mesh, axis))
    with jax.set_mesh(mesh):
        program = run.lower(x).as_text()
        found = run(x)
    np.testing.assert_array_equal(found, 2 * (x[:, :2] + x[:, 2:]))
    # The Manual axis has left 4 rows. fsdp splits these, and context the time.
    assert seen[-1] == (2, 2, 2)
    assert re.search(r"sharding_constraint .*fsdp.*context", program)


def test_inside_a_shard_map_over_all_axes_nothing_is_split():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

    def function(x_BT):
        assert constrain(x_BT, "BT") is x_BT
        return per_shard(lambda x_BT: (x_BT + 1,), ("BT",), ("BT",), x_BT)[0]

    found = jax.jit(inside_shard_map(function, mesh, "data"))(jnp.ones((8, 3)))
    np.testing.assert_array_equal(found, 2 * np.ones((8, 3)))


@pytest.mark.parametrize(("axis", "dim"), [("expert", "E"), ("tensor", "F")])
def test_a_manual_axis_that_should_split_a_weight_is_refused(axis, dim):
    mesh = jax.make_mesh((2,), (axis,), (AxisType.Auto,), devices=jax.devices()[:2])
    w_EDF = jnp.ones((4, 8, 8))

    def function(x_BTD):
        return per_shard(lambda x, w: (x,), ("BTD", "EDF"), ("BTD",), x_BTD, w_EDF)[0]

    message = (
        f"dimension {dim} of EDF is to be split over the mesh axis '{axis}', which a jax.shard"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(inside_shard_map(function, mesh, axis), jnp.ones((4, 3, 8)))


def test_the_mesh_refuses_what_does_not_fit_the_devices():
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        make_mesh(data=1, fsdp=16)
    with pytest.raises(ConfigError, match=r"batch_size=16 .* multiple of"):
        mesh_module.make_mesh(
            RunConfig(mesh=MeshConfig(data=-1), train=TrainConfig(batch_size=16, accumulation=4))
        )


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that is not here, with what the order of devices follows."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0


def tpus(x, y, z, num_slices=1):
    """Slices of TPU v5p, four chips to a host."""
    places = list(itertools.product(range(num_slices), range(z), range(y), range(x)))
    return [
        Chip(number, number // 4, index, (x, y, z))
        for number, (index, z, y, x) in enumerate(places)
    ]


def places(mesh_devices, name):
    return np.vectorize(lambda device: getattr(device, name), otypes=[object])(mesh_devices)


def distances(chips):
    """How far apart the chips of each pair are, in links of a 4x4x4 torus."""
    return [
        sum(min(abs(a - b), 4 - abs(a - b)) for a, b in zip(one.coords, two.coords, strict=True))
        for one, two in itertools.combinations(chips, 2)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1, "fsdp": 8, "tensor": 8},
        {"data": 1, "fsdp": 8, "expert": 8},
        {"data": 8, "fsdp": 8},
        {"data": 1, "fsdp": 64},
        {"data": 2, "fsdp": 4, "tensor": 8},
    ],
)
def test_64_chips_of_a_torus_make_every_axis_of_8(sizes):
    mesh = arrange_devices(MeshConfig(**sizes), tpus(4, 4, 4))
    assert mesh.shape == MeshConfig(**sizes).sizes
    assert {device.id for device in mesh.flat} == set(range(64))
    # The last axis that splits anything has a compact part of the torus: half of a 4x4 plane.
    last = mesh.reshape(-1, 8)
    if mesh.shape[2] != 64:
        assert max(max(distances(group)) for group in last) <= 3


def test_the_data_axis_spans_the_slices_of_tpus():
    mesh = arrange_devices(MeshConfig(data=4, fsdp=4), tpus(2, 2, 2, num_slices=2))
    slices = places(mesh, "slice_index")
    np.testing.assert_array_equal(slices[:, 0, :, 0, 0, 0], [[0] * 4] * 2 + [[1] * 4] * 2)
    assert {device.id for device in mesh.flat} == set(range(16))


@pytest.mark.parametrize(("data", "fsdp", "num_slices"), [(1, 32, 4), (2, 16, 4), (8, 3, 3)])
def test_a_data_axis_that_cannot_span_the_slices_is_refused(data, fsdp, num_slices):
    message = f"mesh.data={data} cannot span the {num_slices} slices .*multiple of {num_slices}"
    with pytest.raises(ConfigError, match=message):
        arrange_devices(MeshConfig(data=data, fsdp=fsdp), tpus(2, 2, 2, num_slices))


def test_the_last_axes_stay_within_a_host_of_gpus():
    """Processes with one GPU each, dealt out to two hosts in turn."""
    gpus = [
        Chip(number, number, number % 2, platform="gpu", device_kind="NVIDIA H200")
        for number in range(16)
    ]
    mesh = arrange_devices(MeshConfig(data=1, fsdp=4, tensor=4), gpus)
    hosts = places(mesh, "slice_index")[0, 0, :, 0, 0, :]
    np.testing.assert_array_equal(hosts, [[0] * 4] * 2 + [[1] * 4] * 2)
    # Slices of GPUs are hosts, and every axis may span them.
    hosts = places(arrange_devices(MeshConfig(data=1, fsdp=16), gpus), "slice_index")
    np.testing.assert_array_equal(hosts.ravel(), [0] * 8 + [1] * 8)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "expert": 4, "data": 1}],
)
def test_a_global_batch_holds_the_hosts_rows(sizes):
    mesh = make_mesh(**sizes)
    rows = {
        "tokens": np.arange(16 * 4).reshape(16, 4),
        "loss_mask": np.arange(16 * 4).reshape(16, 4) % 3 == 0,
    }
    batch = global_batch(rows, mesh, 16, DIMS)
    np.testing.assert_array_equal(host_rows(mesh, 16), np.arange(16))
    jax.tree.map(np.testing.assert_array_equal, batch, rows)
    assert batch["tokens"].sharding.spec == spec("BT", (16, 4), mesh)


def optimizer_shardings(optimizer):
    """Returns the state of an optimizer of a matrix and a scale, and how a mesh splits it."""
    struct = jax.ShapeDtypeStruct
    declared = {
        "w": Declared(struct((8, 16), "float32"), dims="DF", kind="linear", fan_in=8),
        "scale": Declared(struct((8,), "float32"), dims="D", kind="norm", fan_in=1),
    }
    state = jax.eval_shape(optimizer.init, declared)
    return unbox(state), mesh_module.shardings(state, make_mesh(data=2, fsdp=2, tensor=2))


def test_the_state_of_an_optimizer_that_leaves_parameters_out_is_split():
    """Optax puts a node without arrays in the place of what a part of an optimizer leaves out."""
    names = functools.partial(jax.tree.map, lambda x: "momentum" if x.ndim == 2 else "adam")
    parts = {"momentum": optax.trace(0.9), "adam": optax.scale_by_adam()}
    state, found = optimizer_shardings(optax.partition(parts, names))
    assert jax.tree.structure(state) == jax.tree.structure(found)
    assert [leaf.spec for leaf in jax.tree.leaves(found)] == [
        P(),  # the number of Adam's updates
        P(("fsdp", "expert")),
        P(("fsdp", "expert")),
        P(("fsdp", "expert"), ("tensor",)),
    ]


def test_an_optimizer_whose_state_has_other_shapes_is_refused():
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    with pytest.raises(ValueError, match=r"^an array of shape \(8,\) stands for a parameter"):
        optimizer_shardings(optax.masked(factored, {"w": True, "scale": False}))


def test_only_time_is_split_over_context():
    mesh = make_mesh(context=2, expert=4, data=1)
    rows = {"tokens": np.ones((16, 4)), "features": np.ones((16, 4)), "label": np.ones(16)}
    dims = {"tokens": "BT", "features": "BX", "label": "B"}
    batch = global_batch(rows, mesh, 16, dims)
    shapes = {name: x.addressable_shards[0].data.shape for name, x in batch.items()}
    assert shapes == {"tokens": (4, 2), "features": (4, 4), "label": (4,)}
    jax.tree.map(np.testing.assert_array_equal, batch, rows)


def test_a_field_whose_first_dimension_is_not_the_rows_is_refused():
    rows = {"tokens": np.ones((4, 16))}
    with pytest.raises(ValueError, match=r"dims\['tokens'\]='TB' does not start with B"):
        global_batch(rows, make_mesh(data=8), 16, {"tokens": "TB"})


def test_every_process_places_its_own_rows(monkeypatch):
    """A process that holds rows 4-7 and 12-15 (as with data=2 across two hosts) hands over those
    rows only.
    """
    mesh = make_mesh(data=8)
    held = np.array([4, 5, 6, 7, 12, 13, 14, 15])
    asked = []

    def record(shape, array_sharding, callback):
        asked.append(callback((slice(12, 14), slice(0, 3))))
        return jnp.zeros(shape)

    monkeypatch.setattr(mesh_module, "host_rows", lambda *_: held)
    monkeypatch.setattr(jax, "make_array_from_callback", record)
    global_batch({"tokens": held[:, None] * np.ones((1, 3), int)}, mesh, 16, DIMS)
    np.testing.assert_array_equal(asked[0], [[12] * 3, [13] * 3])


def named_hardware(name):
    """Returns the devices that a config's docstring names: hosts of 8 H200, and a TPU's slice."""
    text = importlib.import_module(f"configs.{name}").__doc__
    return re.search(
        r"^Hardware: ([\d,]+) H200 \((\d+) hosts?\)(?:, or TPU (v\w+:[\dx]+))?", text, re.MULTILINE
    )


CONFIGS = [
    path.stem for path in sorted((ROOT / "configs").glob("[!_]*.py")) if named_hardware(path.stem)
]


def check_mesh(name, devices):
    config = RunConfig.from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    mesh = mesh_module.make_mesh(config, devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    return mesh


@pytest.mark.aot
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_a_mesh_on_the_h200s_that_it_names(name):
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin jax-cuda13-pjrt")
    number, num_hosts = (int(text.replace(",", "")) for text in named_hardware(name).groups()[:2])
    target = (ROOT / "moe" / "scaling" / "programs" / "h200.textproto").read_text()
    devices = topologies.get_topology_desc(
        platform="cuda",
        target_config=target,
        topology=f"1x{num_hosts}x{number // num_hosts}",
    ).devices
    assert len(devices) == number
    mesh = check_mesh(name, devices)
    # What a row of 8 neighbours in the mesh sends each other stays within a host.
    hosts = places(mesh.devices, "process_index").reshape(num_hosts, -1)
    assert all(len(set(row)) == 1 for row in hosts)


@pytest.mark.aot
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_a_mesh_on_the_tpus_that_it_names(name, monkeypatch):
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = named_hardware(name)[3]
    if topology is None:
        pytest.skip(f"{name} names no TPU")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(devices) == int(named_hardware(name)[1].replace(",", ""))
    check_mesh(name, devices)


@pytest.mark.aot
def test_two_slices_of_tpus_have_a_mesh(monkeypatch):
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5p:2x2x2", num_slices=2
    ).devices
    mesh = arrange_devices(MeshConfig(data=2, fsdp=4, tensor=2), devices)
    assert [set(places(half, "slice_index").flat) for half in mesh] == [{0}, {1}]
