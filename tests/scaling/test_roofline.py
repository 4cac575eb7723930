"""Tests the time of a step, and the layouts that fit, on chips with round numbers."""

import dataclasses

import pytest

from moe.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    check_layout,
)
from moe.scaling.communication import Collective
from moe.scaling.flops import run_training_flops
from moe.scaling.hardware import CHIPS, PEAK_FLOPS, Chip, find_chip
from moe.scaling.layouts import cheapest_fit, fitting_layouts
from moe.scaling.memory import step_bytes
from moe.scaling.roofline import estimate, memory_traffic, network_seconds

CHIP = Chip("test", "test", 1e12, 1e9, 1e11, 100.0, 10.0, 4, 4)
MODEL = ModelConfig(
    vocab_size=256,
    num_layers=4,
    model_dim=64,
    feed_forward_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def run_config(**train):
    return RunConfig(
        model=MODEL,
        data=DataConfig(sequence_length=64),
        train=TrainConfig(**{"batch_size": 64, **train}),
    )


def sizes(**axes):
    return dataclasses.asdict(MeshConfig(**{"data": 1, **axes}))


def seconds(axes, kind="all-gather", **mesh):
    collective = Collective(kind, axes, "x", 1200.0, 1)
    return network_seconds((collective,), sizes(**mesh), CHIP)[f"network over {', '.join(axes)}"]


def test_a_group_within_a_slice_uses_its_links():
    assert seconds(("tensor",), fsdp=4, tensor=4) == 12.0
    assert seconds(("fsdp",), fsdp=4) == 12.0


def test_devices_of_a_slice_share_what_crosses_to_another():
    """Slices have 4 devices: tensor=4 fills one, and fsdp=8 alone has 4 of its devices in each."""
    assert seconds(("fsdp",), fsdp=4, tensor=4) == 120.0
    assert seconds(("fsdp",), fsdp=8) == 30.0
    assert seconds(("fsdp",), fsdp=8, tensor=2) == 60.0
    assert seconds(("fsdp", "expert"), fsdp=4, expert=4) == 30.0


def test_a_slice_need_not_be_full():
    """All 4 devices lie in a slice that has room for 6, which 4 does not divide."""
    collective = Collective("all-gather", ("fsdp",), "x", 1200.0, 1)
    chip = dataclasses.replace(CHIP, devices_per_slice=6)
    times = network_seconds((collective,), sizes(fsdp=2, tensor=2), chip)
    assert times == {"network over fsdp": 12.0}


def test_pairs_of_an_all_to_all_share_nothing():
    """Of the 7 other devices 4 lie in another slice, and get 4/7 of the bytes."""
    assert seconds(("expert",), "all-to-all", expert=8) == pytest.approx(1200 * 4 / 7 / 10)


def test_a_step_is_bounded_by_what_takes_longest():
    config, mesh = run_config(), MeshConfig(data=1)
    flops = 64 * 64 * run_training_flops(config)
    quick = dataclasses.replace(CHIP, memory_bandwidth=1e30)
    plan = estimate(config, mesh, quick)
    assert plan.bound == "compute" and plan.step_seconds == flops / 1e12 and plan.mfu == 1.0
    slow = estimate(config, mesh, dataclasses.replace(CHIP, memory_bandwidth=1.0))
    assert slow.bound == "memory" and slow.step_seconds == memory_traffic(config, mesh, "gpu")
    measured = estimate(config, mesh, dataclasses.replace(CHIP, overlaps=False))
    assert measured.step_seconds == sum(measured.seconds.values())
    full = dataclasses.replace(config, model=dataclasses.replace(MODEL, remat="full"))
    again = estimate(full, mesh, quick)
    # The layers' forward pass is repeated. The logits are not.
    logits = 64 * 64 * 2 * MODEL.model_dim * MODEL.vocab_size
    repeated = (flops / 3 - logits) / 1e12
    assert again.step_seconds == pytest.approx(plan.step_seconds + repeated)
    assert again.model_flops == plan.model_flops


def test_layouts_that_fit_are_ordered_by_time_and_none_is_too_large():
    config = run_config()
    room = step_bytes(config, MeshConfig(data=4), "gpu").total * 0.6
    chip = dataclasses.replace(CHIP, memory_bytes=room)
    layouts = fitting_layouts(config, 4, chip)
    times = [layout.estimate.step_seconds for layout in layouts]
    assert layouts and times == sorted(times)
    assert all(layout.estimate.memory.total <= room for layout in layouts)
    assert len({layout.flags for layout in layouts}) == len(layouts)
    gathered = [layout.config for layout in layouts if layout.config.train.gather_once]
    assert gathered and len(gathered) < len(layouts)
    assert all(c.train.accumulation > 1 and c.mesh.fsdp * c.mesh.expert > 1 for c in gathered)
    assert fitting_layouts(config, 4, dataclasses.replace(CHIP, memory_bytes=1.0)) == []


def test_the_cheapest_change_that_fits_is_named():
    config, mesh = run_config(), MeshConfig(data=4)
    whole = step_bytes(config, mesh, "gpu").total
    assert cheapest_fit(config, mesh, dataclasses.replace(CHIP, memory_bytes=whole / 1e6)) is None
    change = cheapest_fit(config, mesh, dataclasses.replace(CHIP, memory_bytes=0.8 * whole))
    assert change is not None and ", " not in change
    name, value = change.split(" and ")[0].split("=")
    assert name in ("train.accumulation", "model.remat", "mesh.data") and value


def test_parameters_need_not_be_gathered_once_where_they_do_not_fit():
    """Fewer rows in a microbatch would not do: each device has one already."""
    config = run_config(batch_size=8, accumulation=2, gather_once=True)
    mesh = MeshConfig(data=1, fsdp=4)
    split = dataclasses.replace(config.train, gather_once=False)
    room = step_bytes(dataclasses.replace(config, train=split), mesh, "gpu").total
    assert room < step_bytes(config, mesh, "gpu").total
    chip = dataclasses.replace(CHIP, memory_bytes=room)
    assert cheapest_fit(config, mesh, chip) == "train.gather_once=False"


def test_the_table_of_chips_is_that_of_the_devices():
    assert find_chip("v5p").device_kind == "TPU v5"
    assert PEAK_FLOPS["NVIDIA H200"] == CHIPS["h200"].peak_flops
    # JAX sees the two halves of a chip of 2307 TFLOP/s.
    assert 2 * PEAK_FLOPS["TPU7x"] == 2307e12
    with pytest.raises(ConfigError, match="--chip=h300 is no chip of the table: set it to h200"):
        find_chip("h300")


def pipeline_config(microbatches, rounds=1, rows=64):
    config = run_config(accumulation=microbatches, pipeline_rounds=rounds, batch_size=rows)
    return dataclasses.replace(config, mesh=MeshConfig(data=1, pipeline=2))


@pytest.mark.parametrize(("rounds", "waiting"), [(1, 1 / 4), (2, 1 / 8)])
def test_the_stages_of_a_pipeline_wait_and_the_loss_does_not(rounds, waiting):
    """Two stages and 4 microbatches have 5 ticks, or 9 in two rounds."""
    config, quick = pipeline_config(4, rounds), dataclasses.replace(CHIP, memory_bandwidth=1e30)
    quick = dataclasses.replace(quick, link_bandwidth=1e30, network_bandwidth=1e30)
    tokens, unembedding = 64 * 64, 3 * 2 * 64 * 256
    stages = run_training_flops(config) - unembedding
    expected = tokens * (stages * (1 + waiting) + unembedding) / 2 / 1e12
    assert estimate(config, config.mesh, quick).step_seconds == pytest.approx(expected)


def test_pipelines_are_among_the_layouts_with_the_rounds_that_wait_least():
    config = pipeline_config(2, rows=8)
    chip = dataclasses.replace(CHIP, memory_bandwidth=1e30, link_bandwidth=1e30)
    layouts = fitting_layouts(config, 4, chip)
    found = [layout.config for layout in layouts if layout.config.mesh.pipeline > 1]
    assert found and all(c.train.accumulation % c.mesh.pipeline == 0 for c in found)
    two_stages = [c.train.pipeline_rounds for c in found if c.mesh.pipeline == 2]
    assert set(two_stages) == {2}  # of one layer each
    for layout in layouts:
        check_layout(layout.config, layout.config.mesh)
    assert "train.pipeline_rounds=" in next(
        layout.flags for layout in layouts if layout.config.mesh.pipeline > 1
    )
