"""Searches the layouts of a run: meshes, remat and microbatches that fit the memory of a chip."""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe.config import ConfigError, MeshConfig, RunConfig, check_layout
from moe.config.layout import count_batch_parts, gathers_once
from moe.scaling.hardware import Chip
from moe.scaling.memory import state_bytes, step_bytes
from moe.scaling.roofline import Estimate, estimate

SMALL_BUBBLE = 0.05  # the part of the time that stages may wait, if more microbatches cost as much


class Layout(NamedTuple):
    """Holds a config whose mesh is resolved, and what it takes."""

    config: RunConfig
    estimate: Estimate

    @property
    def flags(self) -> str:
        """Returns the flags that choose the layout."""
        mesh = dataclasses.asdict(self.config.mesh)
        train = self.config.train
        fields = {f"mesh.{axis}": size for axis, size in mesh.items()} | {
            "model.remat": self.config.model.remat,
            "train.accumulation": train.accumulation,
            "train.gather_once": train.gather_once,
        }
        if self.config.mesh.pipeline > 1:
            fields["train.pipeline_rounds"] = train.pipeline_rounds
        return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def fitting_layouts(config: RunConfig, devices: int, chip: Chip) -> list[Layout]:
    """Returns the layouts on so many chips that fit their memory, the shortest step first.

    For each mesh and each choice of remat, it has the fewest microbatches that fit, and so for
    parameters that are gathered once a step. In a pipeline, whose stages wait less with more of
    them, it has those numbers of microbatches and rounds whose step is shortest. Layouts of equal
    time come with the least to hide behind it first, then with the most free memory.
    """
    found = []
    choose = lambda mesh: _first_fit if mesh.pipeline == 1 else _shortest_fit
    for mesh in possible_meshes(config, devices):
        if state_bytes(config, mesh).total > chip.memory_bytes:
            continue  # most meshes of a large model end here
        for remat, once in itertools.product(_remats(config), (False, True)):
            fit = choose(mesh)(with_gather_once(config, once), mesh, remat, chip)
            # Steps of one microbatch, and meshes that split no parameter, are the same either way.
            if fit and gathers_once(fit, dataclasses.asdict(mesh)) == once:
                found.append(Layout(fit, estimate(fit, mesh, chip)))
    order = lambda layout: (
        layout.estimate.step_seconds,
        sum(layout.estimate.seconds.values()),
        layout.estimate.memory.total,
    )
    return sorted(found, key=order)


def with_gather_once(config: RunConfig, value: bool) -> RunConfig:
    """Returns a config that gathers parameters once a step, or for each microbatch."""
    train = dataclasses.replace(config.train, gather_once=value)
    return dataclasses.replace(config, train=train)


def _first_fit(config: RunConfig, mesh: MeshConfig, remat: str, chip: Chip) -> RunConfig | None:
    """Returns the config with the fewest microbatches that fit a chip, or None if none do."""
    fits = lambda number: _fits(_change(config, mesh, remat, number), chip)
    first, *rest = _microbatches(config, mesh)
    if not fits(first):
        # Two microbatches need a sum of gradients more. From there on, more of them need less.
        place = bisect.bisect_left(rest, True, key=fits)
        if place == len(rest):
            return None
        first = rest[place]
    return _change(config, mesh, remat, first)


def _shortest_fit(config: RunConfig, mesh: MeshConfig, remat: str, chip: Chip) -> RunConfig | None:
    """Returns the config of a pipeline that fits a chip with the shortest step, or None.

    More rounds and microbatches let stages wait less, and send more. So it compares the fewest and
    the most rounds, each with the fewest microbatches that fit and with those that wait little.
    """
    _, repeats = config.model.layer_groups[config.model.pipelined_group]
    numbers, choices = _microbatches(config, mesh), []
    for rounds in {1, repeats // mesh.pipeline}:
        train = dataclasses.replace(config.train, pipeline_rounds=rounds)
        change = functools.partial(_change, dataclasses.replace(config, train=train), mesh, remat)
        place = bisect.bisect_left(numbers, True, key=lambda number: _fits(change(number), chip))
        for number in numbers[place:]:
            bubble = (mesh.pipeline - 1) / (rounds * number + mesh.pipeline - 1)
            if number == numbers[place] or bubble <= SMALL_BUBBLE:
                choices.append(change(number))
            if bubble <= SMALL_BUBBLE:
                break
    time = lambda choice: estimate(choice, mesh, chip).step_seconds
    return min(choices, key=time, default=None)


def _remats(config: RunConfig) -> tuple[str, ...]:
    """Returns the policies that a search tries, those that keep most first.

    "offload" is left out, since nothing is known of the network between a chip and its host.
    """
    exchange = ("save_exchange",) if config.model.sparse_layers else ()
    return ("none", *exchange, "save_attention", "full")


def cheapest_fit(config: RunConfig, mesh: MeshConfig, chip: Chip) -> str | None:
    """Returns the change that fits a chip at the least cost, or None if nothing fits.

    It may change remat, the microbatches, fsdp, and `train.gather_once` where that is set. The
    fewest changes are cheapest, and of equally many the shortest step. The result names the fields
    to set, as "model.remat=full, train.accumulation=8".
    """
    own, remats = config.model.remat, _remats(config)
    remats = remats[remats.index(own) :] if own in remats else (own,)
    bases, fits = [config], []
    if config.train.gather_once:
        bases.append(with_gather_once(config, value=False))
    for split in _more_fsdp(mesh):
        if not _is_possible(config, split):
            continue
        numbers = [n for n in _microbatches(config, split) if n >= config.train.accumulation]
        for base, remat, number in itertools.product(bases, remats, numbers):
            changed = _change(base, split, remat, number)
            if _fits(changed, chip):
                changes = _changes(config, mesh, changed, split)
                time = estimate(changed, split, chip).step_seconds
                fits.append((len(changes), time, changes))
    return ", ".join(min(fits)[2]) if fits else None


def _changes(config: RunConfig, mesh: MeshConfig, new: RunConfig, split: MeshConfig) -> list[str]:
    """Returns the fields that differ between two layouts, with their new values."""
    changes = []
    if new.model.remat != config.model.remat:
        changes.append(f"model.remat={new.model.remat}")
    if new.train.accumulation != config.train.accumulation:
        changes.append(f"train.accumulation={new.train.accumulation}")
    if new.train.gather_once != config.train.gather_once:
        changes.append(f"train.gather_once={new.train.gather_once}")
    if split != mesh:
        changes.append(f"mesh.data={split.data} and mesh.fsdp={split.fsdp}")
    return changes


def _more_fsdp(mesh: MeshConfig) -> Iterator[MeshConfig]:
    """Yields a mesh, and those that turn replicas into parts of the parameters."""
    for factor in range(1, mesh.data + 1):
        if mesh.data % factor == 0:
            yield dataclasses.replace(mesh, data=mesh.data // factor, fsdp=mesh.fsdp * factor)


def _fits(config: RunConfig, chip: Chip) -> bool:
    """Returns whether a config whose mesh is resolved fits the memory of a chip."""
    return step_bytes(config, config.mesh, chip.platform).total <= chip.memory_bytes


def _microbatches(config: RunConfig, mesh: MeshConfig) -> list[int]:
    """Returns the numbers of microbatches into which the rows of each device can be divided.

    A pipeline deals them out to its stages.
    """
    rows = config.train.batch_size // count_batch_parts(dataclasses.asdict(mesh))
    return [
        number for number in range(mesh.pipeline, rows + 1, mesh.pipeline) if rows % number == 0
    ]


def _change(config: RunConfig, mesh: MeshConfig, remat: str, accumulation: int) -> RunConfig:
    """Returns a config with another mesh, remat and number of microbatches."""
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, accumulation=accumulation),
    )


def _is_possible(config: RunConfig, mesh: MeshConfig) -> bool:
    """Returns whether the model, and the batch in few microbatches, can be split over a mesh."""
    try:
        check_layout(_change(config, mesh, config.model.remat, mesh.pipeline), mesh)
    except ConfigError:
        return False
    return True


def possible_meshes(config: RunConfig, devices: int) -> Iterator[MeshConfig]:
    """Yields the meshes of so many devices that could suit a config, at one round of a pipeline."""
    train = dataclasses.replace(config.train, pipeline_rounds=1)
    config = dataclasses.replace(config, train=train)
    experts = max(1, config.model.moe.num_experts)
    limits = {
        "pipeline": config.model.num_layers,
        "expert": experts,
        "tensor": config.model.num_heads,
    }
    axes = ("pipeline", "fsdp", "expert", "context", "tensor")  # `data` takes what remains
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    choices = [[n for n in divisors if n <= limits.get(axis, devices)] for axis in axes]
    for sizes in itertools.product(*choices):
        used = math.prod(sizes)
        if devices % used == 0:
            mesh = MeshConfig(data=devices // used, **dict(zip(axes, sizes, strict=True)))
            if _is_possible(config, mesh):
                yield mesh
