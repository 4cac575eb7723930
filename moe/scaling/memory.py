"""Counts the bytes of a run on each device, from its config and mesh alone.

`state_bytes` counts the training state, exactly. `step_bytes` counts what a step needs in all.
"""

import dataclasses

from moe.config import MeshConfig, ModelConfig, RunConfig
from moe.config.layout import gathers_once
from moe.scaling.activations import BATCH_BYTES, activations, weight_copies
from moe.scaling.arrays import parameters
from moe.scaling.communication import ITEM, local_tokens
from moe.scaling.hardware import Platform

WORD = 4  # bytes of a float32, an int32 and a uint32: nothing else is in a training state
# Two words of the optimizer count its updates: one for Adam and one for the schedule.
OPTIMIZER_WORDS = 2
# The step, the two words of the examples consumed, and two counts of skipped updates.
PROGRESS_WORDS = 5
# How far `step_bytes` may be from what a compiled program takes, as a part of it. Compilers copy
# arrays, and pack them into memory with gaps.
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Says how many bytes of each part of a training state one device holds."""

    parameters: int
    optimizer: int
    router_state: int
    progress: int  # the step, the examples consumed and the counts of skipped updates
    gradients: int  # they exist while a step runs

    @property
    def total(self) -> int:
        """Returns the bytes of all parts together."""
        return sum(dataclasses.astuple(self))


def state_bytes(config: RunConfig, mesh: MeshConfig) -> StateBytes:
    """Returns the bytes of a run's training state on each device of a resolved mesh.

    All devices hold equally many. AdamW has two moments for each parameter.
    """
    sizes = dataclasses.asdict(mesh)
    elements = sum(array.layers(sizes) * array.elements(sizes) for array in parameters(config))
    stacks = 2 if config.task == "span_corruption" else 1
    return StateBytes(
        parameters=WORD * elements,
        optimizer=WORD * (2 * elements + OPTIMIZER_WORDS),
        router_state=WORD * stacks * _router_biases(config.model),
        progress=WORD * PROGRESS_WORDS,
        gradients=WORD * elements,
    )


def _router_biases(config: ModelConfig) -> int:
    """Returns the number of the routers' biases. Each device holds all of them."""
    if not config.moe.bias_update_rate:
        return 0
    return len(config.sparse_layers) * config.moe.num_experts


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Says how many bytes of each kind one device needs at the largest moment of a step."""

    parameters: int
    optimizer: int  # with the router's biases and the counts of progress
    gradients: int
    activations: int  # what backward passes read of forward passes, and the batch
    temporaries: int

    @property
    def total(self) -> int:
        """Returns the bytes of all kinds together."""
        return sum(dataclasses.astuple(self))

    @property
    def largest(self) -> str:
        """Returns the kind that takes most."""
        kinds = dataclasses.asdict(self)
        return max(kinds, key=lambda kind: kinds[kind])


def step_bytes(config: RunConfig, mesh: MeshConfig, platform: Platform) -> StepBytes:
    """Returns the bytes that a training step takes on each device of a resolved mesh.

    `platform` is that of the devices, whose compilers copy different things.
    """
    state, sizes = state_bytes(config, mesh), dataclasses.asdict(mesh)
    active = activations(config, sizes, platform)
    # The sum over microbatches stands beside the gradients of one of them. In a pipeline, programs
    # for GPUs and TPUs add up each layer's gradient where it is made, unless remat computes experts
    # again.
    recomputes_experts = config.model.sparse_layers and config.model.remat != "none"
    adds_in_place = mesh.pipeline > 1 and platform != "cpu" and not recomputes_experts
    copies = 2 if config.train.accumulation > 1 and not adds_in_place else 1
    tokens = config.train.accumulation * local_tokens(config, sizes)
    gathered, gradients = 0, state.gradients
    if gathers_once(config, sizes):
        whole = sum(
            array.layers(sizes) * array.elements(sizes, whole=array.axes("D", sizes))
            for array in parameters(config)
        )
        # The compiler of TPUs keeps what it gathered in the compute dtype, unless stages of a
        # pipeline cut their pieces out of it.
        keeps_cast = platform == "tpu" and mesh.pipeline == 1
        gathered = whole * (ITEM[config.model.compute_dtype] if keeps_cast else WORD)
        gradients = WORD * whole
    return StepBytes(
        parameters=state.parameters + gathered,
        optimizer=state.optimizer + state.router_state + state.progress,
        gradients=copies * gradients,
        activations=active.saved + BATCH_BYTES * tokens,
        temporaries=active.temporaries + weight_copies(config, sizes, platform),
    )
