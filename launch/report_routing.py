"""What `launch.report` draws of a run's experts: heat maps of their load, and curves of the worst
layer.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.figures import add_bar, ratio_shades, set_steps
from moe.config import ConfigError, ModelConfig
from moe.workdir.tracking import ROUTER_FILE, read_router

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RouterLines = list[
    tuple[int, dict[str, np.ndarray]]
]  # of router.jsonl: a step, and arrays [L, ...] over the sparse layers

MAX_LAYERS = 8
MAX_COLUMNS = 400  # about as many as a plot has room for
# of router.jsonl are parsed, which takes seconds; of a longer one every so many lines
MAX_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class LoadMap:
    """A heat map over steps: the load [columns, E] of one layer's experts over the even share, and
    each column's last step.
    """

    stem: str
    title: str
    steps: np.ndarray
    load: np.ndarray


def read_lines(workdir: Path, model: ModelConfig) -> tuple[RouterLines, int]:
    """The lines of router.jsonl, of which only every n-th is read where they are too many, and that
    n.

    Raises ConfigError for a line whose arrays do not fit the model's layers and experts.
    """
    path, layers = workdir / ROUTER_FILE, len(model.sparse_layers)
    if not layers or not path.exists():
        return [], 1
    every = 1 + path.stat().st_size // MAX_BYTES
    shapes = {
        "load": (layers, model.moe.num_experts),
        "load_entropy": (layers,),
        "dropped_fraction": (layers,),
    }
    lines = []
    for step, values in read_router(workdir, every):
        for name, shape in shapes.items():
            if name not in values or values[name].shape != shape:
                found = f"the shape {values[name].shape}" if name in values else "no values"
                raise ConfigError(
                    f"{path}: {name} of step {step} has {found} instead of the shape {shape}: delete that line"
                )
        lines.append((step, values))
    return lines, every


def load_maps(lines: RouterLines, model: ModelConfig) -> list[LoadMap]:
    """A heat map for each sparse layer, or for at most `MAX_LAYERS` at even distances, the first
    and last among them.

    Layers are numbered from 0, dense ones counted. A run of many steps gets means over neighbouring
    ones.
    """
    if not lines:
        return []
    numbers = model.sparse_layers
    chosen = np.linspace(0, len(numbers) - 1, min(len(numbers), MAX_LAYERS)).round().astype(int)
    columns = min(len(lines), MAX_COLUMNS)
    ends = np.array([block[-1] for block in np.array_split([step for step, _ in lines], columns)])
    maps = []
    for layer in chosen:
        blocks = np.array_split([values["load"][layer] for _, values in lines], columns)
        load = model.moe.num_experts * np.array([np.mean(block, axis=0) for block in blocks])
        maps.append(
            LoadMap(
                f"load_{numbers[layer]}",
                f"Load of the experts in layer {numbers[layer]}",
                ends,
                load,
            )
        )
    return maps


def worst_layers(lines: RouterLines) -> list[dict[str, Any]]:
    """Metrics, as metrics.jsonl has them, of the layer that is worst at each step."""
    return [
        {
            "step": step,
            "router/worst_load_entropy": float(np.min(values["load_entropy"])),
            "router/worst_dropped_fraction": float(np.max(values["dropped_fraction"])),
        }
        for step, values in lines
    ]


def draw_load(load_map: LoadMap, axes: "Axes", colours: Mapping[str, str]) -> None:
    """Draws a heat map: an even load in the page's colour, less in the first one, and more, from
    twice the even share on, in the second.
    """
    from matplotlib.ticker import MaxNLocator  # as in launch.figures

    times = np.concatenate([[0], load_map.steps])
    experts = np.arange(load_map.load.shape[1] + 1) - 0.5
    mesh = axes.pcolormesh(
        times, experts, load_map.load.T, cmap=ratio_shades(colours), vmin=0, vmax=2
    )
    add_bar(axes, mesh, "load / even share", extend="max", ticks=(0, 0.5, 1, 1.5, 2))
    axes.set(ylabel="expert", ylim=(experts[-1], experts[0]))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    set_steps(axes, load_map.steps[-1])
