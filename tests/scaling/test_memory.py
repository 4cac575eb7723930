"""Compares the counted bytes of a training state with those of the real one's shards."""

import dataclasses

import jax
import numpy as np
import pytest

from moe.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moe.scaling.memory import StateBytes, state_bytes
from moe.training.train_step import make_program
from tests.tiny import OTHER_TASKS

DENSE = ModelConfig(
    vocab_size=512,
    num_layers=3,
    model_dim=16,
    feed_forward_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
MOE = MoEConfig(
    num_experts=8,
    expert_dim=12,
    num_shared_experts=1,
    first_dense_layers=1,
    router="sigmoid",
    bias_update_rate=0.01,
)
MODELS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tied_embeddings=True, qk_norm=True),
    "sparse": dataclasses.replace(DENSE, moe=MOE),
    "every second layer sparse": dataclasses.replace(
        DENSE, num_layers=5, moe=MoEConfig(num_experts=8, expert_dim=12, layer_period=2)
    ),
    "hash": dataclasses.replace(DENSE, moe=MoEConfig(num_experts=8, expert_dim=12, router="hash")),
}
# The two key/value heads are whole on each device of a tensor axis of 4.
MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=2, fsdp=4),
    MeshConfig(data=1, fsdp=2, tensor=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, expert=4, context=2),
]


def bytes_on(device, tree):
    """Returns the bytes of a tree's shards on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def run_config(model, mesh):
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=16),
        train=TrainConfig(batch_size=8),
        mesh=mesh,
    )


def check_bytes(config):
    """Compares the count with a state of zeros, which needs no compiling, on every device."""
    program = make_program(config)
    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        program.abstract_state,
    )
    counted = state_bytes(config, config.mesh)
    progress = (state.step, state.examples, state.skipped, state.skipped_in_row)
    for device in jax.devices():
        assert counted == StateBytes(
            parameters=bytes_on(device, state.params),
            optimizer=bytes_on(device, state.opt_state),
            router_state=bytes_on(device, state.router_state),
            progress=bytes_on(device, progress),
            gradients=bytes_on(device, state.params),
        )
        assert counted.total == bytes_on(device, state) + counted.gradients


@pytest.mark.parametrize(("name", "mesh"), list(zip(MODELS, MESHES, strict=True)))
def test_bytes_equal_those_of_the_shards_on_every_device(name, mesh):
    check_bytes(run_config(MODELS[name], mesh))


def test_bytes_of_a_pipeline_equal_those_of_its_stages():
    """Stages share the sparse layers. The dense layer before them is whole on each device."""
    model = dataclasses.replace(MODELS["sparse"], num_layers=MOE.first_dense_layers + 4)
    config = run_config(model, MeshConfig())
    mesh = MeshConfig(data=1, pipeline=2, fsdp=2, tensor=2)
    train = dataclasses.replace(config.train, accumulation=2, pipeline_rounds=2)
    check_bytes(dataclasses.replace(config, mesh=mesh, train=train))


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_bytes_of_a_run_equal_those_of_its_tasks_model(task):
    config = run_config(MODELS["sparse"], MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    check_bytes(dataclasses.replace(config, task=task))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.sizes)))
@pytest.mark.parametrize("name", MODELS)
def test_bytes_equal_those_of_the_shards_for_all_models_and_meshes(name, mesh):
    check_bytes(run_config(MODELS[name], mesh))


@pytest.mark.slow
def test_bytes_equal_those_of_a_drawn_state():
    mesh = MeshConfig(data=2, fsdp=2, expert=2)
    wsd = OptimizerConfig(schedule="wsd")
    config = dataclasses.replace(run_config(MODELS["sparse"], mesh), optimizer=wsd)
    state, counted = make_program(config).init_state(), state_bytes(config, mesh)
    for device in jax.devices():
        assert counted.total == bytes_on(device, state) + counted.gradients


def test_hand_worked_bytes():
    """Fsdp splits the width of all arrays in two; four bytes each."""
    config = run_config(dataclasses.replace(DENSE, num_layers=1), MeshConfig(data=4, fsdp=2))
    attention = 16 * (4 + 2 * 2 + 4) * 6
    parameters = 2 * 512 * 16 + attention + 3 * 16 * 24 + 3 * 16
    counted = state_bytes(config, config.mesh)
    assert counted == StateBytes(
        parameters=2 * parameters,
        optimizer=4 * parameters + 8,
        router_state=0,
        progress=20,
        gradients=2 * parameters,
    )
    assert counted.total == 8 * parameters + 28
