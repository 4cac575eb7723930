"""Compares the counted bytes of a step with those that compiled programs take.

Small models are compiled for virtual CPU devices here, and the committed configs for the hardware
that they name ahead of time (marker aot).
"""

import dataclasses
import importlib
from pathlib import Path

import jax
import pytest

from launch.compiled_step import abstract_batch, held_bytes, lower_step
from moe.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from moe.scaling.hardware import device_platform
from moe.scaling.memory import MARGIN, step_bytes
from moe.training.train_step import make_program

DENSE = ModelConfig(
    num_layers=4,
    model_dim=128,
    feed_forward_dim=352,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    compute_dtype="float32",
)
SMALL = RunConfig(
    model=DENSE, data=DataConfig(sequence_length=256), train=TrainConfig(batch_size=16)
)


def program_bytes(config, devices, platform):
    """Returns the bytes that the compiled step of a config takes on each device."""
    program = make_program(config, devices)
    lowered = lower_step(program, abstract_batch(config, program), platform)
    return held_bytes(lowered.compile().memory_analysis(), platform)


def counted_over_program(config, devices, platform="cpu"):
    mesh = config.mesh.resolve(len(devices))
    counted = step_bytes(config, mesh, device_platform(devices[0].device_kind)).total
    return counted / program_bytes(config, devices, platform)


@pytest.mark.parametrize(
    ("rows", "accumulation", "mesh"),
    [(16, 1, MeshConfig(data=1)), (256, 2, MeshConfig(data=2, fsdp=4))],
)
def test_small_programs_take_what_is_counted(rows, accumulation, mesh):
    """Each device has 16 rows in a microbatch, whose activations are most of what it holds."""
    train = dataclasses.replace(SMALL.train, batch_size=rows, accumulation=accumulation)
    config = dataclasses.replace(SMALL, mesh=mesh, train=train)
    devices = jax.devices()[: mesh.data * mesh.fsdp]
    assert counted_over_program(config, devices) == pytest.approx(1, abs=MARGIN)


@pytest.mark.slow
def test_a_small_pipeline_takes_what_is_counted():
    """Each stage holds the inputs of its two layers for 17 ticks, and everything for the loss."""
    mesh, model = MeshConfig(data=1, pipeline=2, fsdp=4), DENSE
    train = dataclasses.replace(SMALL.train, batch_size=512, accumulation=8)
    config = dataclasses.replace(SMALL, mesh=mesh, train=train, model=model)
    assert counted_over_program(config, jax.devices()) == pytest.approx(1, abs=MARGIN)


def h200s(topology):
    """Returns H200s that are not here, as `topology` names them: slices x hosts x devices."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs pip install -e '.[aot]'")
    from jax.experimental import topologies

    target = (Path(__file__).parents[2] / "moe/scaling/programs/h200.textproto").read_text()
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology)
    return found.devices


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("dense_125m", "1x1x1"),
        ("dense_1b", "1x1x8"),
        ("dense_1b_32k", "1x1x8"),
        ("dense_7b", "1x8x8"),
        ("moe_1b_7b", "1x8x8"),
    ],
)
def test_programs_for_h200_take_what_is_counted(name, topology):
    module = importlib.import_module(f"configs.{name}")
    config = RunConfig.from_config_dict(module.get_config())
    ratio = counted_over_program(config, list(h200s(topology)), "cuda")
    assert ratio == pytest.approx(1, abs=MARGIN)


@pytest.mark.aot
def test_a_program_for_v5p_takes_what_is_counted():
    """The temporaries that libtpu reports are no measure of it (docs/log.md)."""
    pytest.importorskip("libtpu", reason="needs pip install -e '.[aot]'")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    config = RunConfig.from_config_dict(importlib.import_module("configs.dense_1b").get_config())
    ratio = counted_over_program(config, list(found.devices), "tpu")
    assert ratio == pytest.approx(1, abs=MARGIN)
