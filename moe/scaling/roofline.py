"""Estimates how long a step takes at best, and what bounds it (Williams et al. 2009).

A step is at least as long as its FLOPs at the chip's peak, its bytes at the memory's bandwidth, and
what it sends at the bandwidth of the network. The estimate is the longest of them, as if the others
stood behind it. A real step overlaps less, so the estimate is a bound and no prediction. Only that
for a measured CPU is one: it adds the parts up.
"""

import dataclasses
import math
from collections.abc import Mapping

from moe.config import AXES, MeshConfig, RunConfig
from moe.scaling.activations import activations
from moe.scaling.arrays import parameters
from moe.scaling.communication import (
    FLOAT32,
    ITEM,
    Collective,
    layer_passes,
    least_collectives,
    pipeline_schedule,
)
from moe.scaling.expert_rows import block_rows, expert_rows
from moe.scaling.flops import run_recomputed_flops, run_training_flops, stage_training_flops
from moe.scaling.hardware import Chip, Platform
from moe.scaling.memory import StepBytes, state_bytes, step_bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds what a layout takes on a chip, counted from the config alone."""

    mesh: MeshConfig
    memory: StepBytes
    collectives: tuple[Collective, ...]
    model_flops: float  # of a step, on all devices, without recomputation
    seconds: dict[str, float]  # by what takes them: compute, memory, and the network of some axes
    step_seconds: float
    mfu: float  # at the estimated step time

    @property
    def bound(self) -> str:
        """Returns what takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def estimate(config: RunConfig, mesh: MeshConfig, chip: Chip) -> Estimate:
    """Returns what a run takes on a resolved mesh of chips."""
    sizes = dataclasses.asdict(mesh)
    devices = math.prod(mesh.sizes)
    tokens = config.train.batch_size * config.data.sequence_length
    model_flops = tokens * run_training_flops(config)
    spent = model_flops + tokens * run_recomputed_flops(config)
    spent *= 1 + _waiting(config, sizes)
    collectives = least_collectives(config, mesh)
    seconds = {
        "compute": spent / devices / chip.peak_flops,
        "memory": memory_traffic(config, mesh, chip.platform) / chip.memory_bandwidth,
        **network_seconds(collectives, sizes, chip),
    }
    step_seconds = (max if chip.overlaps else sum)(seconds.values())
    return Estimate(
        mesh=mesh,
        memory=step_bytes(config, mesh, chip.platform),
        collectives=collectives,
        model_flops=model_flops,
        seconds=seconds,
        step_seconds=step_seconds,
        mfu=model_flops / devices / chip.peak_flops / step_seconds,
    )


def _waiting(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Returns for how long the stages of a pipeline wait, as a part of the time that all compute.

    What is no part of the stages is computed without waiting.
    """
    schedule = pipeline_schedule(config, sizes)
    if schedule is None:
        return 0.0
    share = stage_training_flops(config) / run_training_flops(config)
    return share * (schedule.ticks / (schedule.rounds * schedule.microbatches) - 1)


def memory_traffic(config: RunConfig, mesh: MeshConfig, platform: Platform) -> float:
    """Returns the bytes that a device reads and writes at least in a step.

    The update reads parameters, moments and gradients, and writes the first two. A microbatch
    writes what its backward pass reads, reads it, and adds its gradients up. Remat writes it twice,
    whatever it saves. On a CPU a scan over layers copies it into arrays of all layers, and out of
    them, and experts move more than that. What matmuls read again because it does not fit into
    registers is not counted.
    """
    state, sizes = state_bytes(config, mesh), dataclasses.asdict(mesh)
    update = 2 * (state.parameters + state.optimizer) + state.gradients
    model = dataclasses.replace(config.model, remat="none")
    made = activations(dataclasses.replace(config, model=model), sizes, platform).saved
    passes = 2 if config.model.remat == "none" else 3
    if platform == "cpu" and config.model.scan_layers:
        passes *= 2
    microbatches = config.train.accumulation
    if platform == "cpu" and config.model.sparse_layers:
        update += microbatches * _expert_traffic(config, sizes)
    # The activations of a pipeline's stages already are those of all microbatches.
    times = microbatches if pipeline_schedule(config, sizes) is None else 1
    return update + times * passes * made + microbatches * 3 * state.gradients


def _expert_traffic(config: RunConfig, sizes: Mapping[str, int]) -> float:
    """Returns the bytes that the experts of a CPU move in a microbatch beside what they save.

    Rows are gathered in both passes, and their gradients in the second; outputs and gradients are
    arrays of zeros first, then written and read. For each run of rows that is multiplied at once,
    an expert's weights are read in both passes, and its gradients are read and written.
    """
    passes, item = layer_passes(config, sizes)[0], ITEM[config.model.compute_dtype]
    experts = config.model.moe.num_experts // sizes["expert"]
    rows = expert_rows(config, sizes, passes.tokens, "cpu")
    weights = sum(a.elements(sizes) for a in parameters(config) if a.name == "experts") // experts
    # The longest runs have 16 blocks. What is left of an expert's rows makes 1.5 runs of 4 blocks
    # and as many of one block, on average.
    assignments = passes.tokens * config.model.moe.experts_per_token * sizes["expert"]
    block = block_rows(config.model, assignments, experts, "cpu")
    runs = rows / (16 * block) + 3 * experts
    moved = 9 * item * rows * config.model.model_dim + runs * (2 * item + 2 * FLOAT32) * weights
    return passes.sparse_layers * moved


def network_seconds(
    collectives: tuple[Collective, ...], sizes: Mapping[str, int], chip: Chip
) -> dict[str, float]:
    """Returns how long the network of each combination of axes takes, by "network over ...".

    The last axes of a mesh have the nearest devices. Where a group reaches beyond a slice, those
    of its devices that share a slice share what crosses to another one, too. Each pair of an
    all-to-all has rows of its own, so nothing is shared there.
    """
    seconds: dict[str, float] = {}
    for collective in collectives:
        group = math.prod(sizes[axis] for axis in collective.axes)
        near = min(group, _devices_in_slice(collective.axes, sizes, chip))
        time = collective.bytes / chip.link_bandwidth if near > 1 else 0.0
        if near < group:
            crossing = collective.bytes / near
            if collective.kind == "all-to-all":
                crossing = collective.bytes * (group - near) / (group - 1)
            time = max(time, crossing / chip.network_bandwidth)
        name = f"network over {', '.join(collective.axes)}"
        seconds[name] = seconds.get(name, 0.0) + time
    return seconds


def _devices_in_slice(axes: tuple[str, ...], sizes: Mapping[str, int], chip: Chip) -> int:
    """Returns how many devices of a group over some axes lie in one slice."""
    inside, room = 1, chip.devices_per_slice
    for axis in reversed(AXES):
        part = sizes[axis] if sizes[axis] <= room else math.gcd(sizes[axis], room)
        if axis in axes:
            inside *= part
        room //= part
        if part < sizes[axis]:  # the slice is full: further axes lead out of it
            break
    return inside
