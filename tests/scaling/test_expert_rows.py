"""Compares the counted rows of experts with the kernels' choice, and with what dropless makes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from moe.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from moe.kernels import grouped_matmul
from moe.kernels.grouped_matmul import Shapes
from moe.kernels.grouped_matmul.choice import with_blocks
from moe.model import dispatch
from moe.model.experts import Weights
from moe.scaling.expert_rows import block_rows, expert_rows
from moe.scaling.hardware import CHIPS
from moe.scaling.memory import step_bytes

KINDS = ["cpu", *(chip.device_kind for chip in CHIPS.values())]
PLATFORMS = {"cpu": "cpu"} | {chip.device_kind: chip.platform for chip in CHIPS.values()}
LOADS = [(1, 8), (100, 64), (2048, 8), (8192, 8), (16384, 8), (16392, 8), (2**20, 128)]


def model(implementation="auto", dtype="bfloat16", experts=8):
    moe = MoEConfig(num_experts=experts, implementation=implementation)
    return ModelConfig(moe=moe, compute_dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_the_implementation_that_is_chosen(kind):
    for (assignments, experts), dtype in itertools.product(LOADS, ("float32", "bfloat16")):
        chosen = grouped_matmul.choose(kind, Shapes(assignments, experts, dtype))
        counted = block_rows(model(dtype=dtype), assignments, experts, PLATFORMS[kind])
        assert counted == chosen.block_rows, (assignments, experts, dtype)


@pytest.mark.parametrize("name", ["blockwise", "tpu", "hopper"])
def test_blocks_are_those_of_the_implementation_that_a_config_names(name):
    for assignments, experts in LOADS:
        chosen = with_blocks(name, Shapes(assignments, experts, "bfloat16"))
        for platform in ("cpu", "gpu", "tpu"):
            counted = block_rows(model(name), assignments, experts, platform)
            assert counted == chosen.block_rows


class Arranged(Exception):
    """Carries the number of rows that dropless makes room for."""


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200", "TPU v5"])
@pytest.mark.parametrize("tokens", [1, 37, 4096])
def test_rows_are_those_that_dropless_makes_room_for(kind, tokens, monkeypatch):
    def stop(experts_NA, starts_E, num_slots):
        raise Arranged(num_slots)

    monkeypatch.setattr(dispatch, "arrange", stop)
    monkeypatch.setattr(dispatch, "chip", lambda mesh: kind)
    weights = Weights(*(jnp.zeros(shape, jnp.bfloat16) for shape in [(8, 4, 4)] * 3))
    config = RunConfig(model=model())
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((tokens, 4), "bfloat16"), ((tokens, 2), "int32"), ((tokens, 2), "f4"))
    ]
    with pytest.raises(Arranged) as made:
        jax.eval_shape(
            lambda x, experts, scores: dispatch.dropless(x, experts, scores, weights), *inputs
        )
    sizes = dataclasses.asdict(MeshConfig(data=1))
    assert made.value.args == (expert_rows(config, sizes, tokens, PLATFORMS[kind]),)


def test_a_step_takes_more_by_the_rows_of_larger_blocks():
    """Each of 64 experts has a mean load of 64 rows, in blocks of 8 on CPUs and of 128 on TPUs."""
    config = RunConfig(
        model=dataclasses.replace(model(experts=64), remat="none", scan_layers=False),
        data=DataConfig(sequence_length=1024),
        train=TrainConfig(batch_size=2),
        mesh=MeshConfig(data=1),
    )
    sizes = dataclasses.asdict(config.mesh)
    more = expert_rows(config, sizes, 2048, "tpu") - expert_rows(config, sizes, 2048, "cpu")
    assert more == 12288 - 4544  # 4096 rows, with 127 and 7 more for each expert, in whole blocks
    named = dataclasses.replace(config.model.moe, implementation="blockwise")
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=named))
    bytes_of = lambda config: step_bytes(config, config.mesh, "tpu")
    layers, width = config.model.num_layers, config.model.moe.expert_dim
    assert bytes_of(config).activations - bytes_of(smaller).activations == 4 * layers * width * more
