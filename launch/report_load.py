"""How even the load of a run's experts was: heat maps over its steps, and the worst layer's curves.

Both are made from router.jsonl, which has an array over the sparse layers for every logged step.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch.plotting import (
    Colours,
    Drawing,
    add_colour_bar,
    ratio_shades,
    set_steps,
    set_whole_ticks,
)
from moe.config import ConfigError, RunConfig
from moe.storage.lines import line_parts
from moe.storage.paths import RunPath, size
from moe.workdir.tracking import ROUTER_FILE, read_router

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS = 8  # the most layers that get a heat map
MAX_COLUMNS = 400  # the most columns of a heat map: about as many as fit
MAX_BYTES = 100_000_000  # the most that is parsed of router.jsonl; it takes seconds


class RouterLine(NamedTuple):
    """One line of router.jsonl."""

    step: int
    arrays: dict[str, np.ndarray]  # by name: [L, ...] over the sparse layers


@dataclasses.dataclass(frozen=True)
class LoadMap:
    """The load of one layer's experts over the steps of a run."""

    stem: str
    title: str
    steps: np.ndarray  # the last step of each column
    load: np.ndarray  # [columns, E], each expert's load over the even share


def read_router_lines(workdir: RunPath, config: RunConfig) -> tuple[list[RouterLine], int]:
    """Returns every n-th line of router.jsonl, and that n: 1, or more if the file is large.

    Raises ConfigError for a line whose arrays do not fit the model's layers and experts.
    """
    path, layers = workdir / ROUTER_FILE, len(_layer_names(config))
    if not layers or not path.exists():
        return [], 1
    every = 1 + sum(map(size, line_parts(path))) // MAX_BYTES
    shapes = {
        "load": (layers, config.model.moe.num_experts),
        "load_entropy": (layers,),
        "dropped_fraction": (layers,),
    }
    lines = []
    for step, arrays in read_router(workdir, every):
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape:
                found = f"the shape {arrays[name].shape}" if name in arrays else "no values"
                raise ConfigError(
                    f"{path}: {name} of step {step} has {found} instead of the shape {shape}: "
                    "delete that line"
                )
        lines.append(RouterLine(step, arrays))
    return lines, every


def _layer_names(config: RunConfig) -> list[str]:
    """Returns the names of the sparse layers, in the order in which their statistics are logged."""
    layers = config.model.sparse_layers
    if config.task != "span_corruption":
        return [f"layer {layer}" for layer in layers]
    return [f"{part} layer {layer}" for part in ("decoder", "encoder") for layer in layers]


def load_maps(lines: list[RouterLine], config: RunConfig) -> list[LoadMap]:
    """Returns a heat map for each of at most MAX_LAYERS sparse layers.

    If there are more, it takes layers at even distances, the first and the last included. Layers
    are numbered from 0, and dense layers count. Where a run has more than MAX_COLUMNS
    lines, a column has the mean load of neighbouring ones.
    """
    if not lines:
        return []
    names = _layer_names(config)
    chosen = np.linspace(0, len(names) - 1, min(len(names), MAX_LAYERS)).round().astype(int)
    columns = min(len(lines), MAX_COLUMNS)
    blocks = np.array_split([line.step for line in lines], columns)
    ends = np.array([block[-1] for block in blocks])
    maps = []
    for index in chosen:
        loads = np.array_split([line.arrays["load"][index] for line in lines], columns)
        ratios = config.model.moe.num_experts * np.array(
            [np.mean(block, axis=0) for block in loads]
        )
        title = f"Load of the experts in {names[index]}"
        stem = f"load_{names[index].removeprefix('layer ').replace(' ', '_')}"
        maps.append(LoadMap(stem, title, ends, ratios))
    return maps


def worst_layers(lines: list[RouterLine]) -> list[dict[str, Any]]:
    """Returns lines, as metrics.jsonl has them, of the layer that is worst at each step."""
    return [
        {
            "step": line.step,
            "router/worst_load_entropy": float(np.min(line.arrays["load_entropy"])),
            "router/worst_dropped_fraction": float(np.max(line.arrays["dropped_fraction"])),
        }
        for line in lines
    ]


def load_drawing(load_map: LoadMap) -> Drawing:
    """Returns the figure of a heat map."""
    return Drawing(load_map.stem, load_map.title, functools.partial(_paint, load_map))


def _paint(load_map: LoadMap, axes: "Axes", colours: Colours) -> None:
    # A column starts where the one before it ends, and ends at its own last step.
    steps = np.concatenate([[0], load_map.steps])
    experts = np.arange(load_map.load.shape[1] + 1) - 0.5
    # An even load, 1, has the page's colour; from twice that on, the second colour is full.
    shades = ratio_shades(colours)
    mesh = axes.pcolormesh(steps, experts, load_map.load.T, cmap=shades, vmin=0, vmax=2)
    add_colour_bar(axes, mesh, "load / even share", extend="max", ticks=(0, 0.5, 1, 1.5, 2))
    axes.set(ylabel="expert", ylim=(experts[-1], experts[0]))
    set_whole_ticks(axes.yaxis)
    set_steps(axes, load_map.steps[-1])
