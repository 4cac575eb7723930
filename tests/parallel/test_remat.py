"""Tests what the policies of remat keep, and that none of them changes a gradient."""

import functools
from typing import Any

import jax
import pytest

from launch.compiled_step import abstract_batch, lower_step
from moe.config import RunConfig
from moe.scaling.communication import least_collectives
from moe.scaling.programs import read_collectives
from moe.training.train_step import make_program

STEP = {
    "model.num_layers": 2,
    "model.model_dim": 128,
    "model.feed_forward_dim": 64,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 8,
    "model.compute_dtype": "float32",
    "model.moe.num_experts": 4,
    "model.moe.expert_dim": 32,
    "data.sequence_length": 32,
    "train.batch_size": 8,
    "train.loss_chunk": 16,
    "mesh.data": 1,
}
EXCHANGES = {
    "all_gather": {"model.moe.exchange": "all_gather", "model.moe.dispatch": "dropless"},
    "all_to_all": {"model.moe.exchange": "all_to_all", "model.moe.dispatch": "capacity"},
}


def compile_step(fields: dict[str, Any]) -> tuple[RunConfig, Any, Any]:
    """Returns a config with changed fields, its program, and its compiled train step."""
    values = RunConfig.config_dict()
    values.update_from_flattened_dict(STEP | fields)
    config = RunConfig.from_config_dict(values)
    program = make_program(config, jax.devices())
    compiled = lower_step(program, abstract_batch(config, program), "cpu").compile()
    return config, program, compiled


@functools.cache
def on_two_by_four(exchange: str, remat: str) -> tuple[RunConfig, Any, Any]:
    """Returns the step of a mesh fsdp 2, expert 4, which two tests read."""
    fields = EXCHANGES[exchange] | {"mesh.fsdp": 2, "mesh.expert": 4, "model.remat": remat}
    return compile_step(fields)


def sent(compiled: Any, mesh: Any, kind: str, axis: str) -> float:
    """Returns the bytes that a device of a compiled step sends over one axis."""
    collectives = read_collectives(compiled.as_text(), mesh.shape)
    return sum(use.bytes for use in collectives if (use.kind, use.axes) == (kind, (axis,)))


def least(config: RunConfig, kind: str, axis: str) -> float:
    collectives = least_collectives(config, config.mesh)
    return sum(use.bytes for use in collectives if (use.kind, use.axes) == (kind, (axis,)))


@pytest.mark.parametrize(
    ("exchange", "remat"),
    [
        pytest.param("all_gather", "none", marks=pytest.mark.slow),
        ("all_gather", "save_exchange"),
        ("all_gather", "full"),
        # What is sent again does not depend on how it is sent.
        pytest.param("all_to_all", "none", marks=pytest.mark.slow),
        pytest.param("all_to_all", "save_exchange", marks=pytest.mark.slow),
        pytest.param("all_to_all", "full", marks=pytest.mark.slow),
    ],
)
def test_what_experts_received_is_sent_again_unless_it_is_saved(exchange, remat) -> None:
    config, program, compiled = on_two_by_four(exchange, remat)
    kind = {"all_gather": "all-gather", "all_to_all": "all-to-all"}[exchange]
    found = sent(compiled, program.mesh, kind, "expert")
    # Capacity sends its slots, also empty ones, of which there are 1.25 as many as tokens.
    slots = config.model.moe.capacity_factor if exchange == "all_to_all" else 1.0
    assert found == pytest.approx(slots * least(config, kind, "expert"), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "save_attention", "full"])
def test_ulysses_sends_again_what_comes_before_an_output_that_is_saved(remat) -> None:
    fields = {"mesh.fsdp": 2, "mesh.context": 4, "model.remat": remat}
    fields["model.attention.context_parallelism"] = "ulysses"
    config, program, compiled = compile_step(EXCHANGES["all_gather"] | fields)
    found = sent(compiled, program.mesh, "all-to-all", "context")
    assert found == pytest.approx(least(config, "all-to-all", "context"), rel=0.1)


@pytest.mark.slow
def test_a_ring_moves_no_keys_again_for_an_output_that_is_saved() -> None:
    """What is left is the order of the tokens, which the ring changes first."""

    def sent_again(remat: str) -> float:
        fields = {"mesh.fsdp": 2, "mesh.context": 4, "model.remat": remat}
        _, program, compiled = compile_step(EXCHANGES["all_gather"] | fields)
        collectives = read_collectives(compiled.as_text(), program.mesh.shape)
        return sum(
            use.bytes
            for use in collectives
            if use.kind == "collective-permute" and use.what.startswith("recomputed")
        )

    assert 0 < sent_again("save_attention") < 0.5 * sent_again("full")


@pytest.mark.parametrize(("remat", "moves"), [("offload", 1), ("full", 0)])
def test_the_input_of_each_layer_is_moved_to_the_host(remat, moves) -> None:
    """A CPU has no other memory, so its program moves nothing. The jaxpr does, in one loop."""
    values = RunConfig.config_dict()
    values.update_from_flattened_dict(STEP | {"model.remat": remat, "mesh.data": 8})
    config = RunConfig.from_config_dict(values)
    program = make_program(config, jax.devices())
    step = program.train_step
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        traced = step.func.trace(
            *step.args, program.abstract_state, abstract_batch(config, program)
        )
    assert str(traced.jaxpr).count("MemorySpace.Host") == moves


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "recomputes"), [("none", False), ("full", True)])
def test_experts_are_computed_once_without_remat(remat, recomputes) -> None:
    """Else their weights would be gathered a third time on GPUs."""
    text = on_two_by_four("all_gather", remat)[2].as_text()
    loops = [line for line in text.splitlines() if " while(" in line and "/moe/" in line]
    assert loops and any("rematted_computation" in line for line in loops) == recomputes
