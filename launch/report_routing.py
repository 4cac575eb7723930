"""What `launch.report` draws of a run's experts: heat maps of their load, and curves of the worst layer."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RouterLines = list[tuple[int, dict[str, np.ndarray]]]  # of router.jsonl: a step, and arrays [L, ...] over the sparse layers

MAX_LAYERS = 8
MAX_COLUMNS = 400  # about as many as a plot has room for


@dataclasses.dataclass(frozen=True)
class LoadMap:
    """A heat map over steps: the load [columns, E] of one layer's experts over the even share, and each column's last step."""

    stem: str
    title: str
    steps: np.ndarray
    load: np.ndarray


def load_maps(lines: RouterLines, model: ModelConfig) -> list[LoadMap]:
    """A heat map for each sparse layer, or for at most `MAX_LAYERS` at even distances, the first and last among them.

    Layers are numbered from 0, dense ones counted. A run of many steps gets means over neighbouring ones.
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
        maps.append(LoadMap(f"load_{numbers[layer]}", f"Load of the experts in layer {numbers[layer]}", ends, load))
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


def draw_load(axes: "Axes", load_map: LoadMap, colours: Mapping[str, str]) -> None:
    """Draws a heat map: an even load in the page's colour, less in the first one, and more, from twice the even share on, in the second."""
    from matplotlib.colors import LinearSegmentedColormap  # as in launch.report
    from matplotlib.ticker import MaxNLocator

    # An odd number of shades, so that one of them is the even load's.
    shades = LinearSegmentedColormap.from_list("load", [colours[role] for role in ("first", "card", "second")], N=255)
    times = np.concatenate([[0], load_map.steps])
    experts = np.arange(load_map.load.shape[1] + 1) - 0.5
    mesh = axes.pcolormesh(times, experts, load_map.load.T, cmap=shades, vmin=0, vmax=2)
    axes.grid(False)
    axes.set_ylabel("expert")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = axes.figure.colorbar(mesh, ax=axes, extend="max", label="load / even share", ticks=(0, 0.5, 1, 1.5, 2))
    bar.outline.set_visible(False)
